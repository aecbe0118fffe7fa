"""Statistics of a merged top-k list: renormalised and tail KL, covered masses.

Shared by every implementation: the lists are [T, K], small beside the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Peaked rows have a tail mass below rounding; the floor keeps the ratio of tails a number.
TAIL_FLOOR = 1e-7


def summarize(
    student_TK: Tensor, teacher_TK: Tensor, final: Tensor, temperature: float, covers_all: Tensor
) -> Tensor:
    """Compute the statistics over the set S of the top-k (docs/how/method.md, section 1).

    Args:
        student_TK: [T, K] student logits of S, before the temperature.
        teacher_TK: [T, K] teacher logits at the same ids.
        final: [T, 10] merged statistics (`fields.FINAL`), fp64; its lse are the full normalisers.
        covers_all: 0-d bool, K is the whole vocabulary, so there is no tail.

    Returns:
        [T, 6] fp64 in the order of `fields.TOPK`.
    """
    x, y = student_TK.double() / temperature, teacher_TK.double() / temperature
    student_lse, teacher_lse = x.logsumexp(-1), y.logsumexp(-1)
    log_p = x - student_lse[:, None]
    p = log_p.exp()
    # p = 0 contributes nothing, also where the ratio is infinite.
    ratio = (log_p - (y - teacher_lse[:, None])).masked_fill(p == 0, 0.0)
    reverse_kl = (p * ratio).sum(-1)
    student_mass = (student_lse - final[:, 0]).exp()
    teacher_mass = (teacher_lse - final[:, 1]).exp()
    gap = (student_lse - final[:, 0]) - (teacher_lse - final[:, 1])
    tail_reverse_kl = student_mass * (reverse_kl + gap)
    student_tail = (1 - student_mass).clamp_min(TAIL_FLOOR)
    teacher_tail = (1 - teacher_mass).clamp_min(TAIL_FLOOR)
    tail = student_tail * (student_tail / teacher_tail).log()
    tail_reverse_kl = tail_reverse_kl + torch.where(covers_all, 0.0, tail)
    columns = (student_lse, teacher_lse, reverse_kl, tail_reverse_kl, student_mass, teacher_mass)
    return torch.stack(columns, dim=1)
