"""Objectives as pure functions from statistics to per-token coefficients; one dict line each.

Everything here is per token, detached, and knows no device, rank or file. Notation and equation
numbers: docs/how/method.md (A = arXiv 2605.07865, B = arXiv 2605.16826). The loss that the
coefficients weight is in `Coefficients`; an objective is a row of OBJECTIVES, a baseline a row of
BASELINES. Each has its word in the configuration, in config/method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_vopd.ops.fields import Coefficients, DistillStats
from megatron_vopd.types import LOSS_CHUNK, Rollout


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings of the objectives, by the names that they have in the configuration.

    Attributes:
        baseline: key of `advantages`, for objectives with an advantage.
        reverse_weight: lambda of `mixed`.
        importance, importance_cap: key of IMPORTANCE and its cap.
        entropy_gate: nats of teacher entropy above which FKL is added; None: off.
        reward_floor: lambda in (0, 1) of the floor log(lambda) / (1 - lambda); None: off.
    """

    baseline: str
    reverse_weight: float
    importance: str
    importance_cap: float
    entropy_gate: float | None
    reward_floor: float | None

    def __post_init__(self) -> None:
        for field, value, table in (
            ("baseline", self.baseline, advantages),
            ("importance", self.importance, IMPORTANCE),
        ):
            if value not in table:
                raise ValueError(f"{field}: expected one of {', '.join(table)}, got {value!r}")
        if not 0 <= self.reverse_weight <= 1:
            raise ValueError(f"reverse_weight: expected 0 to 1, got {self.reverse_weight}")
        if self.importance_cap < 1:
            raise ValueError(f"importance_cap: expected >= 1, got {self.importance_cap}")
        if self.reward_floor is not None and not 0 < self.reward_floor < 1:
            raise ValueError(f"reward_floor: expected between 0 and 1, got {self.reward_floor}")
        if self.reward_floor is not None and self.baseline != "none":
            raise ValueError(
                f"reward_floor: only with baseline 'none' (a floored reward is not centred by a "
                f"KL), got baseline {self.baseline!r}"
            )


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        name: key of OBJECTIVES.
        settings: its baseline, weights, gates.
        topk: size of the student's top-k set; 0: none.
        temperature: of both distributions; that of the rollouts.
        chunk: response tokens whose logits exist at a time.
        mode: `grad_in_forward` or `recompute` (see `linear_distill_loss`).
    """

    name: str
    settings: ObjectiveSettings
    topk: int
    temperature: float
    chunk: int = LOSS_CHUNK
    mode: Literal["grad_in_forward", "recompute"] = "grad_in_forward"

    @property
    def row(self) -> ObjectiveRow:
        """The row of OBJECTIVES; raises ValueError for an unknown name."""
        return row_of(self.name)


def reward(stats: DistillStats) -> Tensor:
    """r_t = log q(a) - log p(a), detached, full-vocabulary normalisers [T]."""
    return (stats.teacher_logprob_T - stats.student_logprob_T).detach()


def _topk(statistic: Tensor | None) -> Tensor:
    if statistic is None:
        raise ValueError("topk: a top-k objective or baseline needs topk >= 1, got 0")
    return statistic


# V(c_t), a function of the context alone; the advantage is r - V (A, Eq. 10).
BASELINES: dict[str, Callable[[DistillStats], Tensor]] = {
    "none": lambda stats: torch.zeros_like(stats.reverse_kl_T),
    "full": lambda stats: -stats.reverse_kl_T,
    "topk": lambda stats: -_topk(stats.topk_reverse_kl_T),
    "topk_tail": lambda stats: -_topk(stats.topk_tail_reverse_kl_T),
    "optimal": lambda stats: stats.optimal_baseline_T,
}


def _advantage(name: str) -> Callable[[DistillStats], Tensor]:
    return lambda stats: (reward(stats) - BASELINES[name](stats)).detach()


# Name of the baseline -> function from statistics to the detached advantage [T].
advantages = {name: _advantage(name) for name in BASELINES}


# rho -> w (docs/how/method.md section 4); N, the token count, does not change with the mask.
IMPORTANCE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda ratio, cap: torch.ones_like(ratio),
    "truncate": lambda ratio, cap: ratio.clamp(max=cap),
    "mask": lambda ratio, cap: torch.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0),
}


def importance_ratio(stats: DistillStats, rollout_logprob_T: Tensor) -> Tensor:
    """rho_t = p(a) / mu(a), mu the engine's probability when it sampled; detached [T]."""
    return (stats.student_logprob_T.detach() - rollout_logprob_T).exp()


def floored_reward(reward_T: Tensor, reward_floor: float) -> Tensor:
    """max(r, log(lambda) / (1 - lambda)) (Relaxed OPD, arXiv 2603.11137; plain OPD only)."""
    return reward_T.clamp(min=math.log(reward_floor) / (1 - reward_floor))


