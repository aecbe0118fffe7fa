"""HuggingFace folder -> megatron-core checkpoint, one parameter at a time.

For each local parameter: read its HF slices, write its chunks, forget it. A process holds one
parameter, whatever the size of the model. The places of the chunks come from megatron-core's own
model on the meta device, the slices from the one table in `hf.mapping`. Every value is checked to
be finite, and nothing is visible before all is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.checkpoint.convert.model import meta_entries, read_entry
from megatron_vopd.checkpoint.sharded import (
    HF_DIR,
    CheckpointReader,
    Entry,
    ShardedTensor,
    ShardFile,
    Written,
    complete,
    is_same_place,
    is_saved_here,
    with_values,
)
from megatron_vopd.checkpoint.staging import (
    PhaseProgress,
    Summary,
    begin_staging,
    no_progress,
    publish_staging,
)
from megatron_vopd.collectives import all_ranks, from_all_ranks, rank_0
from megatron_vopd.files.atomic_folder import Staging
from megatron_vopd.hf.facts import ModelError
from megatron_vopd.hf.mapping import Piece, ShardPlan, shard_parameters
from megatron_vopd.hf.source import (
    ModelSource,
    carried_content,
    read_source,
    require_finite,
    require_same_bits,
)
from megatron_vopd.hf.tensors import SafetensorsFolder, dtype_name
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.weights import fill_parameter


@torch.no_grad()
def hf_to_megatron(
    hf_dir: Path,
    out_dir: Path,
    groups: Groups,
    dtype: str | None = None,
    verify: bool = False,
    progress: PhaseProgress = no_progress,
) -> Summary:
    """Write `out_dir`, a checkpoint that any layout can load. Every rank of the world calls this.

    Args:
        groups: the layout in which it is written: each rank reads and writes its own shards.
        dtype: "float32" or "bfloat16"; None keeps the stored type.
        verify: read everything back and compare bit by bit before the folder becomes visible.

    Raises:
        UserError: one line; no folder is left.
    """
    source = all_ranks(read_source, hf_dir, dtype)
    local = all_ranks(meta_entries, source.hf_config, source.facts, groups, source.dtype)
    own = {name: entry for name, entry in local.items() if is_saved_here(entry)}
    plans = shard_parameters(source.facts, groups.layout, groups.coordinates, "local")
    sizes = {name: _num_bytes(plans[name], source.dtype) for name in own}
    total = sum(from_all_ranks(sum, sizes.values()))
    with ExitStack() as stack:
        staging = begin_staging(stack, out_dir, hf_dir, total)
        advance = progress("writing", sum(sizes.values()))
        written = from_all_ranks(_write_shards, staging, source, own, plans, advance)
        chunks = [chunk for part in written for chunk in part]
        rank_0(_finish_checkpoint, staging, source, dtype, chunks)
        if verify:
            advance = progress("verifying", sum(sizes.values()))
            all_ranks(_verify_shards, staging.path, source, own, plans, advance)
        info = {"kind": "megatron checkpoint", "topology": asdict(groups.layout)}
        num_files = publish_staging(staging, out_dir, info)
    name = dtype_name(source.dtype)
    return Summary(out_dir, len({chunk[0] for chunk in chunks}), total, num_files, name)


def _num_bytes(plan: ShardPlan, dtype: torch.dtype) -> int:
    return torch.Size(plan.shape).numel() * dtype.itemsize


def _write_shards(
    staging: Staging,
    source: ModelSource,
    own: dict[str, Entry],
    plans: dict[str, ShardPlan],
    advance: Callable[[int], None],
) -> list[Written]:
    with SafetensorsFolder(source.folder) as folder, ShardFile(staging, dist.get_rank()) as file:
        for name, entry in own.items():
            for shard in _read_shards(entry, plans[name], source, folder):
                file.add(shard)
            advance(_num_bytes(plans[name], source.dtype))
        return file.written


def _read_shards(
    entry: Entry, plan: ShardPlan, source: ModelSource, folder: SafetensorsFolder
) -> Iterator[ShardedTensor]:
    """Yield the shards of one parameter with values: the HF file itself where it has them so."""
    like = torch.empty(plan.shape, dtype=source.dtype, device="meta")
    shards = with_values(entry, like)
    pieces = [_piece_at(shard, plan, like) for shard in shards]
    if None in pieces:
        yield from with_values(entry, _read_parameter(plan, source, folder))
        return
    for shard, piece in zip(shards, pieces, strict=True):
        assert piece is not None
        values = folder.slices(piece.name)[piece.source].to(source.dtype)
        require_finite(values, f"{folder.path_of(piece.name)}: {piece.name}")
        yield replace(shard, data=values)


def _piece_at(shard: ShardedTensor, plan: ShardPlan, like: Tensor) -> Piece | None:
    """Return the piece that alone fills a shard of the parameter; None without one."""
    fits = (piece for piece in plan.pieces if is_same_place(shard.data, like[piece.target]))
    return next(fits, None)


def _read_parameter(plan: ShardPlan, source: ModelSource, folder: SafetensorsFolder) -> Tensor:
    """Read one local parameter from its HF slices; refuse one that is not finite."""
    values = torch.empty(plan.shape, dtype=source.dtype)
    fill_parameter(values, plan, folder)
    try:
        require_finite(values, "")
    except ModelError:
        for piece in plan.pieces:
            require_finite(values[piece.target], f"{folder.path_of(piece.name)}: {piece.name}")
        raise
    return values


def _finish_checkpoint(
    staging: Staging, source: ModelSource, dtype: str | None, chunks: list[Written]
) -> None:
    for name in source.carried:
        staging.write(f"{HF_DIR}/{name}", carried_content(source, name, dtype))
    state = {"model": asdict(source.facts), "dtype": dtype_name(source.dtype), "step": 0}
    complete(staging, chunks, state)


def _verify_shards(
    folder: Path,
    source: ModelSource,
    own: dict[str, Entry],
    plans: dict[str, ShardPlan],
    advance: Callable[[int], None],
) -> None:
    with SafetensorsFolder(source.folder) as tensors, CheckpointReader(folder) as reader:
        for name, entry in own.items():
            expected = _read_parameter(plans[name], source, tensors)
            require_same_bits(expected, read_entry(entry, reader, expected), f"{folder}: {name}")
            advance(expected.nbytes)
