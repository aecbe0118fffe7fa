"""A checkpoint's weights under their HF names, without building the model.

The model is built on the meta device, which gives its parameters' places in the checkpoint
(`sharded_state_dict`) without their values; each parameter is then read when its turn comes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.checkpoint.sharded import (
    HF_DIR,
    CheckpointReader,
    Entry,
    entries,
    is_same_place,
    read_state,
    shards,
    with_values,
)
from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.hf.dtypes import DTYPES
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import Piece, Unit, hf_shape, shard_parameters
from megatron_vopd.hf.source import read_text_part, require_finite
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.model import ModelOptions, build_model


def meta_entries(
    hf_config: Any, facts: ModelFacts, groups: Groups, dtype: torch.dtype
) -> dict[str, Entry]:
    """List this rank's places in the checkpoint by parameter name, without values."""
    sequence_parallel = facts.is_moe and groups.layout.tp > 1
    options = ModelOptions(dtype=dtype, sequence_parallel=sequence_parallel)
    with torch.device("meta"):
        model = build_model(hf_config, facts, groups, options)
        return entries(model.sharded_state_dict())


def read_entry(entry: Entry, reader: CheckpointReader, like: Tensor) -> Tensor:
    """Read the local parameter of one entry from the checkpoint."""
    values = torch.empty_like(like)
    for shard in with_values(entry, values):
        reader.fill(shard)
    return values


class CheckpointModel:
    """A checkpoint's weights by their HF names, unit by unit. A context manager.

    Args:
        text_dir: folder of config and tokenizer; None: the one that the checkpoint carries.
        skip_objects: leave what a stock checkpoint pickles unread, instead of refusing it.
        hashed: files whose hash was just verified.
    """

    def __init__(
        self,
        ckpt_dir: Path,
        groups: Groups,
        text_dir: Path | None = None,
        skip_objects: bool = False,
        hashed: Collection[str] = (),
    ) -> None:
        self.folder = ckpt_dir
        if not ckpt_dir.is_dir():
            raise FileError(f"{ckpt_dir}: no such folder; give a checkpoint folder")
        self._reader = CheckpointReader(ckpt_dir, skip_objects, hashed)
        self.text_dir = text_dir or ckpt_dir / HF_DIR
        if not self.text_dir.is_dir():
            raise FileError(
                f"{self.text_dir}: not found; give the model's config and tokenizer with "
                "--hf-config"
            )
        self.hf_config, self.facts, self.carried = read_text_part(self.text_dir)
        self._check_state(read_state(ckpt_dir))
        embedding = self._reader.tensors.get("embedding.word_embeddings.weight")
        single = DTYPES["float32"]
        self.dtype = (DTYPES.get(embedding.dtype, single) if embedding else single).torch_dtype
        assert groups.layout.tp == groups.layout.pp == groups.layout.ep == 1
        self.entries = meta_entries(self.hf_config, self.facts, groups, self.dtype)
        wanted = [shard for entry in self.entries.values() for shard in shards(entry)]
        keys = self._reader.require(wanted)
        self._reader.require_only(keys, ignored=("optimizer.", "random_states"))
        self._check_vocabulary()
        self._plans = shard_parameters(self.facts, groups.layout, groups.coordinates, "local")
        self._layout = groups.layout

    def __enter__(self) -> CheckpointModel:
        return self

    def __exit__(self, *error: Any) -> None:
        self._reader.__exit__(*error)

    def _check_state(self, state: dict[str, Any]) -> None:
        """Refuse a config of another model than the weights were written for."""
        for key, value in (state.get("model") or {}).items():
            if getattr(self.facts, key, None) != value:
                raise FileError(
                    f"{self.text_dir / 'config.json'}: {key}={getattr(self.facts, key, None)}, but "
                    f"the checkpoint was written with {value}; restore the config"
                )

    def _check_vocabulary(self) -> None:
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            stored = self._reader.tensors.get(key)
            if stored and stored.shape[0] < self.facts.vocab_size:
                raise FileError(
                    f"{self.folder / '.metadata'}: {key} has {stored.shape[0]} rows; config.json "
                    f"asks for vocab_size {self.facts.vocab_size}"
                )

    def _like(self, name: str) -> Tensor:
        return torch.empty(self._plans[name].shape, dtype=self.dtype, device="meta")

    def _mapped(self, name: str, like: Tensor, part: Tensor) -> Tensor | None:
        """Map a part of parameter `name` from the file, where that has it in one piece.

        Args:
            like: the parameter's shape and type, on the meta device.
            part: a view of `like`.
        """
        for shard in with_values(self.entries[name], like):
            if is_same_place(shard.data, part):
                return self._reader.mapped(shard)
        return None

    def parameter(self, name: str) -> Tensor:
        """Return one parameter of the uncut model; not to be written to (it may be the file)."""
        like = self._like(name)
        values = self._mapped(name, like, like)
        if values is not None:
            return values
        return read_entry(self.entries[name], self._reader, torch.empty_like(like, device="cpu"))

    def unit_tensors(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        """Yield a unit's HF tensors in HF's order; not to be written to (they may be the file)."""
        parts: dict[str, list[tuple[Piece, str]]] = {name: [] for name in unit.hf_names()}
        for rule in unit.rules:
            parameter_name = unit.megatron_name(rule, "local", self.facts, self._layout)
            for piece in unit.plan(rule, self.facts, 0, 1).pieces:
                parts[piece.name].append((piece, parameter_name))
        parameters: dict[str, Tensor] = {}
        for name, pieces in parts.items():
            shape = hf_shape(name, self.facts)
            piece, parameter_name = pieces[0]
            part = (like := self._like(parameter_name))[piece.target]
            tensor = self._mapped(parameter_name, like, part) if part.shape == shape else None
            if tensor is None:
                if parameter_name not in parameters:
                    parameters[parameter_name] = self.parameter(parameter_name)
                tensor = _assembled(shape, pieces, parameters[parameter_name])
            require_finite(tensor, f"{self.folder}: {name}")
            yield name, tensor


def _assembled(
    shape: tuple[int, ...], pieces: list[tuple[Piece, str]], parameter: Tensor
) -> Tensor:
    """Join an HF tensor of its pieces in a parameter; a view where that has it in one piece."""
    first = parameter[pieces[0][0].target]
    if first.shape == shape:
        return first
    tensor = parameter.new_empty(shape)
    for piece, _ in pieces:
        tensor[piece.source] = parameter[piece.target]
    return tensor
