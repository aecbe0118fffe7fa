"""The loss of a packed row, and the schedule that runs it over a replica's rows.

Nothing here knows an objective. On the student's last stage the operator `linear_distill_loss`
multiplies both heads on this rank's columns, merges the statistics of a chunk of tokens over tp,
and asks `objectives.coefficients` for the weights of the chunk's tokens: there the advantage
A = r - V (arXiv 2605.07865, Eq. 10), the importance weight and every other objective are one line
each.

A row's loss is the sum over its response tokens, returned with their number; megatron-core divides
the summed gradient by the number of all tokens of the step. So microbatches, data parallelism and
context parallelism do not change it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.errors import UserError
from megatron_vopd.megatron.forward import forward_backward, response_hidden, run_row
from megatron_vopd.megatron.microbatch import Microbatch, cp_shard
from megatron_vopd.megatron.student import Student
from megatron_vopd.megatron.teacher import Teacher, student_shard
from megatron_vopd.objectives import Objective, coefficients
from megatron_vopd.ops import native
from megatron_vopd.trainer.metrics import add_sums, token_sums
from megatron_vopd.vocab_parallel import Coefficients, DistillStats, linear_distill_loss

Sums = dict[str, Tensor]


def require_kernels(device: str) -> None:
    """Refuse a device ("cpu", "cuda") for which the extension has no kernels.

    Raises:
        UserError: it was not built, not for CUDA, or cannot be loaded; the line says which.
    """
    missing = native.missing_kernels(device)
    if missing is not None:
        raise UserError(f"parallel.device: got {device}, expected kernels for it; {missing}")


class RowLoss:
    """The loss of this rank's rows, with its measurements of the current step.

    Attributes:
        operator_seconds: time inside the operator, both heads and their gradients included (on a
            GPU the time to launch it, since nothing waits for the device).
        sums: `metrics.token_sums` and `loss/mean`, added over the step's rows on this rank: 0-d
            fp64; empty where the loss is not computed.

    Raises:
        ValueError: an objective that needs a teacher, without one.
    """

    def __init__(
        self, student: Student, teachers: Mapping[str, Teacher], objective: Objective
    ) -> None:
        if not teachers and objective.row.needs_teacher:
            raise ValueError(f"objective {objective.name}: expected a teacher, got none")
        self._student, self._teachers, self._objective = student, teachers, objective
        self._no_teacher_shard = student_shard(student.facts, student.groups)
        self.operator_seconds = 0.0
        self.sums: Sums = {}

    def forward_backward(
        self, replicas: Sequence[Sequence[Microbatch]], teacher_hidden: Sequence[Tensor]
    ) -> None:
        """Fill zeroed gradient buffers with the gradients of the token mean; set the attributes.

        Args:
            replicas: rows of each data-parallel replica; this rank runs its replica's, cut over cp.
            teacher_hidden: teachers' hidden states [T, D] of each of these rows, from
                `teacher.score`; empty where the loss is not computed.
        """
        student, at = self._student, self._student.groups.coordinates
        self.operator_seconds, self.sums = 0.0, {}
        rows = [cp_shard(row, at.cp, student.groups.layout.cp) for row in replicas[at.dp]]
        student.model.zero_grad_buffer()
        student.optimizer.zero_grad()
        inputs = zip(rows, teacher_hidden or repeat(None), strict=False)
        forward_backward(student.model, self._forward_step, inputs, len(rows), len(rows[0].ids_S))

    @property
    def loss_sum(self) -> float:
        """Sum of the losses of this rank's response tokens in the current step, nats."""
        return float(self.sums.get("loss/mean", 0.0))

    def _forward_step(self, iterator: Any, model: Any) -> Any:
        row, teacher_hidden_TD = next(iterator)
        output = run_row(model, row, self._student.options.device)
        return output, partial(self._loss, row, teacher_hidden_TD)

    def _loss(
        self, row: Microbatch, teacher_hidden_TD: Tensor, output: Tensor
    ) -> tuple[Tensor, Tensor, Sums]:
        """Return (loss summed over the row's tokens, their number, {}), as megatron-core asks."""
        student, objective = self._student, self._objective
        hidden_TD = response_hidden(output, row, student.model, student.groups)
        teacher = self._teachers.get(row.teacher) if row.num_tokens else None
        head_VD, shard = student.head_VD, teacher.shard if teacher else self._no_teacher_shard
        if teacher is None:
            teacher_hidden_TD, teacher_head_VD = _uniform(hidden_TD, shard.num_valid)
        else:
            assert teacher.head_VD is not None, "the student's last stage holds the teacher's head"
            teacher_hidden_TD, teacher_head_VD = (
                teacher_hidden_TD.to(output.device),
                teacher.head_VD,
            )
        started = time.perf_counter()
        loss_sum, stats = linear_distill_loss(
            hidden_TD,
            head_VD,
            teacher_hidden_TD,
            teacher_head_VD,
            row.labels_T.to(output.device),
            shard,
            partial(self._coefficients, row),
            topk=objective.topk,
            chunk=objective.chunk,
            mode=objective.mode,
            temperature=objective.temperature,
            hidden_gradient="partial" if student.sequence_parallel else "all_reduce",
            check_ranks=False,
        )
        self.operator_seconds += time.perf_counter() - started
        logprob_T = row.rollout_logprob_T
        logprob_T = None if logprob_T is None else logprob_T.to(output.device)
        add_sums(self.sums, token_sums(objective, stats, logprob_T))
        add_sums(self.sums, {"loss/mean": loss_sum.detach().double()})
        num_tokens = torch.tensor(row.num_tokens, dtype=torch.int, device=output.device)
        return loss_sum, num_tokens, {}

    def _coefficients(self, row: Microbatch, stats: DistillStats) -> Coefficients:
        advantage_T = row.task_advantage_T
        return coefficients(
            self._objective.name,
            stats,
            self._objective.settings,
            _rollout_logprob(stats, row),
            None if advantage_T is None else advantage_T.to(stats.entropy_T)[stats.tokens],
        )


def _rollout_logprob(stats: DistillStats, row: Microbatch) -> Tensor | None:
    """Return log mu(a) [T] of the tokens of `stats`; log p(a) where no engine sampled, so w = 1.

    None: no token of the row was sampled by an engine.
    """
    if row.rollout_logprob_T is None:
        return None
    own_T = stats.student_logprob_T.detach()
    given_T = row.rollout_logprob_T.to(own_T)[stats.tokens]
    return torch.where(given_T.isnan(), own_T, given_T)


def _uniform(hidden_TD: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
    """Make hidden states [T, 1] and head [V, 1] of a teacher whose logits are all 0.

    Without a teacher the operator then costs little more than the student's head.
    """
    return hidden_TD.new_zeros(len(hidden_TD), 1), hidden_TD.new_zeros(num_valid, 1)
