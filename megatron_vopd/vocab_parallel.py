"""Distillation statistics over a vocabulary that is sharded between ranks, in one exchange.

Why one suffices. KL(p || q) needs log p and log q of every column, hence two normalisers that no
rank knows: a first exchange for the maxima, one for the sums, and then more for every further
statistic. But let each rank choose its reference points, m for the student and n for the teacher
(about its local maxima), and write x^ = x - m, y^ = y - n, d^ = x^ - y^. With

    S = sum e^x^    N = sum e^y^    D = sum e^x^ d^

the divergence of the whole row is

    RKL = sum_v p_v (x_v - y_v) - lse(x) + lse(y) = D / S - log S + log N

whatever m and n are: they cancel. A rank's sums can be moved to other references exactly,

    m -> m + a, n -> n + b:   S' = e^-a S    N' = e^-b N    D' = e^-a (D - (a - b) S)

so ranks exchange their (m, n, S, N, D, ...) once, and each moves all of them to common references
and adds. The same holds for the forward KL, both entropies, the variance of the log-ratio and the
optimal baseline: nine sums in all, listed with their rules in csrc/distill_stats.h, and the label's
two logits from the rank that owns it. The top-k of a row is the merge of the ranks' lists, which
ride in the same buffer. See docs/how/one_collective.md for the derivation and a worked example.

What crosses the wire: one all-gather of [T + 1, 26 + 2 topk] fp32 per call (104 B per token, and
8 B per top-k entry; the extra row carries the ranks' bounds), merged in rank order, hence the same
bits on every rank. The backward of `distill_stats` exchanges nothing: its closed form uses merged
numbers only. The linear form exchanges once per chunk, and reduces the gradient at the hidden
states once per call. Before that, unless `check_ranks=False`, ranks compare their arguments by one
all-gather of 72 bytes, so that a mistake on one of them raises on all instead of hanging the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.ops import native
from megatron_vopd.ops.arguments import (
    RefusedError,
    check_impl,
    check_labels,
    check_linear,
    check_matrix,
    check_scalars,
    compare,
    require,
)
from megatron_vopd.ops.autograd import DistillStatsFunction, Problem
from megatron_vopd.ops.fields import Coefficients, DistillStats
from megatron_vopd.ops.linear import LinearDistillFunction, LinearProblem

__all__ = [
    "Coefficients",
    "DistillStats",
    "VocabShard",
    "distill_stats",
    "linear_distill_loss",
    "linear_distill_stats",
]


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, stop) of the true vocabulary on this rank of `group` (possibly of size 1).

    Shards are contiguous in rank order and cover [0, V); a shard may be empty. Tensors may have
    further (padding) columns behind the shard's: they are never read.
    """

    start: int
    stop: int
    group: dist.ProcessGroup

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(
                f"shard: expected 0 <= start <= stop, got start={self.start} stop={self.stop}"
            )
        if self.group is None:
            raise ValueError("group: expected a process group (of one rank if need be), got None")

    @property
    def num_valid(self) -> int:
        """Number of columns of the true vocabulary on this rank."""
        return self.stop - self.start


def _agree(
    shard: VocabShard, labels_T: Tensor, topk: int, check: Callable[[], None], chunk: int = 0
) -> None:
    """Run `check` and compare the arguments of all ranks: every rank raises, or none does.

    One all-gather of 9 int64 per rank: number of the refused argument (0: none), T, topk, bounds
    of the shard, range and sum of the labels, chunk.

    Raises:
        ValueError: on every rank; the message says what is wrong on the rank that refuses.
    """
    refused: RefusedError | None = None
    facts = [0] * 9
    try:
        check()
        low, high = (labels_T.min(), labels_T.max()) if len(labels_T) else (0, -1)
        facts[1:5] = [len(labels_T), topk, shard.start, shard.stop]
        facts[5:] = [int(low), int(high), int(labels_T.sum()), chunk]
    except RefusedError as error:
        refused = error
        facts[0] = error.number
    size = dist.get_world_size(shard.group)
    mine = torch.tensor(facts, device=labels_T.device)
    everyone = [mine]
    if size > 1:
        everyone = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(everyone, mine, group=shard.group)
    if refused is not None:
        raise ValueError(str(refused)) from None
    compare(torch.stack(everyone).tolist())


