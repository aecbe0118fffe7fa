"""The student, as it stands in training, as a HuggingFace folder that appears whole or not at all.

Ranks walk the tensors in lockstep (`hf_io.export_weights`); rank 0 writes each as it comes, so no
rank holds more than one unit of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.checkpoint import dtype_name
from megatron_vopd.checkpoint_values import as_bytes
from megatron_vopd.hf_export import MAX_FILE_BYTES, FilePlan, header_bytes, plan_files
from megatron_vopd.hf_io import INDEX_NAME, export_weights
from megatron_vopd.model_source import ModelSource, carried_content, read_text_part
from megatron_vopd.parallel import in_step
from megatron_vopd.publish import Staging
from megatron_vopd.publish_together import Summary, begin_staging, on_rank_0, publish_staging
from megatron_vopd.student import Student


@torch.no_grad()
def export_student(student: Student, source_dir: str | Path, out_dir: Path) -> Summary:
    """Write `out_dir` with config and tokenizer of `source_dir`. Every rank of the world calls it.

    Raises:
        UserError: one line; no folder is left.
    """
    facts, dtype = student.facts, student.options.dtype
    files = plan_files(facts, dtype.itemsize, MAX_FILE_BYTES)
    total = sum(_num_bytes(file.shapes(facts), dtype) for file in files)
    in_step(lambda: on_rank_0(lambda: out_dir.parent.mkdir(parents=True, exist_ok=True)))
    with ExitStack() as stack:
        staging = begin_staging(stack, out_dir, Path(source_dir), total)
        spec = student.options.layer_spec
        tensors = export_weights(student.bare, facts, student.groups, spec)
        in_step(lambda: _write(staging, files, student, tensors))
        in_step(lambda: on_rank_0(lambda: _finish(staging, files, student, Path(source_dir))))
        num_files = publish_staging(staging, out_dir, {"kind": "huggingface model"})
    num_tensors = sum(len(file.shapes(facts)) for file in files)
    return Summary(out_dir, num_tensors, total, num_files, dtype_name(dtype))


def _num_bytes(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


def _write(
    staging: Staging,
    files: list[FilePlan],
    student: Student,
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """All tensors on every rank, to the files on rank 0."""
    try:
        if dist.get_rank() == 0:
            for plan in files:
                _write_file(staging, plan, student, tensors)
    finally:
        # All ranks walk to the end, whatever happened to a file here: nobody waits for this one.
        for _ in tensors:
            pass


def _write_file(
    staging: Staging, plan: FilePlan, student: Student, tensors: Iterator[tuple[str, Tensor]]
) -> None:
    shapes = plan.shapes(student.facts)
    with staging.create(plan.name) as out:
        out.write(header_bytes(shapes, student.options.dtype))
        for expected in shapes:
            name, tensor = next(tensors)
            assert name == expected, (name, expected)
            values = tensor.cpu().contiguous()
            out.write(as_bytes(values).numpy())
            out.hold(values)


def _finish(staging: Staging, files: list[FilePlan], student: Student, source_dir: Path) -> None:
    """Index where there are several files, config, tokenizer, generation config."""
    facts, dtype = student.facts, student.options.dtype
    shapes = {file.name: file.shapes(facts) for file in files}
    if len(files) > 1:
        placed = {name: file for file, names in shapes.items() for name in names}
        total = sum(_num_bytes(names, dtype) for names in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        staging.write(INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode("ascii"))
    for name, content in text_files(source_dir, dtype):
        staging.write(name, content)


def text_files(source_dir: Path, dtype: torch.dtype) -> list[tuple[str, bytes]]:
    """Config, tokenizer and generation config of a student that is written in `dtype`."""
    hf_config, facts, carried = read_text_part(source_dir)
    text = ModelSource(source_dir, hf_config, facts, carried, dtype)
    return [(name, carried_content(text, name, dtype_name(dtype))) for name in carried]
