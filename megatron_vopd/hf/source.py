"""A HuggingFace folder that was found sound, and the bit-level checks of its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.hf.dtypes import DTYPES, SAFETENSORS_DTYPES
from megatron_vopd.hf.facts import ModelError, ModelFacts
from megatron_vopd.hf.folder import (
    carried_files,
    largest_token_id,
    model_file,
    read_json,
    refuse_code,
)
from megatron_vopd.hf.mapping import hf_tensors
from megatron_vopd.hf.tensors import SafetensorsFolder, read_config


@dataclass(frozen=True)
class ModelSource:
    """A model folder that was found sound: config, facts, the files to carry, the type to write."""

    folder: Path
    hf_config: Any
    facts: ModelFacts
    carried: tuple[str, ...]
    dtype: torch.dtype


def read_text_part(folder: Path) -> tuple[Any, ModelFacts, tuple[str, ...]]:
    """Read config, facts and carried files of a folder without code or links leading out."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give a HuggingFace model folder")
    refuse_code(folder)
    if (folder / "config.json").exists():
        read_json(model_file(folder, "config.json"))
    hf_config, facts = read_config(folder)
    carried = tuple(carried_files(folder))
    largest = largest_token_id(folder)
    if largest >= facts.vocab_size:
        raise ModelError(
            f"{folder / 'tokenizer.json'}: has token id {largest}, but model.embed_tokens.weight "
            f"has {facts.vocab_size} rows (config.json: vocab_size); use the model's own tokenizer"
        )
    return hf_config, facts, carried


def read_source(folder: Path, dtype: str | None) -> ModelSource:
    """Check a whole HF folder: text, names, shapes and types of the tensors.

    Args:
        dtype: type to convert to; None keeps the stored one, which must then be one for all.
    """
    hf_config, facts, carried = read_text_part(folder)
    with SafetensorsFolder(folder) as tensors:
        tensors.require(facts)
        first = ""
        for name in hf_tensors(facts):
            stored = tensors.dtype_of(name)
            if stored not in SAFETENSORS_DTYPES:
                raise ModelError(
                    f"{tensors.path_of(name)}: {name} is {stored}, expected F32, BF16 or F16; "
                    "use an unquantised checkpoint"
                )
            first = first or stored
            if stored != first and dtype is None:
                raise ModelError(
                    f"{tensors.path_of(name)}: {name} is {stored}, others are {first}; choose one "
                    "with --dtype"
                )
        if facts.tied and "lm_head.weight" in tensors.file_of:
            _require_equal_head(tensors)
    row = DTYPES[dtype] if dtype else SAFETENSORS_DTYPES[first]
    return ModelSource(folder, hf_config, facts, carried, row.torch_dtype)


def _require_equal_head(tensors: SafetensorsFolder) -> None:
    """Refuse a tied model whose head is another: it would be lost silently."""
    head, embedding = tensors.slices("lm_head.weight"), tensors.slices("model.embed_tokens.weight")
    rows, step = embedding.get_shape()[0], 4096
    same = head.get_shape() == embedding.get_shape() and all(
        torch.equal(head[at : at + step], embedding[at : at + step]) for at in range(0, rows, step)
    )
    if not same:
        raise ModelError(
            f"{tensors.path_of('lm_head.weight')}: lm_head.weight is not "
            "model.embed_tokens.weight, but config.json says tie_word_embeddings; correct "
            "the config"
        )


def carried_content(source: ModelSource, name: str, dtype: str | None) -> bytes:
    """Return a carried file as it is, but a config with the type that was asked for."""
    content = model_file(source.folder, name).read_bytes()
    if name != "config.json" or dtype is None:
        return content
    config = json.loads(content)
    stated = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if all(config.get(key) == dtype for key in stated):
        return content
    config |= dict.fromkeys(stated, dtype)
    return (json.dumps(config, indent=2) + "\n").encode()


def require_finite(tensor: Tensor, where: str) -> None:
    """Raise ModelError for NaN or infinity."""
    if tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (low.isfinite() and high.isfinite()):
            raise ModelError(f"{where} holds NaN or infinite values; use an intact checkpoint")


def require_same_bits(expected: Tensor, got: Tensor, where: str) -> None:
    """Raise FileError for tensors that differ in a bit."""
    if not same_bits(expected, got):
        raise FileError(f"{where} is not what was written; check the disk and its memory")


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have one type, shape and bits (0.0 is not -0.0, NaN is itself)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    integers = {2: torch.int16, 4: torch.int32}[first.element_size()]
    return torch.equal(first.view(integers), second.view(integers))
