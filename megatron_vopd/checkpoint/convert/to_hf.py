"""Megatron checkpoint -> HuggingFace folder: safetensors written in one pass, file by file.

The format is a length, a JSON header with every tensor's type, shape and place, then the values.
All of that is known before the first value is, so a file is written tensor by tensor and no more
than one unit of the mapping is ever in memory. Under torchrun the ranks share the files out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.checkpoint.convert.model import CheckpointModel
from megatron_vopd.checkpoint.staging import (
    PhaseProgress,
    Summary,
    begin_staging,
    no_progress,
    publish_staging,
)
from megatron_vopd.collectives import all_ranks, rank_0
from megatron_vopd.files.atomic_folder import FileRecord, verify_hashes, verify_sizes
from megatron_vopd.hf.dtypes import DTYPES
from megatron_vopd.hf.source import ModelSource, carried_content, require_finite, require_same_bits
from megatron_vopd.hf.tensors import SafetensorsFolder, dtype_name
from megatron_vopd.hf.writer import (
    MAX_FILE_BYTES,
    FilePlan,
    finish_folder,
    plan_files,
    write_files,
)
from megatron_vopd.megatron.groups import Groups


@torch.no_grad()
def megatron_to_hf(
    ckpt_dir: Path,
    out_dir: Path,
    groups: Groups,
    dtype: str | None = None,
    verify: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    text_dir: Path | None = None,
    skip_objects: bool = False,
    progress: PhaseProgress = no_progress,
) -> Summary:
    """Write `out_dir`, a HuggingFace folder. Every rank of the world calls this.

    Args:
        groups: of an uncut layout (tp, pp and ep 1).
        dtype: "float32" or "bfloat16"; None keeps the stored type.
        verify: read everything back and compare bit by bit before the folder becomes visible.
        text_dir: config and tokenizer, for a checkpoint that carries none.
        skip_objects: leave pickled objects of the checkpoint unread instead of refusing it.

    Raises:
        UserError: one line; no folder is left.
    """
    records = rank_0(_hashed_files, ckpt_dir)
    shared_out = slice(dist.get_rank(), None, dist.get_world_size())
    advance = progress("checking hashes", sum(record.size for record in records[shared_out]))
    all_ranks(verify_hashes, ckpt_dir, records[shared_out], advance)
    hashed = frozenset(record.name for record in records)
    with ExitStack() as stack:
        model = all_ranks(CheckpointModel, ckpt_dir, groups, text_dir, skip_objects, hashed)
        stack.enter_context(model)
        final = DTYPES[dtype].torch_dtype if dtype else model.dtype
        files = plan_files(model.facts, final.itemsize, max_file_bytes)
        total = sum(file.num_bytes(model.facts, final) for file in files)
        mine = files[shared_out]
        my_bytes = sum(file.num_bytes(model.facts, final) for file in mine)
        staging = begin_staging(stack, out_dir, ckpt_dir, total)
        advance = progress("writing", my_bytes)
        tensors = (pair for plan in mine for pair in _converted(model, plan, final))
        all_ranks(write_files, staging, mine, model.facts, final, tensors, advance)
        rank_0(
            lambda: finish_folder(staging, files, model.facts, final, _text(model, final, dtype))
        )
        if verify:
            advance = progress("verifying", my_bytes)
            all_ranks(_verify_files, staging.path, model, mine, final, advance)
        num_files = publish_staging(staging, out_dir, {"kind": "huggingface model"})
    num_tensors = sum(len(file.shapes(model.facts)) for file in files)
    return Summary(out_dir, num_tensors, total, num_files, dtype_name(final))


def _hashed_files(ckpt_dir: Path) -> list[FileRecord]:
    """Return what the checkpoint's manifest lists, sizes checked; nothing without one."""
    manifest = verify_sizes(ckpt_dir) if ckpt_dir.is_dir() else None
    return manifest["files"] if manifest else []


def _converted(
    model: CheckpointModel, plan: FilePlan, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one file, finite in `dtype`."""
    for unit in plan.units:
        for name, tensor in model.unit_tensors(unit):
            if tensor.dtype != dtype:
                tensor = tensor.to(dtype)
                require_finite(tensor, f"{model.folder}: {name} as {dtype_name(dtype)}")
            yield name, tensor


def _text(
    model: CheckpointModel, final: torch.dtype, dtype: str | None
) -> Iterator[tuple[str, bytes]]:
    """Yield config, tokenizer and generation config, as the checkpoint carries them."""
    text = ModelSource(model.text_dir, model.hf_config, model.facts, model.carried, final)
    for name in model.carried:
        yield name, carried_content(text, name, dtype)


def _verify_files(
    folder: Path,
    model: CheckpointModel,
    files: list[FilePlan],
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    with SafetensorsFolder(folder) as written:
        for plan in files:
            for name, tensor in _converted(model, plan, dtype):
                got = written.slices(name)[:]
                require_same_bits(tensor, got, f"{folder / plan.name}: {name}")
                advance(got.nbytes)
