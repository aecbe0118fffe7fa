"""The student, as it stands in training, as a HuggingFace folder that appears whole or not at all.

Ranks walk the tensors in lockstep (`megatron.weights.export_weights`); rank 0 writes each as it
comes, so no rank holds more than one unit of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.checkpoint.staging import Summary, begin_staging, publish_staging
from megatron_vopd.collectives import all_ranks, rank_0
from megatron_vopd.files.atomic_folder import Staging
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.tensors import dtype_name
from megatron_vopd.hf.writer import (
    MAX_FILE_BYTES,
    FilePlan,
    finish_folder,
    plan_files,
    text_files,
    write_files,
)
from megatron_vopd.megatron.student import Student
from megatron_vopd.megatron.weights import export_weights


@torch.no_grad()
def export_student(student: Student, source_dir: str | Path, out_dir: Path) -> Summary:
    """Write `out_dir` with config and tokenizer of `source_dir`. Every rank of the world calls it.

    Raises:
        UserError: one line; no folder is left.
    """
    facts, dtype = student.facts, student.options.dtype
    files = plan_files(facts, dtype.itemsize, MAX_FILE_BYTES)
    total = sum(file.num_bytes(facts, dtype) for file in files)
    source = Path(source_dir)
    rank_0(out_dir.parent.mkdir, parents=True, exist_ok=True)
    with ExitStack() as stack:
        staging = begin_staging(stack, out_dir, source, total)
        spec = student.options.layer_spec
        tensors = export_weights(student.bare, facts, student.groups, spec)
        all_ranks(_write, staging, files, facts, dtype, tensors)
        rank_0(lambda: finish_folder(staging, files, facts, dtype, text_files(source, dtype)))
        num_files = publish_staging(staging, out_dir, {"kind": "huggingface model"})
    num_tensors = sum(len(file.shapes(facts)) for file in files)
    return Summary(out_dir, num_tensors, total, num_files, dtype_name(dtype))


def _write(
    staging: Staging,
    files: list[FilePlan],
    facts: ModelFacts,
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """Walk all tensors on every rank; rank 0 writes them."""
    try:
        if dist.get_rank() == 0:
            write_files(staging, files, facts, dtype, tensors)
    finally:
        # All ranks walk to the end, whatever happened to a file here: nobody waits for this one.
        for _ in tensors:
            pass
