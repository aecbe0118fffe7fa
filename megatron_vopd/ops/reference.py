"""The definition of every operator in plain torch: slow, exact (fp64 inside).

Each function here is the twin of a compiled operator of the same name (csrc/); parity tests compare
the two. Nothing here is fast, and nothing here knows about ranks: per-rank tensors arrive stacked.
Only `definition` stands apart: the statistics straight from their formulas, without shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vopd.ops.fields import EMPTY_REFERENCE


def definition(student_TV: Tensor, teacher_TV: Tensor, labels_T: Tensor) -> dict[str, Tensor]:
    """Compute the statistics of whole rows from their formulas (docs/how/method.md, section 1).

    Differentiable, in the dtype of the input; each statistic is [T]. Logits [T, V] are already
    divided by the temperature. Terms with zero weight contribute zero. The optimal baseline is the
    raw quotient, without the fallback for peaked rows.
    """
    log_p, log_q = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    delta = log_p - log_q
    delta_p, delta_q = delta.masked_fill(p == 0, 0.0), delta.masked_fill(q == 0, 0.0)
    reverse_kl = (p * delta_p).sum(-1)
    collision = p.square().sum(-1)
    tilt = (p.square() * delta_p).sum(-1)
    return {
        "student_logprob": log_p.gather(1, labels_T[:, None])[:, 0],
        "teacher_logprob": log_q.gather(1, labels_T[:, None])[:, 0],
        "reverse_kl": reverse_kl,
        "forward_kl": -(q * delta_q).sum(-1),
        "entropy": -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1),
        "teacher_entropy": -(q * log_q.masked_fill(q == 0, 0.0)).sum(-1),
        "reward_variance": (p * (delta_p - reverse_kl[:, None]).square()).sum(-1),
        "optimal_baseline": ((1 + collision) * -reverse_kl + 2 * tilt) / (1 - collision),
    }


def local_stats(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_valid: int,
    temperature: float,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return one shard's tuple of sums, and its top-k list with the teacher's logits at its ids.

    Args:
        student, teacher: [T, >= num_valid] logits of this shard; further columns are never read.
        labels: [T] int64 relative to the shard; values outside [0, num_valid) belong elsewhere.
        topk: entries wanted; min(topk, num_valid) are returned.

    Returns:
        packed [T, 13] fp64 (`fields.TUPLE`); student and teacher logits [T, k] of the list in the
        dtype of the input (fp32 at least), before the temperature; their ids [T, k] in the shard.
    """
    list_dtype = torch.promote_types(student.dtype, torch.float32)
    raw_x, raw_y = student[:, :num_valid].to(list_dtype), teacher[:, :num_valid].to(list_dtype)
    # Adding 0.0 makes -0.0 equal to +0.0 under any sorting rule.
    order = torch.sort(raw_x + 0.0, dim=-1, descending=True, stable=True)
    ids = order.indices[:, : min(topk, num_valid)].contiguous()
    x, y = raw_x.double() / temperature, raw_y.double() / temperature
    empty = x.new_full((len(x), 1), EMPTY_REFERENCE)
    m, n = (torch.cat([z, empty], dim=1).amax(-1) for z in (x, y))
    x_hat, y_hat = x - m[:, None], y - n[:, None]
    p, q = x_hat.exp(), y_hat.exp()
    delta = x_hat - y_hat
    x_hat, delta_p = x_hat.masked_fill(p == 0, 0.0), delta.masked_fill(p == 0, 0.0)
    y_hat, delta_q = y_hat.masked_fill(q == 0, 0.0), delta.masked_fill(q == 0, 0.0)
    sums = (p, q, p * x_hat, p * delta_p, -q * delta_q, p * p, p * delta_p**2)
    sums = (*sums, p * p * delta_p, q * y_hat)
    owned = (labels >= 0) & (labels < num_valid)
    padded_x, padded_y = (torch.cat([z, torch.zeros_like(empty)], dim=1) for z in (x, y))
    at = torch.where(owned, labels, num_valid)[:, None]
    label_logits = (padded_x.gather(1, at)[:, 0], padded_y.gather(1, at)[:, 0])
    packed = torch.stack([m, n, *(term.sum(-1) for term in sums), *label_logits], dim=1)
    return packed, raw_x.gather(1, ids), raw_y.gather(1, ids), ids


