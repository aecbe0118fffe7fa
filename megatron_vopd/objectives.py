"""The objectives of papers A and B: pure functions from statistics to per-token coefficients.

A is vOPD (arXiv 2605.07865), B "Decoupling KL and Trajectories" (arXiv 2605.16826); the notation is
that of docs/how/method.md. p is the student's distribution of the next token, q the teacher's, mu
the rollout engine's, a the token of the response. Tensors are [T], one entry per response token;
logarithms, entropies and KLs in nats. Nothing here knows a device, rank or file. A token's loss is,
with detached coefficients g,

    -g_A log p(a) + g_R KL(p || q) + g_F KL(q || p) + g_H H(p) + g_K topk_RKL

An objective is a row of OBJECTIVES and a baseline a row of BASELINES; config/method holds the
settings that select them.
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
        baseline: key of BASELINES, for objectives with an advantage.
        reverse_weight: lambda of `mixed`, in [0, 1].
        importance: key of IMPORTANCE.
        importance_cap: largest weight of `truncate`; the band 1/cap to cap of `mask`; >= 1.
        entropy_gate: nats of teacher entropy above which FKL is added; None: off.
        reward_floor: lambda in (0, 1) of the floor log(lambda) / (1 - lambda), for baseline `none`
            only; None: off.

    Raises:
        ValueError: an unknown key, or a value out of range.
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
    """An objective to minimise, with what the loss operator needs to compute it.

    Attributes:
        name: key of OBJECTIVES.
        settings: baseline, weights and gates.
        topk: size of the student's top-k set; 0: no top-k statistics.
        temperature: temperature of p and q, equal to that of the rollouts.
        chunk: response tokens whose logits exist at a time.
        mode: `grad_in_forward` or `recompute`, an argument of `linear_distill_loss`.
    """

    name: str
    settings: ObjectiveSettings
    topk: int
    temperature: float
    chunk: int = LOSS_CHUNK
    mode: Literal["grad_in_forward", "recompute"] = "grad_in_forward"

    @property
    def row(self) -> ObjectiveRow:
        """The row of OBJECTIVES under `name`; raises ValueError for an unknown name."""
        return row_of(self.name)


def reward(stats: DistillStats) -> Tensor:
    """Return r_t = log q(a) - log p(a) [T], normalised over the whole vocabulary; detached."""
    return (stats.teacher_logprob_T - stats.student_logprob_T).detach()


def _require_topk(statistic: Tensor | None) -> Tensor:
    """Return a top-k statistic [T]; raises ValueError if none was computed."""
    if statistic is None:
        raise ValueError("topk: a top-k objective or baseline needs topk >= 1, got 0")
    return statistic


# V(c_t) [T] depends on the context alone, so it leaves the gradient unbiased. `full` is the exact
# value E_p[r] = -RKL (A, Eq. 9), `topk` the approximation of A; the last two are ours.
BASELINES: dict[str, Callable[[DistillStats], Tensor]] = {
    "none": lambda stats: torch.zeros_like(stats.reverse_kl_T),
    "full": lambda stats: -stats.reverse_kl_T,
    "topk": lambda stats: -_require_topk(stats.topk_reverse_kl_T),
    "topk_tail": lambda stats: -_require_topk(stats.topk_tail_reverse_kl_T),
    "optimal": lambda stats: stats.optimal_baseline_T,
}


def _advantage(name: str) -> Callable[[DistillStats], Tensor]:
    return lambda stats: (reward(stats) - BASELINES[name](stats)).detach()


# Name of the baseline -> function from statistics to the detached advantage A_t = r_t - V(c_t) [T]
# (A, Eq. 10).
advantages = {name: _advantage(name) for name in BASELINES}


# (rho, cap) -> w [T] (docs/how/method.md section 4). Masked tokens count in the token mean, too.
IMPORTANCE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda ratio, cap: torch.ones_like(ratio),
    "truncate": lambda ratio, cap: ratio.clamp(max=cap),
    "mask": lambda ratio, cap: torch.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0),
}


def importance_ratio(stats: DistillStats, rollout_logprob_T: Tensor) -> Tensor:
    """Return rho_t = p(a) / mu(a) [T], mu(a) as it was when the engine sampled; detached."""
    return (stats.student_logprob_T.detach() - rollout_logprob_T).exp()


def floored_reward(reward_T: Tensor, reward_floor: float) -> Tensor:
    """Return max(r, log(lambda) / (1 - lambda)) [T], for plain OPD only.

    This is the floor of Relaxed OPD (arXiv 2603.11137); lambda is `reward_floor`, in (0, 1).
    """
    return reward_T.clamp(min=math.log(reward_floor) / (1 - reward_floor))


def mismatch_terms(
    stats: DistillStats, settings: ObjectiveSettings, rollout_logprob_T: Tensor
) -> dict[str, Tensor]:
    """Compute the per-token terms [T] whose means over the tokens are the `mismatch/*` metrics.

    `baseline_residual` is 2 (1 - p(a)) |w - rho| |V|, which bounds the bias that a weight w != rho
    leaves through the baseline; `weighted_advantage`, w |A|, is its scale. `kl`, rho - 1 - log rho,
    estimates KL(mu || p). Tokens whose log mu(a) is NaN are the caller's to leave out.
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
    """Return coefficients [T] that are equal for all tokens; those not named are 0."""
    like = stats.student_logprob_T.detach()
    names = ("policy", "reverse", "forward", "entropy", "topk")
    return Coefficients(**{name: torch.full_like(like, weights.get(name, 0.0)) for name in names})


