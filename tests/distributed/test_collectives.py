"""Ranks that wait for the work of others: as long as those show that they are alive."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vopd import collectives
from megatron_vopd.collectives import some_ranks, tensor_of_rank_0
from megatron_vopd.errors import UserError
from tests.support.harness import spawn

# A rank that waits for signs of life enters between the two, one that has them after both.
WORK_SECONDS, HALF_SECONDS, SILENT_SECONDS = 3.0, 1.8, 0.4


def _waits(alive_seconds: float) -> tuple[str | None, float, float]:
    """Let rank 0 work; return its result here, and when a rank enters the collective and ends."""
    gather, entered = dist.all_gather_object, [0.0]

    def noted(*args: Any) -> None:
        entered[0] = time.monotonic()
        gather(*args)

    def work(text: str) -> str:
        time.sleep(WORK_SECONDS)
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "ALIVE_SECONDS", alive_seconds)
        patch.setattr(collectives, "SILENT_SECONDS", SILENT_SECONDS)
        patch.setattr(dist, "all_gather_object", noted)
        dist.barrier()
        begun = time.monotonic()
        result = some_ranks(work if dist.get_rank() == 0 else None, "done")
        return result, entered[0] - begun, time.monotonic() - begun


def test_a_collective_is_entered_when_the_work_is_done() -> None:
    """A download of hours does not run out the deadline of those who wait for it."""
    results, entered, ended = zip(*spawn(_waits, 3, 0.1), strict=True)
    assert results == ("done", None, None)
    assert min(entered) > HALF_SECONDS and max(ended) < WORK_SECONDS + 10


def test_a_worker_that_shows_no_sign_of_life_is_not_waited_for() -> None:
    """The deadline of the collective then decides, as for every other wait."""
    results, entered, ended = zip(*spawn(_waits, 3, 60.0), strict=True)
    assert results == ("done", None, None)
    assert max(entered[1:]) < HALF_SECONDS < min(ended)


def _failed() -> str:
    def work() -> None:
        raise UserError("a: got b, expected c; do d")

    with pytest.raises(UserError) as caught:
        some_ranks(work if dist.get_rank() == 1 else None)
    return str(caught.value)


def test_a_failure_of_the_worker_is_raised_everywhere() -> None:
    assert spawn(_failed, 3) == ["a: got b, expected c; do d"] * 3


def _tensors() -> list[list[int]]:
    first = dist.get_rank() == 0
    return [
        tensor_of_rank_0(torch.tensor(own, dtype=dtype) if first else None, dtype, "cpu").tolist()
        for own, dtype in (([3, -(2**31)], torch.int32), ([], torch.uint8), ([255], torch.uint8))
    ]


def test_every_rank_gets_the_tensors_of_rank_0() -> None:
    assert spawn(_tensors, 3) == [[[3, -(2**31)], [], [255]]] * 3