def mismatch_terms(
    stats: DistillStats, settings: ObjectiveSettings, rollout_logprob_T: Tensor
) -> dict[str, Tensor]:
    """Per-token terms [T] of the `mismatch/*` metrics; their means over all tokens are logged.

    `baseline_residual` bounds the bias that a weight w != rho leaves through the baseline b:
    2 (1 - p(a)) |w - rho| |b|; its scale is `weighted_advantage`, w |A|.
    """
    ratio = importance_ratio(stats, rollout_logprob_T)
    weight = IMPORTANCE[settings.importance](ratio, settings.importance_cap)
    baseline = BASELINES[settings.baseline](stats).detach()
    off_action = -torch.expm1(stats.student_logprob_T.detach())
    return {
        "mismatch/ratio_mean": ratio,
        "mismatch/kl": ratio - 1 - ratio.log(),
        "mismatch/clipped_frac": (weight != ratio).to(ratio.dtype),
        "mismatch/baseline_residual": 2 * off_action * (weight - ratio).abs() * baseline.abs(),
        "mismatch/weighted_advantage": weight * advantages[settings.baseline](stats).abs(),
    }


def _constant(stats: DistillStats, **weights: float) -> Coefficients:
    """The same coefficients for every token; those not named are 0."""
    like = stats.student_logprob_T.detach()
    names = ("policy", "reverse", "forward", "entropy", "topk")
    return Coefficients(**{name: torch.full_like(like, weights.get(name, 0.0)) for name in names})


def sampled(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """-A log p(a) (A, Eq. 10): unbiased for grad RKL with every baseline."""
    if settings.reward_floor is None:
        advantage_T = advantages[settings.baseline](stats)
    else:
        advantage_T = floored_reward(reward(stats), settings.reward_floor)
    return replace(_constant(stats), policy=advantage_T)


def reverse(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Exact RKL over the full vocabulary."""
    return _constant(stats, reverse=1.0)


def forward(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Exact FKL over the full vocabulary."""
    return _constant(stats, forward=1.0)


def mixed(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """lambda RKL + (1 - lambda) FKL (B)."""
    weight = settings.reverse_weight
    return _constant(stats, reverse=weight, forward=1 - weight)


def topk_reverse(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Renormalised RKL on the student's top-k: biased, the comparator of paper A."""
    _topk(stats.topk_reverse_kl_T)
    return _constant(stats, topk=1.0)


def hard(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """-log p(a) on given tokens: ordinary supervised fine-tuning."""
    return _constant(stats, policy=1.0)


@dataclass(frozen=True)
class ObjectiveRow:
    """A row of OBJECTIVES.

    Attributes:
        coefficients: from the statistics of tokens and the settings to their coefficients.
        needs_teacher: whether it compares with a teacher.
        has_advantage: whether `policy` is an advantage: the importance weight then multiplies it,
            the task reward is added to it, and its mean and deviation are measured.
    """

    coefficients: Callable[[DistillStats, ObjectiveSettings], Coefficients]
    needs_teacher: bool = True
    has_advantage: bool = False


OBJECTIVES = {
    "sampled": ObjectiveRow(sampled, has_advantage=True),
    "reverse": ObjectiveRow(reverse),
    "forward": ObjectiveRow(forward),
    "mixed": ObjectiveRow(mixed),
    "topk_reverse": ObjectiveRow(topk_reverse),
    "hard": ObjectiveRow(hard, needs_teacher=False),
}


def row_of(name: str) -> ObjectiveRow:
    """Return a row of OBJECTIVES; raises ValueError for an unknown name."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name]


def coefficients(
    name: str,
    stats: DistillStats,
    settings: ObjectiveSettings,
    rollout_logprob_T: Tensor | None = None,
    extra_advantage_T: Tensor | None = None,
) -> Coefficients:
    """Return the coefficients of objective `name`, with gate and importance weight applied.

    Args:
        stats: of this chunk.
        rollout_logprob_T: [T] log mu(a) of the same rows: an advantage is weighted by w(rho), its
            baseline included; None: w = 1.
        extra_advantage_T: [T] added to an advantage before the weight (task reward).

    Raises:
        ValueError: unknown name, or a top-k objective without top-k statistics.
    """
    row = row_of(name)
    result = row.coefficients(stats, settings)
    if row.has_advantage:
        policy = result.policy
        if extra_advantage_T is not None:
            policy = policy + extra_advantage_T
        if rollout_logprob_T is not None:
            ratio = importance_ratio(stats, rollout_logprob_T)
            policy = policy * IMPORTANCE[settings.importance](ratio, settings.importance_cap)
        result = replace(result, policy=policy)
    if settings.entropy_gate is not None:
        # Entropy-aware OPD (arXiv 2603.07079), with the exact FKL in place of a top-16 one.
        gate = (stats.teacher_entropy_T > settings.entropy_gate).to(result.forward.dtype)
        result = replace(result, forward=result.forward + gate)
    return result


def group_advantages(rollouts: Sequence[Rollout], grades: Sequence[float]) -> list[float]:
    """(grade - mean) / standard deviation over the samples of the same prompt; 0 where all agree.

    The deviation is the population's, so that the advantages of a group have variance one.
    """
    groups: dict[str, list[float]] = {}
    for rollout, grade in zip(rollouts, grades, strict=True):
        groups.setdefault(rollout.prompt.prompt_id, []).append(grade)
    moments = {}
    for prompt_id, values in groups.items():
        mean = sum(values) / len(values)
        moments[prompt_id] = mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    advantages = []
    for rollout, grade in zip(rollouts, grades, strict=True):
        mean, deviation = moments[rollout.prompt.prompt_id]
        advantages.append((grade - mean) / deviation if deviation > 1e-9 else 0.0)
    return advantages
