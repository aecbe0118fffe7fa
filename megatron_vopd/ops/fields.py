# ruff: noqa: N815  (field names carry shapes, like every name here)
"""Names of the numbers that the kernels exchange, and the frozen data that users see.

Three layouts, all fp64 and all per token:

* TUPLE: what one shard contributes; the sums of csrc/distill_stats.h against the references m, n.
* FINAL: what the merged tuple becomes.
* TOPK: what the merged top-k list becomes (see `ops.topk`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TUPLE = ("m", "n", "S", "N", "U", "D", "F", "C", "Q", "E", "G", "x_a", "y_a")
FINAL = (
    "student_lse",
    "teacher_lse",
    "student_logprob",
    "teacher_logprob",
    "reverse_kl",
    "forward_kl",
    "entropy",
    "teacher_entropy",
    "reward_variance",
    "optimal_baseline",
)
TOPK = (
    "student_lse",
    "teacher_lse",
    "reverse_kl",
    "tail_reverse_kl",
    "student_mass",
    "teacher_mass",
)
COEFFICIENTS = ("policy", "reverse", "forward", "entropy", "topk")

# The reference point of an empty shard. Finite, so that differences of references stay numbers.
EMPTY_REFERENCE = -1e30
# Below this value of 1 - sum(p^2), the optimal baseline is numerically void and -RKL is used.
OPTIMAL_FLOOR_FP32 = 1e-4
OPTIMAL_FLOOR_FP64 = 1e-6


@dataclass(frozen=True)
class DistillStats:
    """Per-token statistics of one call or chunk: each [T] fp32 (or fp64), equal on every rank.

    `tokens` is the place of these rows among the rows of the call (a chunk sees a part), so that a
    coefficients function can slice further per-token data, such as the rollout's log-probs.
    The four topk_* are None when no top-k was asked for. In nats (variance: nats squared; masses:
    probabilities), at the temperature of the call.
    """

    student_logprob_T: Tensor
    teacher_logprob_T: Tensor
    reverse_kl_T: Tensor
    forward_kl_T: Tensor
    entropy_T: Tensor
    teacher_entropy_T: Tensor
    reward_variance_T: Tensor
    optimal_baseline_T: Tensor
    topk_reverse_kl_T: Tensor | None
    topk_tail_reverse_kl_T: Tensor | None
    topk_student_mass_T: Tensor | None
    topk_teacher_mass_T: Tensor | None
    tokens: slice


@dataclass(frozen=True)
class Coefficients:
    """Weights of the per-token loss, each [T]; detached, and functions of one token only.

    The loss of a token (docs/how/method.md, section 2) is

        -policy * log p(a) + reverse * RKL + forward * FKL + entropy * H(p) + topk * topk_RKL,

    with RKL = KL(p || q), FKL = KL(q || p) and the reverse KL renormalised on the top-k set.
    """

    policy: Tensor
    reverse: Tensor
    forward: Tensor
    entropy: Tensor
    topk: Tensor
