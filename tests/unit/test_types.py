"""Places in a layout, by enumeration."""

from __future__ import annotations

import pytest

from megatron_vopd.types import Layout

LAYOUTS = [
    Layout(1),
    Layout(4, tp=2),
    Layout(8, tp=2, pp=2),
    Layout(8, tp=2, cp=2),
    Layout(16, tp=2, pp=2, cp=2),
    Layout(8, pp=2, ep=4),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_is_found_at_its_place(layout: Layout) -> None:
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank_at(at.tp, at.cp, at.dp, at.pp) == rank


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_replica_has_one_leader(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [at.dp for at in places if at.is_leader] == list(range(layout.dp))
