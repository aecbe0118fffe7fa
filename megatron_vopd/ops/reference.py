"""The definition of every operator in plain torch: slow, exact, fp64-capable.

Each function here is the twin of a compiled operator of the same name (csrc/); parity tests compare
the two. Nothing here is fast, and nothing here knows about ranks: per-rank tensors arrive stacked.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_topk(
    student: Tensor, teacher: Tensor, lengths: Tensor, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stable merge of per-rank top-k lists into the global top-k.

    Shards are contiguous and each list is sorted by (value descending, id ascending, NaN first), so
    a stable sort of the lists laid side by side in rank order is the exact global answer.

    Args:
        student: [ranks, T, K] student logits; entries at and beyond `lengths[rank]` are ignored.
        teacher: [ranks, T, K] teacher logits at the same ids.
        lengths: [ranks] int64, valid entries of each rank (from the shard bounds).
        topk: entries wanted, 1 <= topk <= lengths.sum().

    Returns:
        student_TK, teacher_TK: the global list; taken_TR: how many entries each rank gave (int64).
    """
    if not 1 <= topk <= int(lengths.sum()):
        raise ValueError(f"topk: expected 1 <= topk <= {int(lengths.sum())}, got {topk}")
    counts = lengths.tolist()
    student_TN = torch.cat([student[r, :, :n] for r, n in enumerate(counts)], dim=-1)
    teacher_TN = torch.cat([teacher[r, :, :n] for r, n in enumerate(counts)], dim=-1)
    ranks_N = torch.repeat_interleave(torch.arange(len(counts)), lengths.cpu()).to(student.device)
    order_TK = torch.sort(student_TN, dim=-1, descending=True, stable=True).indices[:, :topk]
    taken_TR = torch.nn.functional.one_hot(ranks_N[order_TK], len(counts)).sum(dim=1)
    return student_TN.gather(1, order_TK), teacher_TN.gather(1, order_TK), taken_TR
