"""Slices of flattened tensors as rectangles, and rows of tensors cut in equal slices."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vopd.checkpoint.shares import equal_spans, rectangles, slice_shards

SHAPES = [(), (1,), (7,), (1, 5), (5, 1), (4, 3), (3, 4, 2), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectangles_are_the_slice_in_order(shape: tuple[int, ...]) -> None:
    """Every slice of every shape: its entries, each once, in the order in which they lie."""
    values = torch.arange(math.prod(shape)).view(shape)
    for start in range(values.numel() + 1):
        for stop in range(start, values.numel() + 1):
            found = rectangles(shape, start, stop)
            parts = [
                values[tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))]
                for offsets, sizes in found
            ]
            joined = (
                torch.cat([part.reshape(-1) for part in parts]) if parts else values.new_empty(0)
            )
            assert joined.tolist() == list(range(start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            assert all(math.prod(sizes) for _, sizes in found)


def test_whole_rows_stay_one_rectangle() -> None:
    """A slice that begins and ends with a row is one chunk, however many rows it has."""
    assert rectangles((1000, 64), 128, 64_000) == [((2, 0), (998, 64))]


def _halves(key: str, values: torch.Tensor, *_: Any) -> Any:
    """Place the halves of a layer's tensor at a quarter and at three quarters of row 3 of 8."""
    return [
        ShardedTensor.from_rank_offsets(key, part, (0, 3, 8), (1, at, 4), prepend_axis_num=1)
        for at, part in zip((1, 3), values.chunk(2), strict=True)
    ]


def test_slices_of_a_tensor_of_two_parts_tile_both() -> None:
    """A gated MLP's halves lie in two places; slices over their border are cut there."""
    local = torch.arange(60.0).view(10, 6)
    merge: Any = None
    entry = ShardedTensorFactory("w", local, _halves, merge)
    whole = torch.full((8, 20, 6), -1.0)
    for start, stop in ((0, 1), (1, 17), (17, 17), (17, 44), (44, 60)):
        for part in slice_shards(entry, (start, stop), local.view(-1)[start:stop]):
            assert part.data is not None and part.data.shape == part.local_shape
            sizes = (1, *part.local_shape)
            ends = zip(part.global_offset, sizes, strict=True)
            place = whole[tuple(slice(at, at + n) for at, n in ends)]
            assert (place == -1).all()
            place.copy_(part.data.view(sizes))
    assert torch.equal(whole[3, 5:10], local[:5]) and torch.equal(whole[3, 15:20], local[5:])
    assert (whole != -1).sum() == 60


def test_equal_spans_tile_all_tensors_and_none_has_more() -> None:
    """One tensor that is most of the state is cut between ranks; no rank has one entry too many."""
    draw = random.Random(0)
    for count in (1, 2, 4, 7, 64):
        sizes = {"embedding": 10_007} | {f"w{i}": draw.randrange(300) for i in range(9)}
        total, ends = sum(sizes.values()), dict.fromkeys(sizes, 0)
        for position in range(count):
            spans = equal_spans(sizes, position, count)
            assert sum(stop - start for start, stop in spans.values()) <= total / count + 1
            for name, (start, stop) in spans.items():
                if stop > start:
                    assert start == ends[name]
                    ends[name] = stop
        assert ends == sizes
