"""Shares of a tensor: what each data-parallel rank writes and reads of it.

The distributed optimizer gives each rank a contiguous slice of the flattened parameter. A slice of
rows of a matrix is a few rectangles: the end of one row, whole rows, the beginning of one. Chunks
of a checkpoint are rectangles that tile a tensor, so a rank can write its own slice, and read it
again in another cut, with nothing sent between ranks. Tensors that replicas hold whole are cut in
the same way: all of them in a row, in as many equal slices as there are replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_vopd.checkpoint.sharded import Entry, is_saved_here, with_values
from megatron_vopd.collectives import anywhere_in_group
from megatron_vopd.megatron.student import Student

# Start and stop in a flattened tensor.
Span = tuple[int, int]


def rectangles(
    shape: tuple[int, ...], start: int, stop: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (offsets, sizes) that hold entries start .. stop - 1 of a row-major tensor, in order.

    At most two for each dimension and one more.
    """
    if start >= stop:
        return []
    if len(shape) < 2:
        return [((start,), (stop - start,))] if shape else [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        return _in_row(shape, last, start, stop)
    middle = ((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    return [
        *_in_row(shape, first - 1, start, first * row),
        *([middle] if last > first else []),
        *_in_row(shape, last, last * row, stop),
    ]


def _in_row(
    shape: tuple[int, ...], at: int, start: int, stop: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the rectangles of entries start .. stop - 1, which lie in row `at`."""
    begin = at * math.prod(shape[1:])
    inner = rectangles(shape[1:], start - begin, stop - begin)
    return [((at, *offsets), (1, *sizes)) for offsets, sizes in inner]


def slice_shards(entry: Entry, span: Span, values: Tensor) -> Iterator[ShardedTensor]:
    """Yield the parts of an entry that lie in a slice of its flattened local tensor.

    Args:
        entry: the place of the local tensor.
        span: start and stop of the slice in the flattened local tensor.
        values: the slice, [stop - start], in one piece. Parts are views of it.
    """
    assert entry.data is not None
    like = torch.empty(entry.data.shape, dtype=values.dtype, device="meta")
    for shard in with_values(entry, like):
        assert shard.data is not None and shard.data.is_contiguous(), shard.key
        begin, shape = int(shard.data.storage_offset()), tuple(shard.local_shape)
        low, high = max(span[0], begin), min(span[1], begin + shard.data.numel())
        at, axes = low - span[0], shard.prepend_axis_num
        for offsets, sizes in rectangles(shape, low - begin, high - begin):
            size = math.prod(sizes)
            own = zip(shard.global_offset[axes:], offsets, strict=True)
            place = (*shard.global_offset[:axes], *(whole + part for whole, part in own))
            yield replace(
                shard,
                data=values[at : at + size].view(sizes),
                local_shape=sizes,
                global_offset=place,
                axis_fragmentations=None,
            )
            at += size


def equal_spans(sizes: Mapping[str, int], position: int, count: int) -> dict[str, Span]:
    """Cut tensors that lie in a row into `count` equal slices; return slice number `position`.

    Args:
        sizes: entries of each flattened tensor, in an order that is the same on all ranks.

    Returns:
        What the slice holds of each tensor; start == stop: nothing.
    """
    total = sum(sizes.values())
    low, high = (total * end // count for end in (position, position + 1))
    spans, begin = {}, 0
    for name, size in sizes.items():
        spans[name] = (min(max(low - begin, 0), size), min(max(high - begin, 0), size))
        begin += size
    return spans


def saved_spans(student: Student, model_entries: Mapping[str, Entry]) -> dict[str, Span]:
    """Return what this rank writes of tensors that its replicas hold whole, by parameter name.

    Parameters that are missing in the result are saved by other ranks: by other tensor-parallel
    ranks that hold the same, or by the first stage, which has a tied head too. One all-reduce of a
    byte for each parameter in the data-parallel group of the dense parameters, and one in that of
    the experts.

    Args:
        model_entries: the places of this rank's parameters, by name.
    """
    parameters = dict[str, Tensor](student.bare.named_parameters())
    assert model_entries.keys() <= parameters.keys(), model_entries.keys() - parameters.keys()
    groups = student.groups.process_groups
    spans: dict[str, Span] = {}
    for is_dense, group in ((True, groups.dp_cp), (False, groups.expt_dp)):
        own = [n for n, p in parameters.items() if getattr(p, "allreduce", True) == is_dense]
        flags = [is_saved_here(model_entries[name]) for name in own]
        saved = anywhere_in_group(flags, group, student.options.device)
        sizes = {n: parameters[n].numel() for n, here in zip(own, saved, strict=True) if here}
        spans |= equal_spans(sizes, dist.get_rank(group), group.size())
    return spans
