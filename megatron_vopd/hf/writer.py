"""A HuggingFace folder, written file by file: planned sizes, safetensors headers, text files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vopd.files.atomic_folder import Staging
from megatron_vopd.hf.dtypes import DTYPES
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.folder import INDEX_NAME, SINGLE_NAME
from megatron_vopd.hf.mapping import Unit, hf_shape, model_units
from megatron_vopd.hf.source import ModelSource, carried_content, read_text_part
from megatron_vopd.hf.tensors import as_bytes, dtype_name

MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class FilePlan:
    """One safetensors file: its name and the units whose tensors it holds."""

    name: str
    units: tuple[Unit, ...]

    def shapes(self, facts: ModelFacts) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, in the file's order."""
        names = [name for unit in self.units for name in unit.hf_names()]
        return {name: hf_shape(name, facts) for name in names}

    def num_bytes(self, facts: ModelFacts, dtype: torch.dtype) -> int:
        """Return the size of the values."""
        return sum(math.prod(shape) for shape in self.shapes(facts).values()) * dtype.itemsize


def plan_files(facts: ModelFacts, item_size: int, max_bytes: int) -> list[FilePlan]:
    """Cut the model, in HF's order, into files of at most `max_bytes` (a unit is never cut)."""
    groups: list[list[Unit]] = [[]]
    filled = 0
    for unit in model_units(facts):
        size = sum(math.prod(hf_shape(name, facts)) for name in unit.hf_names()) * item_size
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    if len(groups) == 1:
        return [FilePlan(SINGLE_NAME, tuple(groups[0]))]
    total = len(groups)
    return [
        FilePlan(f"model-{number:05d}-of-{total:05d}.safetensors", tuple(units))
        for number, units in enumerate(groups, 1)
    ]


def header_bytes(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Return length and header of a safetensors file whose tensors follow in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype_name(dtype)].code,
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_files(
    staging: Staging,
    files: Sequence[FilePlan],
    facts: ModelFacts,
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write these files one after another.

    Args:
        tensors: what they hold, by name and in their order, in `dtype`.
        advance: takes the number of bytes written, tensor by tensor.
    """
    for plan in files:
        shapes = plan.shapes(facts)
        with staging.create(plan.name) as out:
            out.write(header_bytes(shapes, dtype))
            for expected in shapes:
                name, tensor = next(tensors)
                assert (name, tensor.dtype) == (expected, dtype), (name, expected)
                out.write(as_bytes(tensor.cpu().contiguous()).numpy())
                advance(tensor.nbytes)


def finish_folder(
    staging: Staging,
    files: Sequence[FilePlan],
    facts: ModelFacts,
    dtype: torch.dtype,
    text: Iterable[tuple[str, bytes]],
) -> None:
    """Write what stands beside the tensors.

    Args:
        files: all files of the model; several make an index.
        text: name and content of config, tokenizer, generation config.
    """
    if len(files) > 1:
        placed = {name: file.name for file in files for name in file.shapes(facts)}
        total = sum(file.num_bytes(facts, dtype) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        staging.write(INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode("ascii"))
    for name, content in text:
        staging.write(name, content)


def text_files(source_dir: Path, dtype: torch.dtype) -> list[tuple[str, bytes]]:
    """Return config, tokenizer and generation config of a student that is written in `dtype`."""
    hf_config, facts, carried = read_text_part(source_dir)
    text = ModelSource(source_dir, hf_config, facts, carried, dtype)
    return [(name, carried_content(text, name, dtype_name(dtype))) for name in carried]