def _problem(
    shard: VocabShard, temperature: float, topk: int, impl: str, logits: Tensor, dtype: torch.dtype
) -> Problem:
    """Return the settings of one call; its `gather` is an all-gather over the shard's group."""
    size = dist.get_world_size(shard.group)

    def gather(bits: Tensor) -> Tensor:
        if size == 1:
            return bits[None]
        everyone = bits.new_empty(size * bits.shape[0], bits.shape[1])
        dist.all_gather_into_tensor(everyone, bits, group=shard.group)
        return everyone.view(size, *bits.shape)

    kernels = native.resolve(impl, logits.device, dtype)
    rank = dist.get_rank(shard.group)
    return Problem(shard.start, shard.stop, rank, temperature, topk, kernels, gather)


def distill_stats(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    topk: int = 0,
    impl: native.Impl = "auto",
    check_ranks: bool = True,
) -> DistillStats:
    """Return the statistics of two distributions per token, identical on every rank.

    Definitions: docs/how/method.md, notation and section 1. Every rank of `shard.group` calls it.

    Args:
        student_logits_TV, teacher_logits_TV: [T, >= shard width] on this rank, fp32 or bf16 (fp64:
            reference), of one dtype; not yet divided by the temperature.
        labels_T: [T] int64 ids of the true vocabulary, the same on every rank.
        shard: this rank's columns, and the group that exchanges.
        temperature: > 0; both distributions are taken at it.
        topk: entries of the student's top-k (ties: lower id first), 0 for none.
        impl: auto, cpu, cuda or reference; what is asked for and missing raises.
        check_ranks: compare the ranks' arguments first (and wait for the device).

    Returns:
        `DistillStats` (fp32; fp64 for fp64 logits). student_logprob_T, reverse_kl_T, forward_kl_T,
        entropy_T and topk_reverse_kl_T (set held fixed) have a gradient at this rank's student
        logits; the teacher's logits have none.

    Raises:
        ValueError: an argument is wrong on any rank; raised on every rank, naming it.
    """
    dtype = student_logits_TV.dtype

    def check() -> None:
        check_matrix(student_logits_TV, "student_logits_TV", None, shard.num_valid)
        rows = len(student_logits_TV)
        check_matrix(teacher_logits_TV, "teacher_logits_TV", rows, shard.num_valid)
        require(
            teacher_logits_TV.dtype == dtype,
            "teacher_logits_TV",
            f"expected {dtype} like the student's, got {teacher_logits_TV.dtype}",
        )
        check_labels(labels_T, rows, student_logits_TV.device)
        check_scalars(temperature, topk)
        check_impl(impl, student_logits_TV.device, dtype)

    if check_ranks:
        _agree(shard, labels_T, topk, check)
    problem = _problem(shard, temperature, topk, impl, student_logits_TV, dtype)
    student, teacher = (
        logits if logits.stride(-1) == 1 or logits.shape[1] <= 1 else logits.contiguous()
        for logits in (student_logits_TV, teacher_logits_TV.detach())
    )
    columns: Any = DistillStatsFunction.apply(student, teacher, labels_T - shard.start, problem)
    return DistillStats(*columns, tokens=slice(0, len(labels_T)))


