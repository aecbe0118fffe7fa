"""Which steps the guard refuses, and when it ends a run."""

from __future__ import annotations

import json
import math

import pytest

from megatron_vopd.errors import SkipLimitError
from megatron_vopd.trainer.guard import MIN_HISTORY, StepGuard


def _warm(guard: StepGuard, norms: tuple[float, ...] = (1.0, 2.0, 3.0, 2.0)) -> StepGuard:
    for norm in norms:
        guard.accept(norm)
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_refused_from_the_first_step(value: float) -> None:
    assert "loss" in StepGuard().skip_reason(value, 1.0)
    assert "gradient norm" in StepGuard().skip_reason(1.0, value)


def test_spikes_are_measured_against_the_median() -> None:
    guard = _warm(StepGuard(spike_factor=10))
    assert guard.skip_reason(0.0, 20.0) == ""
    assert "above 10 x the running median 2" in guard.skip_reason(0.0, 20.1)
    few = _warm(StepGuard(spike_factor=10), (1.0,) * (MIN_HISTORY - 1))
    assert few.skip_reason(0.0, 1e6) == ""


def test_skips_in_a_row_end_the_run_and_an_update_forgives() -> None:
    guard = StepGuard(max_consecutive_skips=2)
    guard.skip(3, "first")
    guard.accept(1.0)
    guard.skip(5, "second")
    with pytest.raises(SkipLimitError, match=r"step 6: 2 steps in a row .* third; look at"):
        guard.skip(6, "third")


def test_state_survives_json() -> None:
    guard = _warm(StepGuard(max_consecutive_skips=2))
    guard.skip(4, "once")
    restored = StepGuard(max_consecutive_skips=2)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert restored.skip_reason(0.0, 20.1) and not restored.skip_reason(0.0, 20.0)
    with pytest.raises(SkipLimitError):
        restored.skip(5, "twice")