def sampled(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Return the coefficients of -A log p(a) (A, Eq. 10): unbiased for grad RKL, whatever the V.

    That holds for tokens sampled from p itself, and without a `reward_floor`.
    """
    if settings.reward_floor is None:
        advantage_T = advantages[settings.baseline](stats)
    else:
        advantage_T = floored_reward(reward(stats), settings.reward_floor)
    return replace(_constant(stats), policy=advantage_T)


def reverse(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Return the coefficients of the exact RKL, KL(p || q) over the whole vocabulary."""
    return _constant(stats, reverse=1.0)


def forward(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Return the coefficients of the exact FKL, KL(q || p) over the whole vocabulary."""
    return _constant(stats, forward=1.0)


def mixed(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Return the coefficients of lambda RKL + (1 - lambda) FKL, lambda = `reverse_weight` (B)."""
    weight = settings.reverse_weight
    return _constant(stats, reverse=weight, forward=1 - weight)


def topk_reverse(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Return the coefficients of the RKL renormalised on p's top-k: biased, A's comparator."""
    _require_topk(stats.topk_reverse_kl_T)
    return _constant(stats, topk=1.0)


def hard(stats: DistillStats, settings: ObjectiveSettings) -> Coefficients:
    """Return the coefficients of -log p(a) on given tokens: supervised fine-tuning."""
    return _constant(stats, policy=1.0)


@dataclass(frozen=True)
class ObjectiveRow:
    """A row of OBJECTIVES.

    Attributes:
        coefficients: function from the statistics of tokens and the settings to the tokens'
            coefficients [T].
        needs_teacher: True if the objective compares with a teacher.
        has_advantage: True if `policy` is an advantage: the task reward is added to it, the
            importance weight multiplies it, and its mean and deviation are measured.
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
        name: key of OBJECTIVES.
        stats: statistics of a chunk of tokens.
        settings: baseline, weights and gates.
        rollout_logprob_T: [T] log mu(a): w(rho) multiplies the whole advantage, its baseline
            included; None: w = 1.
        extra_advantage_T: [T] task reward, added to an advantage before the weight; None: 0.

    Raises:
        ValueError: unknown name, or a top-k objective or baseline without top-k statistics.
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
    """Return (grade - mean) / standard deviation over the samples of a prompt; 0 where all agree.

    The deviation is the population's, so that the advantages of a group have variance one. Rollouts
    may be in any order; those of equal `prompt_id` make a group. One number for each rollout.
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
