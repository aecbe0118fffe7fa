"""No rank waits for ever: every rank of a run is lived alone, then all are replayed together.

gloo lets ranks pass that NCCL would hold for ever, and no machine here has 64 GPUs. So each rank's
whole life runs in a recorded world (`lives`), and `collective_order` replays all ranks under rules
that are stricter than any backend's.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.collective_order import problems
from tests.support.forked import run_forked
from tests.support.life_cases import HARDER, MODELS, example
from tests.support.lives import Example, live
from tests.support.recorded_world import Event

CASES = (*HARDER, *(example(name, 8, rows=2) for name in list(MODELS)[:2]))
SCALED = (*(example(name, 64) for name in MODELS),)
LARGE = (*(example(name, 1024) for name in MODELS),)


def _lives(case: Example, folder: Path, seconds: float = 300.0) -> list[list[Event]]:
    for model in {case.student_model, case.teacher_model}:
        model.save(folder)
    calls = [(case, folder, rank) for rank in range(case.student.world_size)]
    return run_forked(live, calls, seconds)


def _kinds(records: list[list[Event]]) -> Counter[str]:
    kinds = (one[2] if one[0] == "all" else one[0] for record in records for one in record)
    return Counter(kind.partition(" from ")[0] for kind in kinds)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_ends(case: Example, tmp_path: Path) -> None:
    records = _lives(case, tmp_path)
    assert not problems(records)
    # What makes a case hard is really in it.
    kinds = _kinds(records)
    assert kinds["gather objects"] and kinds["allreduce"] and kinds["allgather"]
    assert bool(kinds["split"]) == ("moe" in case.teacher_model.model_type)
    assert kinds["batch"] and kinds["reduce_scatter"]


@pytest.mark.parametrize("case", SCALED[2:], ids=str)
def test_every_rank_of_64_ends(case: Example, tmp_path: Path) -> None:
    assert not problems(_lives(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", SCALED[:2], ids=str)
def test_every_rank_of_scaled_examples_ends(case: Example, tmp_path: Path) -> None:
    assert not problems(_lives(case, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_every_rank_of_1024_ends(case: Example, tmp_path: Path) -> None:
    assert not problems(_lives(case, tmp_path, 3600.0))


GROUPS: tuple[Event, ...] = (("group", "pair", (0, 1)),)
SUM, GATHER = ("all", "pair", "allreduce", ()), ("all", "world", "allgather", ())


def _batch(*operations: tuple[str, int]) -> Event:
    return ("batch", tuple(("world", way, peer, ("float32", 4)) for way, peer in operations))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((SUM, GATHER), (GATHER, SUM)),
        ((SUM,), (SUM, SUM)),
        ((SUM,), (("all", "pair", "broadcast from 0", ()),)),
        ((_batch(("send", 1)), _batch(("recv", 1))), (_batch(("send", 0)), _batch(("recv", 0)))),
        ((_batch(("send", 1)), SUM), (SUM, _batch(("recv", 0)))),
        ((("split", "pair", (1, 2), (1, 3)),), (("split", "pair", (4, 1), (2, 1)),)),
        ((_batch(("send", 1)),), (("batch", (("world", "recv", 0, ("float32", 5)),)),)),
    ],
    ids=["crossed", "one more", "another", "both send first", "before", "split", "size"],
)
def test_what_would_hang_is_found(first: tuple[Event, ...], second: tuple[Event, ...]) -> None:
    assert problems([[*GROUPS, *first], [*GROUPS, *second]])


def test_what_would_not_hang_is_let_through() -> None:
    one, other = _batch(("send", 1), ("recv", 1)), _batch(("recv", 0), ("send", 0))
    split = ("split", "pair", (1, 2), (1, 3)), ("split", "pair", (3, 1), (2, 1))
    first, second = (SUM, one, GATHER, split[0]), (SUM, other, GATHER, split[1])
    assert not problems([[*GROUPS, *first], [*GROUPS, *second]])


def test_an_order_broken_in_a_real_life_is_found(tmp_path: Path) -> None:
    """Two neighbouring collectives, one of the world and one of a part of it, swapped on a rank."""
    records = _lives(HARDER[1], tmp_path)
    assert not problems(records)
    own = records[1]
    alone = {name for kind, name, *members in own if kind == "group" and len(members[0]) == 1}
    found = 0
    for at, (one, other) in enumerate(pairwise(own)):
        is_pair = one[0] == other[0] == "all" and one[1] != other[1]
        if is_pair and not {one[1], other[1]} & alone and "0" in (one[1], other[1]):
            swapped = [*own[:at], other, one, *own[at + 2 :]]
            found += 1
            assert problems([records[0], swapped, *records[2:]]), (at, one, other)
    assert found > 5
