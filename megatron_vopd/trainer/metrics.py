"""The metrics of a step: sums over tokens, added over ranks by one all-reduce; means and ratios.

Each microbatch gives fp64 sums (`token_sums`), which add up over microbatches (`add_sums`). One
all-reduce over the world then adds the sums of the ranks on the student's last stage with tp rank
0, so that no token counts twice; the others give zeros. The vector has a fixed layout, SUMS: no
rank has to know what another one measured. Every rank ends with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.objectives import Objective, importance_ratio, mismatch_terms, reward
from megatron_vopd.ops.fields import DistillStats
from megatron_vopd.types import Rollout

# Key of a token count -> the sums over those tokens. A group without tokens gives no metrics.
GROUPS: dict[str, tuple[str, ...]] = {
    "num_loss_tokens": ("loss/mean",),
    "num_tokens": ("entropy/student",),
    "num_scored": ("kl/reverse", "kl/forward", "entropy/teacher", "reward", "reward_squared"),
    "num_sampled": ("advantage", "advantage_squared", "sampled_reward", "sampled_reward_squared"),
    "num_topk": ("topk/student_mass", "topk/teacher_mass", "kl/topk_baseline_gap"),
    "num_rollout": ("mismatch/ratio_mean", "mismatch/kl"),
    "num_weighted": (
        "mismatch/clipped_frac",
        "mismatch/baseline_residual",
        "mismatch/weighted_advantage",
    ),
}
SUMS = tuple(key for count, keys in GROUPS.items() for key in (count, *keys))


def token_sums(
    objective: Objective, stats: DistillStats, rollout_logprob_T: Tensor | None
) -> dict[str, Tensor]:
    """Return sums over the tokens of `stats`, 0-d fp64 on their device; zeros without tokens.

    Args:
        objective: its traits select GROUPS: `num_sampled` and `num_weighted` need an advantage,
            `num_scored` and `num_topk` a teacher.
        stats: statistics of the tokens.
        rollout_logprob_T: [T] log mu(a); NaN where no engine sampled the token, which then does not
            count in `mismatch/*`. None: no token was sampled by an engine.
    """
    terms: dict[str, Tensor] = {"entropy/student": stats.entropy_T}
    groups = ["num_tokens"]
    if objective.row.needs_teacher:
        terms |= _scored_terms(stats)
        groups.append("num_scored")
        if stats.topk_reverse_kl_T is not None:
            terms |= _topk_terms(stats)
            groups.append("num_topk")
    if objective.row.has_advantage:
        terms |= _advantage_terms(objective, stats)
        groups.append("num_sampled")
    sums = {key: term.detach().double().sum() for key, term in terms.items()}
    count = torch.full_like(sums["entropy/student"], len(stats.entropy_T))
    sums |= dict.fromkeys(groups, count)
    if rollout_logprob_T is not None:
        sums |= _mismatch_sums(objective, stats, rollout_logprob_T)
    return sums


def _scored_terms(stats: DistillStats) -> dict[str, Tensor]:
    reward_T = reward(stats).double()
    return {
        "kl/reverse": stats.reverse_kl_T,
        "kl/forward": stats.forward_kl_T,
        "entropy/teacher": stats.teacher_entropy_T,
        "reward": reward_T,
        "reward_squared": reward_T**2,
    }


def _topk_terms(stats: DistillStats) -> dict[str, Tensor]:
    baseline, student_mass = stats.topk_reverse_kl_T, stats.topk_student_mass_T
    teacher_mass = stats.topk_teacher_mass_T
    assert baseline is not None and student_mass is not None and teacher_mass is not None
    return {
        "topk/student_mass": student_mass,
        "topk/teacher_mass": teacher_mass,
        "kl/topk_baseline_gap": (baseline.double() - stats.reverse_kl_T.double()) ** 2,
    }


def _advantage_terms(objective: Objective, stats: DistillStats) -> dict[str, Tensor]:
    advantage_T = objective.row.coefficients(stats, objective.settings).policy.double()
    reward_T = reward(stats).double()
    return {
        "advantage": advantage_T,
        "advantage_squared": advantage_T**2,
        "sampled_reward": reward_T,
        "sampled_reward_squared": reward_T**2,
    }


def _mismatch_sums(
    objective: Objective, stats: DistillStats, rollout_logprob_T: Tensor
) -> dict[str, Tensor]:
    """Return sums over the tokens that an engine sampled; `num_weighted` needs an advantage."""
    known = ~rollout_logprob_T.isnan()
    if objective.row.has_advantage:
        terms = mismatch_terms(stats, objective.settings, rollout_logprob_T)
        groups = ["num_rollout", "num_weighted"]
    else:
        ratio = importance_ratio(stats, rollout_logprob_T)
        terms = {"mismatch/ratio_mean": ratio, "mismatch/kl": ratio - 1 - ratio.log()}
        groups = ["num_rollout"]
    # Not `term[known]`: on a GPU the host would wait for the number of known tokens.
    sums = {
        key: torch.where(known, term.detach().double(), 0.0).sum() for key, term in terms.items()
    }
    return sums | dict.fromkeys(groups, known.double().sum())


def add_sums(total: dict[str, Tensor], part: Mapping[str, Tensor]) -> None:
    """Add the sums of one more microbatch or chunk to `total`, in place."""
    for key, value in part.items():
        total[key] = total[key] + value if key in total else value


def reduce_sums(sums: Mapping[str, Tensor], contributes: bool) -> dict[str, float]:
    """Return the step's metrics, the same on every rank; all ranks of the world call it.

    One all-reduce of len(SUMS) fp64 numbers crosses the wire.

    Args:
        sums: sums over this rank's microbatches, 0-d. The caller may add `loss/mean`, the loss
            summed over the same tokens.
        contributes: True on the student's last stage with tp rank 0, on every cp rank; the values
            of `sums` are not read elsewhere.

    Raises:
        ValueError: a key that is not one of SUMS.
    """
    unknown = set(sums) - set(SUMS)
    if unknown:
        raise ValueError(f"sums: expected keys of metrics.SUMS, got {sorted(unknown)}")
    values = torch.zeros(len(SUMS), dtype=torch.float64)
    present = [key for key in SUMS if key in sums]
    if contributes and present:
        places = [SUMS.index(key) for key in present]
        values[places] = torch.stack([sums[key].detach().double() for key in present]).cpu()
        if "loss/mean" in sums:
            values[SUMS.index("num_loss_tokens")] = values[SUMS.index("num_tokens")]
    if dist.get_backend() == "nccl":
        values = values.cuda()
    dist.all_reduce(values)
    return derived(dict(zip(SUMS, values.tolist(), strict=True)))


def derived(sums: Mapping[str, float]) -> dict[str, float]:
    """Return means, deviations and ratios of the world's sums (docs/how/method.md section 8)."""
    means: dict[str, float] = {}
    for count, keys in GROUPS.items():
        if sums.get(count, 0) > 0:
            means |= {key: sums.get(key, 0.0) / sums[count] for key in keys}
    result = {key: value for key, value in means.items() if "/" in key}
    result["loss/num_tokens"] = sums.get("num_tokens", 0.0)
    if "reward" in means:
        result["reward/mean"] = means["reward"]
        result["reward/std"] = _std(means, "reward")
    if "advantage" in means:
        result["advantage/mean"] = means["advantage"]
        result["advantage/std"] = _std(means, "advantage")
        rewards = _std(means, "sampled_reward") ** 2
        result["variance/advantage_over_reward"] = _ratio(_std(means, "advantage") ** 2, rewards)
    weighted = result.pop("mismatch/weighted_advantage", None)
    if weighted is not None:
        residual = result["mismatch/baseline_residual"]
        result["mismatch/baseline_residual_relative"] = _ratio(residual, weighted)
    return result


def _std(means: Mapping[str, float], name: str) -> float:
    """Return sqrt(E[x^2] - E[x]^2); NaN if a value was NaN."""
    variance = means[f"{name}_squared"] - means[name] ** 2
    return math.sqrt(variance) if variance > 0 else abs(0.0 * variance)


def _ratio(value: float, scale: float) -> float:
    """Return value / scale; NaN for a scale of 0."""
    return value / scale if scale else math.nan


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return `rollout/*` of a step's responses: lengths in tokens, shares by how they ended."""
    if not rollouts:
        return {}
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    num_ended = sum(rollout.finish_reason == "stop" for rollout in rollouts)
    return {
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated_frac": 1 - num_ended / len(rollouts),
        "rollout/eos_frac": num_ended / len(rollouts),
    }
