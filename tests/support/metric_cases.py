"""Statistics of random logits by their definitions, and the metrics of sums over them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vopd.ops.fields import DistillStats
from megatron_vopd.trainer.metrics import derived


def kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    return (p_TV.exp() * (p_TV - q_TV)).sum(1)


def stats_of(logits: tuple[Tensor, Tensor], labels_T: Tensor, topk: int) -> DistillStats:
    """Compute the statistics by their definitions, in fp64."""
    p, q = (x.double().log_softmax(1) for x in logits)
    rows = torch.arange(len(labels_T))
    delta, kept = p - q, p.topk(max(topk, 1), dim=1).indices
    p_kept, q_kept = p.gather(1, kept), q.gather(1, kept)
    masses = p_kept.exp().sum(1), q_kept.exp().sum(1)
    reverse = kl(p, q)
    with_topk = [
        kl(p_kept.log_softmax(1), q_kept.log_softmax(1)),
        torch.zeros_like(reverse),
        *masses,
    ]
    return DistillStats(
        p[rows, labels_T],
        q[rows, labels_T],
        reverse,
        kl(q, p),
        -(p.exp() * p).sum(1),
        -(q.exp() * q).sum(1),
        (p.exp() * delta**2).sum(1) - reverse**2,
        -reverse,
        *(with_topk if topk else [None] * 4),
        tokens=slice(0, len(labels_T)),
    )


def random_stats(num: int, topk: int = 0, seed: int = 0) -> DistillStats:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num, 12, generator=generator), torch.randn(num, 12, generator=generator))
    return stats_of(logits, torch.randint(12, (num,), generator=generator), topk)


def metrics_of(sums: dict[str, Tensor]) -> dict[str, float]:
    return derived({key: value.item() for key, value in sums.items()})
