"""Megatron checkpoint -> HuggingFace folder: safetensors written in one pass, file by file.

The format is a length, a JSON header with every tensor's type, shape and place, then the values.
All of that is known before the first value is, so a file is written tensor by tensor and no more
than one unit of the mapping is ever in memory. Under torchrun the ranks share the files out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vopd.checkpoint.convert.model import CheckpointModel
from megatron_vopd.checkpoint.staging import (
    PhaseProgress,
    Summary,
    begin_staging,
    no_progress,
    publish_staging,
)
from megatron_vopd.collectives import all_ranks, rank_0
from megatron_vopd.files.atomic_folder import FileRecord, HashCheck, Staging, verify_sizes
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.source import ModelSource, carried_content, require_finite, require_same_bits
from megatron_vopd.hf.tensors import (
    DTYPES,
    INDEX_NAME,
    SafetensorsFolder,
    as_bytes,
    dtype_name,
)
from megatron_vopd.hf.writer import MAX_FILE_BYTES, FilePlan, header_bytes, plan_files
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
    total_stored = sum(path.stat().st_size for path in ckpt_dir.glob("*.distcp"))
    advance = progress("checking hashes", total_stored)
    records = rank_0(_hashed_files, ckpt_dir)
    hashed = frozenset(record.name for record in records)
    with ExitStack() as stack:
        # Beside everything else from here on: it takes a third of the whole time.
        checked = records if dist.get_rank() == 0 else ()
        hash_check = stack.enter_context(HashCheck(ckpt_dir, checked, advance))
        model = all_ranks(CheckpointModel, ckpt_dir, groups, text_dir, skip_objects, hashed)
        stack.enter_context(model)
        final = DTYPES[dtype] if dtype else model.dtype
        files = plan_files(model.facts, final.itemsize, max_file_bytes)
        sizes = {file.name: _num_bytes(file, model.facts, final) for file in files}
        mine = files[dist.get_rank() :: dist.get_world_size()]
        my_bytes = sum(sizes[file.name] for file in mine)
        staging = begin_staging(stack, out_dir, ckpt_dir, sum(sizes.values()))
        advance = progress("writing", my_bytes)
        all_ranks(_write_files, staging, model, mine, final, advance)
        rank_0(_finish_folder, staging, model, files, final, dtype)
        if verify:
            advance = progress("verifying", my_bytes)
            all_ranks(_verify_files, staging.path, model, mine, final, advance)
        all_ranks(hash_check.require)
        num_files = publish_staging(staging, out_dir, {"kind": "huggingface model"})
    num_tensors = sum(len(file.shapes(model.facts)) for file in files)
    return Summary(out_dir, num_tensors, sum(sizes.values()), num_files, dtype_name(final))


def _hashed_files(ckpt_dir: Path) -> list[FileRecord]:
    """What the checkpoint's manifest lists, sizes checked; nothing without one."""
    manifest = verify_sizes(ckpt_dir) if ckpt_dir.is_dir() else None
    return manifest["files"] if manifest else []


def _num_bytes(file: FilePlan, facts: ModelFacts, dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in file.shapes(facts).values()) * dtype.itemsize


def _write_files(
    staging: Staging,
    model: CheckpointModel,
    files: list[FilePlan],
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    for plan in files:
        shapes = plan.shapes(model.facts)
        with staging.create(plan.name) as out:
            out.write(header_bytes(shapes, dtype))
            order = iter(shapes)
            for unit in plan.units:
                for name, tensor in model.unit_tensors(unit):
                    assert name == next(order)
                    if tensor.dtype != dtype:
                        tensor = tensor.to(dtype)
                        require_finite(tensor, f"{model.folder}: {name} as {dtype_name(dtype)}")
                    out.write(as_bytes(tensor).numpy())
                    out.hold(tensor)
                    advance(tensor.nbytes)


def _finish_folder(
    staging: Staging,
    model: CheckpointModel,
    files: list[FilePlan],
    final: torch.dtype,
    dtype: str | None,
) -> None:
    """Index where there are several files, config, tokenizer, generation config."""
    if len(files) > 1:
        placed = {name: file.name for file in files for name in file.shapes(model.facts)}
        total = sum(_num_bytes(file, model.facts, final) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        staging.write(INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode("ascii"))
    text = ModelSource(model.text_dir, model.hf_config, model.facts, model.carried, final)
    for name in model.carried:
        staging.write(name, carried_content(text, name, dtype))


def _verify_files(
    folder: Path,
    model: CheckpointModel,
    files: list[FilePlan],
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    with SafetensorsFolder(folder) as written:
        for plan in files:
            for unit in plan.units:
                for name, tensor in model.unit_tensors(unit):
                    got = written.slices(name)[:]
                    require_same_bits(tensor.to(dtype), got, f"{folder / plan.name}: {name}")
                    advance(got.nbytes)
