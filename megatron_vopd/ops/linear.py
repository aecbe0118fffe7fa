"""The LM heads inside the loss: token chunks, fp32 logits, and no [T, V] that outlives its chunk.

For each chunk: both heads' logits (this rank's columns), statistics with their one exchange, the
objective's coefficients, and then either the gradient at once, written over one model's logits and
multiplied out (``grad_in_forward``, legal because every coefficient belongs to one token), or
nothing (``recompute``: the backward makes the logits again, without another exchange). One autograd
Function holds the loop: a Function per chunk would keep every chunk's logits alive.

Left out on purpose: gradients of the teacher, second derivatives, and a bias of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.ops.autograd import (
    Destination,
    MergedStats,
    Problem,
    merged_stats,
    stack_coefficients,
    statistics_dtype,
    student_gradient,
    weighted_loss,
)
from megatron_vopd.ops.fields import Coefficients, DistillStats

# Rows of the weight at a time where a GEMM needs an fp32 copy of them (CPU).
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class LinearProblem:
    """Arguments of one call of the linear form, besides its tensors.

    Attributes:
        problem: arguments of the statistics.
        coefficients_fn: statistics of a chunk -> coefficients.
        chunk: tokens whose logits exist at a time.
        gradient_in_forward: the mode; otherwise the backward recomputes.
        gather_rows: hidden states of this rank -> all rows (identity unless sequence parallel).
        reduce_rows: this rank's part of the gradient at all rows -> the gradient at its own rows.
        rows_dtype: dtype of that part: fp32 where ranks sum it, else that of the hidden states.
    """

    problem: Problem
    coefficients_fn: Callable[[DistillStats], Coefficients]
    chunk: int
    gradient_in_forward: bool
    gather_rows: Callable[[Tensor], Tensor]
    reduce_rows: Callable[[Tensor], Tensor]
    rows_dtype: torch.dtype

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Yield slices of the rows; one empty slice when there are none."""
        for start in range(0, max(num_tokens, 1), self.chunk):
            yield slice(start, min(start + self.chunk, num_tokens))


def _fp32_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True where low-precision operands multiply straight into fp32 (CUDA only)."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def head_logits(hidden_TD: Tensor, weight_VD: Tensor, out: Tensor) -> Tensor:
    """Write hidden @ weight.T for the first out.shape[1] rows into `out` (fp32 or wider)."""
    weight = weight_VD[: out.shape[1]]
    if _fp32_product(weight.device, weight.dtype):
        return torch.mm(hidden_TD.to(weight.dtype), weight.t(), out_dtype=torch.float32, out=out)
    hidden = hidden_TD.to(out.dtype)
    if weight.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    for rows in _row_blocks(len(weight)):
        torch.mm(hidden, weight[rows].to(out.dtype).t(), out=out[:, rows])
    return out


def _row_blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_rows))


def hidden_gradient(gradient_TV: Tensor, weight_VD: Tensor) -> Tensor:
    """Return gradient @ weight, [T, D] in fp32 or wider; the gradient may be narrower."""
    weight = weight_VD[: gradient_TV.shape[1]]
    if _fp32_product(weight.device, weight.dtype):
        return torch.mm(gradient_TV.to(weight.dtype), weight, out_dtype=torch.float32)
    if weight.dtype == gradient_TV.dtype:
        return gradient_TV @ weight
    out = gradient_TV.new_zeros(len(gradient_TV), weight.shape[1])
    for rows in _row_blocks(len(weight)):
        out.addmm_(gradient_TV[:, rows], weight[rows].to(out.dtype))
    return out


def add_weight_gradient(total_VD: Tensor, gradient_TV: Tensor, hidden_TD: Tensor) -> None:
    """Add gradient.T @ hidden to total[:width], in `total`'s dtype, without another [V, D]."""
    target = total_VD[: gradient_TV.shape[1]]
    if _fp32_product(hidden_TD.device, hidden_TD.dtype):
        low = gradient_TV.to(hidden_TD.dtype)
        torch.addmm(target, low.t(), hidden_TD, out_dtype=target.dtype, out=target)
    else:
        target.addmm_(gradient_TV.to(total_VD.dtype).t(), hidden_TD.to(total_VD.dtype))


def gradient_destination(hidden_TD: Tensor) -> Destination:
    """Return over whose logits a chunk's gradient is written.

    Where the products take bfloat16 it is written so at once, over the teacher's, which nothing
    reads any more: the copy that they would need costs neither memory nor a pass over the logits.
    """
    narrow = hidden_TD.device.type == "cuda" and hidden_TD.dtype == torch.bfloat16
    return "teacher" if narrow else "student"


