"""The tensors of a HuggingFace folder: safetensors files and their index."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vopd.errors import shown
from megatron_vopd.hf.facts import ModelError, ModelFacts, facts_from_config
from megatron_vopd.hf.folder import (
    INDEX_NAME,
    SINGLE_NAME,
    is_plain_name,
    model_file,
    read_facts,
    read_json,
)
from megatron_vopd.hf.mapping import hf_tensors


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type as config.json has it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as uint8 [bytes]: shared memory, a storage of its own."""
    assert tensor.is_contiguous(), "a chunk must lie in one piece"
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return torch.from_numpy(flat.numpy())


def read_config(model_dir: str | Path) -> tuple[Any, ModelFacts]:
    """Read the transformers config of a model folder, and its facts. Code in it is never run.

    Raises:
        ModelError: no readable config, or an unsupported model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: not found; expected a HuggingFace model folder with config.json")
    read_facts(str(path))  # names what is wrong with a config that transformers would stumble over
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ModelError(f"{path}: refused by transformers: {reason}") from error
    return config, facts_from_config(config.to_dict(), str(path))


class SafetensorsFolder:
    """The tensors of a model folder by name, read slice by slice. A context manager."""

    def __init__(self, model_dir: str | Path) -> None:
        self._dir = Path(model_dir)
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self.file_of = self._read_index()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _read_index(self) -> dict[str, str]:
        """Read tensor name -> file name, from the index or from the only file."""
        index_path = self._dir / INDEX_NAME
        if index_path.is_file():
            names = read_json(model_file(self._dir, INDEX_NAME)).get("weight_map")
            if not isinstance(names, dict):
                raise ModelError(f"{index_path}: no readable weight_map; copy the file again")
            for tensor_name, file_name in names.items():
                if not is_plain_name(file_name):
                    raise ModelError(
                        f"{index_path}: {shown(tensor_name)} points to {shown(file_name)}; "
                        "expected the name of a file in the same folder"
                    )
            return names
        if not (self._dir / SINGLE_NAME).is_file():
            raise ModelError(
                f"{self._dir}: no {SINGLE_NAME} and no {INDEX_NAME}; expected safetensors weights "
                "(pickled .bin weights are not read)"
            )
        return dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)

    def _open(self, file_name: str) -> Any:
        if file_name not in self._files:
            path = model_file(self._dir, file_name)
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
            self._files[file_name] = self._stack.enter_context(opened)
        return self._files[file_name]

    def slices(self, name: str) -> Any:
        """Return a lazily read tensor: index it with slices, ask `get_shape()`."""
        file_name = self.file_of[name]
        try:
            return self._open(file_name).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self._dir / file_name}: {name} is missing ({error})") from error

    def require(self, facts: ModelFacts) -> None:
        """Check names and shapes against the config, without reading any weight.

        Raises:
            ModelError: a missing, an unexpected, or a wrongly shaped tensor, by name and file.
        """
        expected = hf_tensors(facts)
        # Some tools write the head of a tied model again, and rotary tables; both are derived.
        derived = {"lm_head.weight"} if facts.tied else set()
        for name, expected_shape in expected.items():
            if name not in self.file_of:
                raise ModelError(f"{self._dir}: tensor {name} is missing; config.json asks for it")
            shape = tuple(self.slices(name).get_shape())
            if shape != expected_shape:
                raise ModelError(
                    f"{self._dir / self.file_of[name]}: {name} has shape {shape}; "
                    f"config.json asks for {expected_shape}"
                )
        for name in sorted(self.file_of.keys() - expected.keys() - derived):
            if not name.endswith("rotary_emb.inv_freq"):
                raise ModelError(
                    f"{self._dir / self.file_of[name]}: unexpected tensor {shown(name)}; "
                    "config.json describes no such weight"
                )
        for file_name in sorted(set(self.file_of.values())):
            for name in self._open(file_name).keys():  # noqa: SIM118 (not a dict)
                if self.file_of.get(name) != file_name:
                    raise ModelError(
                        f"{self._dir / file_name}: {shown(name)} is in this file too, which "
                        f"{INDEX_NAME} does not say; one of the two is stale"
                    )

    def path_of(self, name: str) -> Path:
        """Return the file that holds a tensor, for messages."""
        return self._dir / self.file_of[name]

    def dtype_of(self, name: str) -> str:
        """Return a tensor's type as safetensors writes it: F32, BF16, ..."""
        return self.slices(name).get_dtype()
