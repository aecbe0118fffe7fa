"""The harness itself: results in rank order, failures with their cause, nothing left hanging."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.support import harness
from tests.support.harness import spawn


def _total() -> tuple[int, float]:
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()


def _sleep_on_one() -> None:
    time.sleep(60 * dist.get_rank())


def test_results_come_in_rank_order() -> None:
    assert spawn(_total, 3) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def test_one_failing_rank_ends_all_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match="the cause"):
        spawn(_fail_on_one, 2)
    assert time.monotonic() - start < 60


def test_a_world_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "WORLD_SECONDS", 3)
    with pytest.raises(TimeoutError, match="2 ranks"):
        spawn(_sleep_on_one, 2)
