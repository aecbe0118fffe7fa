"""Differentiable statistics of logits: local kernels, one exchange, closed-form backward.

The exchange is a function that the caller passes in (`Problem.gather`): collectives belong to
`vocab_parallel`. What travels per token is the tuple (13 fp64) and the top-k pairs, plus one header
row that carries each rank's bounds, viewed as one fp32 buffer of bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_vopd.ops import topk
from megatron_vopd.ops.fields import (
    COEFFICIENTS,
    OPTIMAL_FLOOR_FP32,
    OPTIMAL_FLOOR_FP64,
    Coefficients,
    DistillStats,
)
from megatron_vopd.ops.native import Kernels
from megatron_vopd.ops.reference import narrow_rows

# Statistics with a gradient at the student's logits -> the coefficient they feed, and its sign.
DIFFERENTIABLE = (
    ("student_logprob_T", "policy", -1.0),
    ("reverse_kl_T", "reverse", 1.0),
    ("forward_kl_T", "forward", 1.0),
    ("entropy_T", "entropy", 1.0),
    ("topk_reverse_kl_T", "topk", 1.0),
)
# Where a gradient is written.
Destination = Literal["new", "student", "teacher"]
STATISTICS = tuple(DistillStats.__dataclass_fields__)[:-1]


@dataclass(frozen=True)
class Problem:
    """Arguments of one call, besides its tensors.

    Attributes:
        start, stop: this rank's columns of the true vocabulary; rank: its place in the group.
        temperature: both models' logits are divided by it.
        topk: entries of the global top-k list, 0 for none.
        kernels: the implementation that computes.
        gather: [rows, width] fp32 of this rank -> [ranks, rows, width], in rank order.
    """

    start: int
    stop: int
    rank: int
    temperature: float
    topk: int
    kernels: Kernels
    gather: Callable[[Tensor], Tensor]

    @property
    def num_valid(self) -> int:
        """Number of columns of the true vocabulary on this rank."""
        return self.stop - self.start


@dataclass(frozen=True)
class MergedStats:
    """Statistics after the exchange, with what the backward needs.

    final [T, 10] and summary [T, 6] fp64 (`fields`); ids [T, k] and taken [T]: this rank's own
    top-k list and how much of it is in the global set. The last three are None without a top-k.
    """

    final: Tensor
    summary: Tensor | None
    ids: Tensor | None
    taken: Tensor | None

    def columns(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Return the fields of `DistillStats` in order, as [T] tensors of `dtype`."""
        full = list(self.final[:, 2:].to(dtype).unbind(1))
        if self.summary is None:
            return [*full, None, None, None, None]
        return [*full, *self.summary[:, 2:].to(dtype).unbind(1)]

    def rows(self, rows: slice) -> MergedStats:
        """Return the statistics of a slice of tokens."""
        return MergedStats(
            self.final[rows], *(_each(z, lambda t: t[rows]) for z in self._optional())
        )

    @classmethod
    def joined(cls, parts: list[MergedStats]) -> MergedStats:
        """Join the statistics of all parts along the tokens, in order."""
        optional = zip(*(part._optional() for part in parts), strict=True)
        joined = (None if group[0] is None else torch.cat(group) for group in optional)
        return cls(torch.cat([part.final for part in parts]), *joined)

    def _optional(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.summary, self.ids, self.taken


def _each(tensor: Tensor | None, function: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if tensor is None else function(tensor)


def statistics_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64 logits, fp32 for all others."""
    return torch.promote_types(logits_dtype, torch.float32)


def merged_stats(
    student: Tensor, teacher: Tensor, labels_local_T: Tensor, problem: Problem
) -> MergedStats:
    """Compute local statistics, exchange them once and merge: the whole forward.

    Args:
        student, teacher: [T, >= num_valid] logits of this rank.
        labels_local_T: [T] labels minus `problem.start`.
    """
    kernels, k = problem.kernels, problem.topk
    packed, student_TK, teacher_TK, ids = kernels.local_stats(
        student, teacher, labels_local_T, problem.num_valid, problem.temperature, k
    )
    num_tokens, width = packed.shape
    header = packed.new_zeros(1, width)
    header[0, 0], header[0, 1] = problem.start, problem.stop
    lists = student_TK.new_zeros(2, num_tokens + 1, k)
    lists[0, 1:, : ids.shape[1]], lists[1, 1:, : ids.shape[1]] = student_TK, teacher_TK
    bits = [torch.cat([header, packed]).view(torch.float32)]
    bits += [part.view(torch.float32) for part in lists] if k else []
    wire = problem.gather(torch.cat(bits, dim=1))
    tuples = wire[..., : 2 * width].contiguous().view(torch.float64)
    in_fp64 = student.dtype == torch.float64
    floor = OPTIMAL_FLOOR_FP64 if in_fp64 else OPTIMAL_FLOOR_FP32
    final = kernels.merge_stats(tuples[:, 1:].contiguous(), floor)
    if not k:
        return MergedStats(final, None, None, None)
    bounds = tuples[:, 0, :2].long()
    # Lengths come from the bounds, never from sentinel values in the lists.
    lengths = (bounds[:, 1] - bounds[:, 0]).clamp(max=k)
    gathered = wire[:, 1:, 2 * width :].contiguous().view(lists.dtype)
    top_student, top_teacher, taken = kernels.merge_topk(
        gathered[..., :k].contiguous(), gathered[..., k:].contiguous(), lengths, k
    )
    covers_all = bounds[:, 1].max() <= k
    summary = topk.summarize(top_student, top_teacher, final, problem.temperature, covers_all)
    return MergedStats(final, summary, ids, taken[:, problem.rank].contiguous())


def student_gradient(
    student: Tensor,
    teacher: Tensor,
    labels_local_T: Tensor,
    merged: MergedStats,
    coefficients: Tensor,
    problem: Problem,
    into: Destination = "new",
) -> Tensor:
    """Return the gradient at this rank's student logits, in their shape; no exchange.

    Args:
        coefficients: [T, 5] fp64 in the order of `fields.COEFFICIENTS`.
        into: "new": a tensor of the logits' dtype; "student": written over `student`, a buffer
            that the caller made; "teacher": in bfloat16 over `teacher` (fp32), likewise.
    """
    kernels = problem.kernels
    arguments = (
        student,
        teacher,
        labels_local_T,
        merged.final,
        coefficients,
        problem.num_valid,
        problem.temperature,
        merged.ids,
        merged.taken,
        merged.summary,
    )
    if into == "new":
        return kernels.logits_gradient(*arguments)
    if into == "student":
        kernels.logits_gradient_(*arguments)
        return student
    kernels.logits_gradient_narrow_(*arguments)
    return narrow_rows(teacher, student.shape[1])


def stack_coefficients(coefficients: Coefficients) -> Tensor:
    """Stack detached coefficients into [T, 5] fp64 in the order of `fields.COEFFICIENTS`."""
    columns = [getattr(coefficients, name).detach().double() for name in COEFFICIENTS]
    return torch.stack(columns, dim=1)


def weighted_loss(merged: MergedStats, coefficients: Tensor) -> Tensor:
    """Return the loss per token, [T] fp64; a coefficient of 0 drops even an infinite term."""
    final = merged.final
    topk_kl = torch.zeros_like(final[:, 0]) if merged.summary is None else merged.summary[:, 2]
    values = torch.stack([-final[:, 2], final[:, 4], final[:, 5], final[:, 6], topk_kl], dim=1)
    return torch.where(coefficients == 0, 0.0, coefficients * values).sum(1)


class DistillStatsFunction(torch.autograd.Function):
    """Statistics of given logits; the backward is the closed form, without a collective."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, student: Tensor, teacher: Tensor, labels_local_T: Tensor, problem: Problem
    ) -> tuple[Tensor | None, ...]:
        """Return the fields of `DistillStats` in order, without `tokens`."""
        merged = merged_stats(student, teacher, labels_local_T, problem)
        columns = merged.columns(statistics_dtype(student.dtype))
        constant = {name for name, _, _ in DIFFERENTIABLE} ^ set(STATISTICS)
        ctx.mark_non_differentiable(
            *(
                c
                for c, name in zip(columns, STATISTICS, strict=True)
                if name in constant and c is not None
            )
        )
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        ctx.save_for_backward(
            student, teacher, labels_local_T, merged.final, merged.summary, merged.ids, merged.taken
        )
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return dL/d student logits from the gradients of the statistics."""
        student, teacher, labels_local_T, final, summary, ids, taken = ctx.saved_tensors
        by_name = dict(zip(STATISTICS, grads, strict=True))
        coefficients = final.new_zeros(len(final), len(COEFFICIENTS))
        for name, coefficient, sign in DIFFERENTIABLE:
            gradient = by_name[name]
            if gradient is not None:
                coefficients[:, COEFFICIENTS.index(coefficient)] = sign * gradient
        merged = MergedStats(final, summary, ids, taken)
        return (
            student_gradient(student, teacher, labels_local_T, merged, coefficients, ctx.problem),
            None,
            None,
            None,
        )