def _row_exchange(
    shard: VocabShard, hidden_gradient: str, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return (gather_rows, reduce_rows): how hidden states enter, and how their gradient leaves.

    Hidden states cross the wire in their dtype, the gradient in the dtype in which it is summed.
    """
    size = dist.get_world_size(shard.group)

    def gather_rows(hidden_TD: Tensor) -> Tensor:
        if hidden_gradient != "reduce_scatter" or size == 1:
            return hidden_TD
        everyone = hidden_TD.new_empty(size * len(hidden_TD), hidden_TD.shape[1])
        dist.all_gather_into_tensor(everyone, hidden_TD.contiguous(), group=shard.group)
        return everyone

    def reduce_rows(gradient_TD: Tensor) -> Tensor:
        if size > 1 and hidden_gradient == "all_reduce":
            dist.all_reduce(gradient_TD, group=shard.group)
        if size > 1 and hidden_gradient == "reduce_scatter":
            own = gradient_TD.new_empty(len(gradient_TD) // size, gradient_TD.shape[1])
            dist.reduce_scatter_tensor(own, gradient_TD, group=shard.group)
            gradient_TD = own
        return gradient_TD.to(dtype)

    return gather_rows, reduce_rows


def linear_distill_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_weight_VD: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    coefficients_fn: Callable[[DistillStats], Coefficients],
    topk: int = 0,
    chunk: int = 4096,
    mode: Literal["grad_in_forward", "recompute"] = "grad_in_forward",
    temperature: float = 1.0,
    impl: native.Impl = "auto",
    hidden_gradient: Literal["all_reduce", "partial", "reduce_scatter"] = "all_reduce",
    check_ranks: bool = True,
) -> tuple[Tensor, DistillStats]:
    """Return an objective's sum over tokens, from hidden states and LM heads, never storing [T, V].

    Args:
        hidden_TD, teacher_hidden_TD: [T, D] of each model (their D may differ), on every rank.
        weight_VD, teacher_weight_VD: this rank's rows of each head, surplus rows behind them.
        coefficients_fn: statistics of a chunk -> `Coefficients`; pure; `stats.tokens` is the chunk.
        chunk: tokens whose logits exist at a time, and per exchange.
        mode: grad_in_forward (one pass over the heads) or recompute (dW not held meanwhile).
        hidden_gradient: all_reduce (whole dX on every rank), partial (this rank's part, which the
            caller's backward sums), reduce_scatter (hidden_TD is [T / tp, D], labels_T is [T]).
        labels_T, shard, topk, temperature, impl, check_ranks: as in `distill_stats`.

    Returns:
        loss_sum (0-d; gradients at hidden_TD and weight_VD, the latter by Megatron's `main_grad`
        protocol; in grad_in_forward for one backward) and the detached statistics of all T tokens.

    Raises:
        ValueError: an argument is wrong on any rank; raised on every rank, naming it.
    """
    tensors = (hidden_TD, weight_VD, teacher_hidden_TD, teacher_weight_VD)
    scattered = hidden_gradient == "reduce_scatter"
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)

    def check() -> None:
        check_linear(tensors, shard.num_valid, chunk, mode, hidden_gradient)
        parts = dist.get_world_size(shard.group) if scattered else 1
        check_labels(labels_T, len(hidden_TD) * parts, hidden_TD.device)
        check_scalars(temperature, topk)
        check_impl(impl, hidden_TD.device, dtype)

    if check_ranks:
        _agree(shard, labels_T, topk, check, chunk)
    problem = _problem(shard, temperature, topk, impl, hidden_TD, dtype)
    summed = dist.get_world_size(shard.group) > 1 and hidden_gradient != "partial"
    linear = LinearProblem(
        problem,
        coefficients_fn,
        chunk,
        mode == "grad_in_forward",
        *_row_exchange(shard, hidden_gradient, hidden_TD.dtype),
        rows_dtype=dtype if summed else hidden_TD.dtype,
    )
    outputs: Any = LinearDistillFunction.apply(*tensors, labels_T - shard.start, linear)
    return outputs[0], DistillStats(*outputs[1:], tokens=slice(0, len(labels_T)))


def _no_loss(stats: DistillStats) -> Coefficients:
    zero = torch.zeros_like(stats.student_logprob_T)
    return Coefficients(zero, zero, zero, zero, zero)


@torch.no_grad()
def linear_distill_stats(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_weight_VD: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    **options: Any,
) -> DistillStats:
    """Return the statistics of `linear_distill_loss` alone, with its options and errors."""
    tensors = (hidden_TD, weight_VD, teacher_hidden_TD, teacher_weight_VD)
    return linear_distill_loss(*tensors, labels_T, shard, _no_loss, **options)[1]