@dataclass
class Buffers:
    """The only logits of a call: one chunk of each model, used again for every chunk."""

    student: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, hidden_TD: Tensor, linear: LinearProblem) -> Buffers:
        """Allocate the buffers for the longest chunk."""
        rows = min(linear.chunk, len(hidden_TD))
        shape = (rows, linear.problem.num_valid)
        dtype = statistics_dtype(hidden_TD.dtype)
        student = torch.empty(shape, dtype=dtype, device=hidden_TD.device)
        return cls(student, torch.empty_like(student))

    def fill(
        self, hidden: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Fill the buffers with both models' logits for `rows`, valid until the next call."""
        num_rows = rows.stop - rows.start
        student = head_logits(hidden[0][rows], weights[0], self.student[:num_rows])
        teacher = head_logits(hidden[1][rows], weights[1], self.teacher[:num_rows])
        return student, teacher


class Gradients:
    """Gradients of all chunks: at the hidden states and at the weight, each only when wanted."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        wanted: tuple[bool, bool],
        rows_dtype: torch.dtype,
    ) -> None:
        self.weight_VD = weight_VD
        self.hidden_TD = torch.empty_like(hidden_TD, dtype=rows_dtype) if wanted[0] else None
        wide = statistics_dtype(hidden_TD.dtype)
        self.total_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None

    def add(self, gradient_TV: Tensor, hidden_TD: Tensor, rows: slice) -> None:
        """Add the part of one chunk: its gradient at the logits, times head and hidden states.

        Args:
            gradient_TV: [rows, V] of the chunk.
            hidden_TD: [T, D] of all chunks.
        """
        if _fp32_product(hidden_TD.device, hidden_TD.dtype):
            gradient_TV = gradient_TV.to(hidden_TD.dtype)
        if self.hidden_TD is not None:
            self.hidden_TD[rows] = hidden_gradient(gradient_TV, self.weight_VD)
        if self.total_VD is not None:
            add_weight_gradient(self.total_VD, gradient_TV, hidden_TD[rows])


def deliver_weight_gradient(weight_VD: Tensor, total_VD: Tensor) -> Tensor:
    """Hand dW over: add it to `main_grad` (Megatron's protocol) where there is one, else return it.

    With `main_grad`, autograd still gets a tensor, because the hook that starts the overlapped
    reduction asserts a gradient: zeros when `zero_out_wgrad` says that the hook will add it (tied
    weights on one stage), otherwise memory that the hook only drops.
    """
    main_grad = getattr(weight_VD, "main_grad", None)
    if main_grad is None:
        return total_VD.to(weight_VD.dtype)
    main_grad.add_(total_VD)
    weight_VD.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(weight_VD, "zero_out_wgrad", False):
        return torch.zeros_like(weight_VD)
    return torch.empty_like(weight_VD)


def chunk_stats(merged: MergedStats, dtype: torch.dtype, rows: slice) -> DistillStats:
    """Return merged statistics as the caller of the operator sees them."""
    return DistillStats(*merged.columns(dtype), tokens=rows)  # pyright: ignore[reportArgumentType]


class LinearDistillFunction(torch.autograd.Function):
    """(loss_sum, statistics...) of hidden states and heads, computed chunk by chunk."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels_local_T: Tensor,
        linear: LinearProblem,
    ) -> tuple[Tensor | None, ...]:
        """Return the loss (0-d) and the fields of `DistillStats` without `tokens`."""
        both = (linear.gather_rows(hidden), linear.gather_rows(teacher_hidden))
        weights = (weight.detach(), teacher_weight.detach())
        dtype = statistics_dtype(hidden.dtype)
        buffers = Buffers.of(both[0], linear)
        wanted = ctx.needs_input_grad[:2]
        now = linear.gradient_in_forward and any(wanted)
        gradients = Gradients(
            both[0], weights[0], wanted if now else (False, False), linear.rows_dtype
        )
        destination = gradient_destination(both[0])
        parts, stacked, loss = [], [], torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in linear.chunks(len(labels_local_T)):
            logits = buffers.fill(both, weights, rows)
            labels = labels_local_T[rows]
            merged = merged_stats(*logits, labels, linear.problem)
            weights_T = linear.coefficients_fn(chunk_stats(merged, dtype, rows))
            coefficients = stack_coefficients(weights_T)
            loss += weighted_loss(merged, coefficients).sum()
            parts.append(merged)
            stacked.append(coefficients)
            if now:
                gradient = student_gradient(
                    *logits, labels, merged, coefficients, linear.problem, destination
                )
                gradients.add(gradient, both[0], rows)
        merged = MergedStats.joined(parts)
        ctx.linear, ctx.weights, ctx.merged = linear, (weight, teacher_weight), merged
        ctx.coefficients, ctx.gradients = torch.cat(stacked), gradients if now else None
        ctx.save_for_backward(*(() if now else (*both, labels_local_T)))
        columns = merged.columns(dtype)
        ctx.mark_non_differentiable(*(column for column in columns if column is not None))
        ctx.set_materialize_grads(False)
        return (loss.to(dtype), *columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return gradients at the hidden states (reduced over ranks) and at the student's head."""
        loss_gradient = grads[0]
        if loss_gradient is None:
            return (None,) * 6
        gradients = ctx.gradients
        if gradients is None:
            if ctx.linear.gradient_in_forward:
                raise RuntimeError(
                    "mode 'grad_in_forward' keeps its gradients for one backward; use 'recompute'"
                )
            gradients = _recomputed(ctx)
        ctx.gradients = None
        hidden, total_VD = gradients.hidden_TD, gradients.total_VD
        if hidden is not None:
            hidden = ctx.linear.reduce_rows(hidden.mul_(loss_gradient))
        if total_VD is not None:
            total_VD = deliver_weight_gradient(ctx.weights[0], total_VD.mul_(loss_gradient))
        return (hidden, total_VD, None, None, None, None)


def _recomputed(ctx: Any) -> Gradients:
    """Compute the gradients of all chunks from logits that are made again; no exchange."""
    linear, merged = ctx.linear, ctx.merged
    student_hidden, teacher_hidden, labels_local_T = ctx.saved_tensors
    weights = tuple(weight.detach() for weight in ctx.weights)
    buffers = Buffers.of(student_hidden, linear)
    gradients = Gradients(student_hidden, weights[0], ctx.needs_input_grad[:2], linear.rows_dtype)
    for rows in linear.chunks(len(labels_local_T)):
        logits = buffers.fill((student_hidden, teacher_hidden), weights, rows)
        gradient = student_gradient(
            *logits,
            labels_local_T[rows],
            merged.rows(rows),
            ctx.coefficients[rows],
            linear.problem,
            gradient_destination(student_hidden),
        )
        gradients.add(gradient, student_hidden, rows)
    return gradients
