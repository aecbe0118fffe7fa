"""Metrics of a step: sums against means over the same tokens, ratios, responses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_vopd.objectives import OBJECTIVES
from megatron_vopd.ops.fields import DistillStats
from megatron_vopd.trainer.metrics import (
    GROUPS,
    SUMS,
    add_sums,
    derived,
    rollout_metrics,
    token_sums,
)
from megatron_vopd.types import FinishReason, Prompt, Rollout
from tests.support.metric_cases import metrics_of, random_stats
from tests.support.settings import objective_named


def test_every_metric_of_a_sampled_step() -> None:
    stats = random_stats(50, topk=4)
    engine = stats.student_logprob_T + 0.3 * torch.randn(50, dtype=torch.float64)
    objective = objective_named("sampled", importance="truncate", importance_cap=1.2)
    got = metrics_of(token_sums(objective, stats, engine))
    reward = stats.teacher_logprob_T - stats.student_logprob_T
    advantage = reward + stats.reverse_kl_T
    ratio = (stats.student_logprob_T - engine).exp()
    weight = ratio.clamp(max=1.2)
    off = 1 - stats.student_logprob_T.exp()
    assert stats.topk_reverse_kl_T is not None and stats.topk_student_mass_T is not None
    assert stats.topk_teacher_mass_T is not None
    residual = (2 * off * (weight - ratio).abs() * stats.reverse_kl_T).mean()
    expected = {
        "kl/reverse": stats.reverse_kl_T.mean(),
        "kl/forward": stats.forward_kl_T.mean(),
        "kl/topk_baseline_gap": ((stats.topk_reverse_kl_T - stats.reverse_kl_T) ** 2).mean(),
        "entropy/student": stats.entropy_T.mean(),
        "entropy/teacher": stats.teacher_entropy_T.mean(),
        "reward/mean": reward.mean(),
        "reward/std": reward.std(unbiased=False),
        "advantage/mean": advantage.mean(),
        "advantage/std": advantage.std(unbiased=False),
        "variance/advantage_over_reward": advantage.var() / reward.var(),
        "topk/student_mass": stats.topk_student_mass_T.mean(),
        "topk/teacher_mass": stats.topk_teacher_mass_T.mean(),
        "mismatch/ratio_mean": ratio.mean(),
        "mismatch/kl": (ratio - 1 - ratio.log()).mean(),
        "mismatch/clipped_frac": (ratio > 1.2).double().mean(),
        "mismatch/baseline_residual": residual,
        "mismatch/baseline_residual_relative": residual / (weight * advantage.abs()).mean(),
        "loss/num_tokens": 50,
    }
    assert 0 < expected["mismatch/clipped_frac"] < 1
    assert got == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-10)


@pytest.mark.parametrize("baseline", ["none", "full", "topk"])
def test_the_variance_ratio_is_that_of_the_baseline(baseline: str) -> None:
    stats = random_stats(200, topk=3)
    got = metrics_of(token_sums(objective_named("sampled", baseline=baseline), stats, None))
    ratio = got["variance/advantage_over_reward"]
    assert (ratio == pytest.approx(1)) == (baseline == "none")
    assert not [key for key in got if key.startswith("mismatch/")]


def test_a_floored_reward_is_the_advantage_that_trains() -> None:
    stats = random_stats(100)
    objective = objective_named("sampled", baseline="none", reward_floor=0.5)
    got = metrics_of(token_sums(objective, stats, None))
    assert got["advantage/mean"] > got["reward/mean"] + 0.01


@pytest.mark.parametrize(
    "name", [name for name, row in OBJECTIVES.items() if not row.has_advantage]
)
def test_what_other_objectives_report(name: str) -> None:
    stats = random_stats(20, topk=4)
    engine = stats.student_logprob_T - 0.1
    got = metrics_of(token_sums(objective_named(name), stats, engine))
    assert got["mismatch/ratio_mean"] == pytest.approx(math.exp(0.1))
    assert "advantage/mean" not in got and "mismatch/clipped_frac" not in got
    assert ("kl/reverse" in got) == ("topk/student_mass" in got) == (name != "hard")


def test_tokens_that_no_engine_sampled_do_not_count_as_mismatch() -> None:
    stats = random_stats(4)
    engine = stats.student_logprob_T + torch.tensor([0.0, 0.2, math.nan, math.nan])
    for name in ("sampled", "forward"):
        got = metrics_of(token_sums(objective_named(name), stats, engine))
        assert got["mismatch/ratio_mean"] == pytest.approx((1 + math.exp(-0.2)) / 2)
        assert got["loss/num_tokens"] == 4


@pytest.mark.parametrize("cuts", [(30,), (10, 20), (0, 30), (7, 0, 13, 10)])
def test_microbatches_do_not_matter(cuts: tuple[int, ...]) -> None:
    whole = random_stats(30, topk=4)
    engine = whole.student_logprob_T + 0.1

    def part(rows: slice) -> dict[str, Tensor]:
        fields = [getattr(whole, name) for name in DistillStats.__dataclass_fields__][:-1]
        return token_sums(
            objective_named("sampled"),
            DistillStats(*(field[rows] for field in fields), tokens=rows),
            engine[rows],
        )

    total: dict[str, Tensor] = {}
    start = 0
    for size in cuts:
        add_sums(total, part(slice(start, start + size)))
        start += size
    assert metrics_of(total) == pytest.approx(metrics_of(part(slice(0, 30))), rel=1e-12)


@pytest.mark.parametrize("name", ["sampled", "forward", "hard"])
def test_no_tokens(name: str) -> None:
    sums = token_sums(objective_named(name), random_stats(0, 2), torch.zeros(0).double())
    assert all(value.shape == () and value.dtype == torch.float64 for value in sums.values())
    assert all(value == 0 for value in sums.values()) and set(sums) <= set(SUMS)
    assert metrics_of(sums) == {"loss/num_tokens": 0}


def test_sums_are_fp64_and_far_from_the_graph() -> None:
    stats = random_stats(3)
    logprob = stats.student_logprob_T.float().requires_grad_()
    single = DistillStats(
        logprob,
        *(getattr(stats, name) for name in list(DistillStats.__dataclass_fields__)[1:-1]),
        tokens=stats.tokens,
    )
    sums = token_sums(objective_named("sampled"), single, None)
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in sums.values())


def test_extremes_stay_visible() -> None:
    """NaN is reported as NaN and never hidden; a constant reward has no ratio."""
    sums = dict.fromkeys(SUMS, 0.0)
    sums |= dict.fromkeys(GROUPS, 2.0)
    got = derived({**sums, "reward": math.nan, "reward_squared": math.nan})
    assert math.isnan(got["reward/std"]) and math.isnan(got["reward/mean"])
    assert math.isnan(got["variance/advantage_over_reward"]) and got["advantage/std"] == 0
    # Rounding makes E[x^2] - E[x]^2 slightly negative: a deviation of 0, not NaN.
    third = 1 / 3
    assert derived({**sums, "reward": 2 * third, "reward_squared": 2 * third**2 - 1e-16})[
        "reward/std"
    ] == pytest.approx(0)


def rollout(num: int, finish_reason: FinishReason) -> Rollout:
    return Rollout(Prompt("a:1", (1,)), 0, (2,) * num, None, finish_reason, 0)


def test_rollout_statistics() -> None:
    rollouts = [rollout(3, "stop"), rollout(8, "length"), rollout(1, "stop"), rollout(8, "length")]
    assert rollout_metrics(rollouts) == {
        "rollout/length_mean": 5.0,
        "rollout/length_max": 8,
        "rollout/truncated_frac": 0.5,
        "rollout/eos_frac": 0.5,
    }
    assert rollout_metrics([rollout(2, "stop")] * 3)["rollout/truncated_frac"] == 0
    assert rollout_metrics([]) == {}