def _shift(packed: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """Move the sums of `packed` [T, 13] to the reference points m, n; return them as [T, 9]."""
    S, N, U, D, F, C, Q, E, G = packed[:, 2:11].unbind(1)
    alpha, beta = m - packed[:, 0], n - packed[:, 1]
    kappa = alpha - beta
    a, b = (-alpha).exp(), (-beta).exp()
    of_p = (a * S, a * (U - alpha * S), a * (D - kappa * S), a * a * C)
    of_p = (*of_p, a * (Q - kappa * (2 * D - kappa * S)), a * a * (E - kappa * C))
    of_q = (b * N, b * (F + kappa * N), b * (G - beta * N))
    # An operand without mass adds nothing; its references would only make 0 * inf.
    S, U, D, C, Q, E = (z.masked_fill((a == 0) | (S == 0), 0.0) for z in of_p)
    N, F, G = (z.masked_fill((b == 0) | (N == 0), 0.0) for z in of_q)
    return torch.stack([S, N, U, D, F, C, Q, E, G], dim=1)


def merge_stats(packed: Tensor, optimal_floor: float) -> Tensor:
    """Merge [ranks, T, 13] tuples in rank order into final statistics [T, 10] (`fields.FINAL`).

    `optimal_floor`: rows with 1 - sum(p^2) below it take -RKL as their optimal baseline.
    """
    m, n = packed[..., 0].amax(0), packed[..., 1].amax(0)
    total = packed.new_zeros(packed.shape[1], 9)
    for part in packed:
        total = total + _shift(part, m, n)
    S, N, U, D, F, C, Q, E, G = total.unbind(1)
    # The label's logit comes from its owner; every other rank sends 0.
    x_a, y_a = packed[..., 11].sum(0), packed[..., 12].sum(0)
    log_s, log_n = S.log(), N.log()
    reverse_kl = D / S - log_s + log_n
    collision = C / S**2
    tilt = E / S**2 - (log_s - log_n) * collision
    optimal = ((1 + collision) * -reverse_kl + 2 * tilt) / (1 - collision)
    columns = (
        m + log_s,
        n + log_n,
        x_a - m - log_s,
        y_a - n - log_n,
        reverse_kl,
        F / N - log_n + log_s,
        log_s - U / S,
        log_n - G / N,
        Q / S - (D / S) ** 2,
        torch.where(1 - collision < optimal_floor, -reverse_kl, optimal),
    )
    return torch.stack(columns, dim=1)


def merge_topk(
    student: Tensor, teacher: Tensor, lengths: Tensor, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge per-rank top-k lists into the global top-k.

    Shards are contiguous and each list is sorted by (value descending, id ascending, NaN first), so
    a stable sort of the lists laid side by side in rank order is the exact global answer.

    Args:
        student: [ranks, T, K] student logits; entries at and beyond `lengths[rank]` are ignored.
        teacher: [ranks, T, K] teacher logits at the same ids.
        lengths: [ranks] int64, valid entries of each rank (from the shard bounds).
        topk: entries wanted, 1 <= topk <= lengths.sum().

    Returns:
        student_TK, teacher_TK: the global list; taken_TR: how many entries each rank gave (int64).

    Raises:
        ValueError: topk is out of range.
    """
    if not 1 <= topk <= int(lengths.sum()):
        raise ValueError(f"topk: expected 1 <= topk <= {int(lengths.sum())}, got {topk}")
    counts = lengths.tolist()
    student_TN = torch.cat([student[r, :, :n] for r, n in enumerate(counts)], dim=-1)
    teacher_TN = torch.cat([teacher[r, :, :n] for r, n in enumerate(counts)], dim=-1)
    ranks_N = torch.repeat_interleave(torch.arange(len(counts)), lengths.cpu()).to(student.device)
    order = torch.sort(student_TN + 0.0, dim=-1, descending=True, stable=True)
    order_TK = order.indices[:, :topk]
    taken_TR = torch.nn.functional.one_hot(ranks_N[order_TK], len(counts)).sum(dim=1)
    return student_TN.gather(1, order_TK), teacher_TN.gather(1, order_TK), taken_TR


def logits_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    final: Tensor,
    coefficients: Tensor,
    num_valid: int,
    temperature: float,
    topk_ids: Tensor | None = None,
    topk_taken: Tensor | None = None,
    topk_summary: Tensor | None = None,
) -> Tensor:
    """Return the gradient at this shard's student logits of any mix of the losses.

    Formula: docs/how/kernels.md, section 2.

    Args:
        student, teacher, labels, num_valid, temperature: as in `local_stats`.
        final: [T, 10] fp64 merged statistics.
        coefficients: [T, 5] fp64 (`fields.COEFFICIENTS`).
        topk_ids: [T, k] this shard's list; the first topk_taken[t] of them are in the global set,
            whose summary is topk_summary [T, 6] (`fields.TOPK`). All three or none.

    Returns:
        [T, width of student] in its dtype; zero where p = 0 and q = 0 and in surplus columns.
    """
    x = student[:, :num_valid].double() / temperature
    y = teacher[:, :num_valid].double() / temperature
    policy, reverse, forward, entropy, topk = (c[:, None] for c in coefficients.double().unbind(1))
    log_p, log_q = x - final[:, :1], y - final[:, 1:2]
    p, q = log_p.exp(), log_q.exp()
    delta = log_p - log_q
    # 0 * inf guards: a term without a coefficient or without mass does not exist.
    inner = forward + torch.where(entropy != 0, -entropy * (log_p + final[:, 6:7]), 0.0)
    inner = inner + torch.where(reverse != 0, reverse * (delta - final[:, 4:5]), 0.0)
    gradient = torch.where(p == 0, 0.0, p * (policy + inner)) - forward * q
    rows = ((labels >= 0) & (labels < num_valid)).nonzero()[:, 0]
    at = (rows, labels[rows])
    # p - 1 from the log-probability, exact also where p rounds to 1.
    gradient[at] = (policy[rows, 0] * log_p[at].expm1()) + torch.where(
        p[at] == 0, 0.0, p[at] * inner[at]
    )
    gradient[at] -= forward[rows, 0] * q[at]
    if topk_ids is not None and topk_taken is not None and topk_summary is not None:
        lse_p, lse_q, mean = (c[:, None] for c in topk_summary[:, :3].unbind(1))
        log_p, log_q = x.gather(1, topk_ids) - lse_p, y.gather(1, topk_ids) - lse_q
        value = log_p.exp() * (log_p - log_q - mean)
        used = torch.arange(topk_ids.shape[1], device=x.device) < topk_taken[:, None]
        used = used & (log_p.exp() != 0) & (topk != 0)
        gradient.scatter_add_(1, topk_ids, torch.where(used, topk * value, 0.0))
    output = torch.zeros_like(student)
    output[:, :num_valid] = (gradient / temperature).to(student.dtype)
    return output


def logits_gradient_(student: Tensor, *args: Any) -> None:
    """Write `logits_gradient` over `student`, a buffer that the caller made."""
    student.copy_(logits_gradient(student, *args))


def narrow_rows(teacher_TV: Tensor, width: int) -> Tensor:
    """Return the [T, width] bfloat16 rows that begin where those of the fp32 tensor begin."""
    return teacher_TV.view(torch.bfloat16)[:, :width]


def logits_gradient_narrow_(student: Tensor, teacher: Tensor, *args: Any) -> None:
    """Write `logits_gradient` in bfloat16 over `teacher`'s memory, as `narrow_rows` lays it out."""
    narrow_rows(teacher, student.shape[1]).copy_(logits_gradient(student, teacher, *args))
