"""What the ranks of test_vocab_parallel.py run: module-level functions, plain results."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_vopd import objectives
from megatron_vopd.ops.autograd import STATISTICS
from megatron_vopd.vocab_parallel import (
    VocabShard,
    distill_stats,
    linear_distill_loss,
    linear_distill_stats,
)
from tests.support.settings import objective_settings

COLLECTIVES = ("all_gather_into_tensor", "all_gather", "all_reduce", "reduce_scatter_tensor")
DIFFERENTIABLE = ("student_logprob_T", "reverse_kl_T", "forward_kl_T", "entropy_T")
DIFFERENTIABLE += ("topk_reverse_kl_T",)


def shard_of(vocab_size: int, kind: str) -> VocabShard:
    """Return even shards, or uneven ones of which rank 1's is empty."""
    size, rank = dist.get_world_size(), dist.get_rank()
    width = -(-vocab_size // size)
    edges = [min(r * width, vocab_size) for r in range(size + 1)]
    if kind == "uneven" and size > 1:
        edges = [0, *(vocab_size // 5 + r // 2 for r in range(size - 1)), vocab_size]
    group = dist.group.WORLD
    assert group is not None
    return VocabShard(edges[rank], edges[rank + 1], group)


def counted(function: Any) -> tuple[Any, Counter]:
    """Return the function's result, and how often it called each collective."""
    calls: Counter = Counter()

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    patches = [counting(name) for name in COLLECTIVES]
    for patch in patches:
        patch.start()
    try:
        return function(), calls
    finally:
        for patch in patches:
            patch.stop()


def padded(columns: torch.Tensor, surplus: int = 2) -> torch.Tensor:
    """Return a leaf of these columns with poison behind them."""
    poison = torch.full((len(columns), surplus), torch.nan, dtype=columns.dtype)
    return torch.cat([columns, poison], dim=1)


def stats_and_gradients(x, y, labels, kind, topk, temperature, impl) -> dict[str, Any]:
    """Return statistics, their gradients at this rank's columns, collectives of both passes."""
    shard = shard_of(x.shape[1], kind)
    own = slice(shard.start, shard.stop)
    student, teacher = padded(x[:, own]).requires_grad_(), padded(y[:, own])
    stats, forward_calls = counted(
        lambda: distill_stats(student, teacher, labels, shard, temperature, topk, impl)
    )
    result: dict[str, Any] = {"forward_calls": forward_calls, "start": shard.start}
    for name in STATISTICS:
        value = getattr(stats, name)
        result[name] = None if value is None else value.detach()

    def backward() -> None:
        for name in DIFFERENTIABLE:
            value = getattr(stats, name)
            if value is not None:
                (gradient,) = torch.autograd.grad(value.sum(), student, retain_graph=True)
                assert torch.count_nonzero(gradient[:, shard.num_valid :]) == 0
                result["d_" + name] = gradient[:, : shard.num_valid]

    _, result["backward_calls"] = counted(backward)
    return result


def linear_inputs(dtype: torch.dtype, vocab_size: int = 203, num_tokens: int = 24) -> Any:
    """Make hidden states, heads and labels of a small problem, the same on every rank."""
    generator = torch.Generator().manual_seed(5)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, teacher_hidden = make(num_tokens, 16), make(num_tokens, 12)
    heads = make(vocab_size, 16) * 0.7, make(vocab_size, 12) * 0.7
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return hidden, heads[0], teacher_hidden, heads[1], labels


def objective(name: str, rollout_logprob_T: torch.Tensor | None = None) -> Any:
    """Return coefficients_fn of a row of the objectives, per-token data sliced by the chunk."""
    settings = objective_settings(entropy_gate=4.0)

    def coefficients_fn(stats: Any) -> Any:
        mu = None if rollout_logprob_T is None else rollout_logprob_T[stats.tokens]
        return objectives.coefficients(name, stats, settings, mu)

    return coefficients_fn


def linear_against_stats(name, mode, chunk, dtype, hidden_gradient) -> dict[str, Any]:
    """Run linear_distill_loss beside distill_stats + autograd on the same problem."""
    hidden, weight, teacher_hidden, teacher_weight, labels = linear_inputs(dtype)
    shard = shard_of(len(weight), "uneven")
    rank, size = dist.get_rank(), dist.get_world_size()
    own = slice(shard.start, shard.stop)
    surplus = torch.full((3, 16), torch.nan, dtype=dtype)
    head = torch.cat([weight[own], surplus]).requires_grad_()
    rows = slice(0, len(hidden))
    if hidden_gradient == "reduce_scatter":
        part = len(hidden) // size
        rows = slice(rank * part, (rank + 1) * part)
    leaf = hidden[rows].clone().requires_grad_()
    mu = torch.linspace(-6, -1, len(hidden))

    def forward() -> Any:
        return linear_distill_loss(
            leaf,
            head,
            teacher_hidden[rows],
            teacher_weight[own],
            labels,
            shard,
            objective(name, mu),
            topk=7,
            chunk=chunk,
            mode=mode,
            hidden_gradient=hidden_gradient,
        )

    (loss, stats), forward_calls = counted(forward)
    _, backward_calls = counted(lambda: (loss * 0.5).backward())
    assert leaf.grad is not None and head.grad is not None
    assert torch.count_nonzero(head.grad[shard.num_valid :]) == 0
    only = linear_distill_stats(
        leaf, head, teacher_hidden[rows], teacher_weight[own], labels, shard, topk=7,
        chunk=chunk, hidden_gradient=hidden_gradient,
    )  # fmt: skip
    for field in STATISTICS:
        assert torch.equal(getattr(only, field), getattr(stats, field)), field
    return {
        "loss": loss.detach(),
        "hidden": leaf.grad,
        "weight": head.grad[: shard.num_valid],
        "stats": {field: getattr(stats, field) for field in STATISTICS},
        "forward_calls": forward_calls,
        "backward_calls": backward_calls,
    }


def refused(case: str) -> str:
    """Return the ValueError of a call in which one rank, the last, has something wrong."""
    x = torch.randn(5, 20)
    shard = shard_of(20, "even")
    bad = dist.get_rank() == dist.get_world_size() - 1
    own = x[:, shard.start : shard.stop].clone()
    arguments: dict[str, Any] = {
        "student_logits_TV": own,
        "teacher_logits_TV": own,
        "labels_T": torch.arange(5),
        "shard": shard,
        "topk": 3,
    }
    wrong: dict[str, Any] = {
        "rows": {"student_logits_TV": own[:4], "teacher_logits_TV": own[:4]}
        | {"labels_T": torch.arange(4)},
        "student_shape": {"student_logits_TV": own[:, :-1]},
        "student_ints": {"student_logits_TV": own.long()},
        "teacher_rows": {"teacher_logits_TV": own[:3]},
        "teacher_dtype": {"teacher_logits_TV": own.bfloat16()},
        "label_high": {"labels_T": torch.tensor([0, 1, 2, 3, 20])},
        "label_low": {"labels_T": torch.tensor([0, 1, 2, 3, -1])},
        "label_dtype": {"labels_T": torch.arange(5).int()},
        "topk_zero": {"topk": -1},
        "topk_other": {"topk": 2},
        "topk_large": {"topk": 21},
        "temperature": {"temperature": 0.0},
        "impl": {"impl": "cuda"},
        "bounds": {"shard": VocabShard(shard.start + 1, shard.stop, shard.group)},
    }[case]
    # A wrong label on one rank alone would already differ from the other ranks' labels.
    everywhere = case in ("topk_large", "label_high", "label_low")
    try:
        distill_stats(**(arguments | (wrong if bad or everywhere else {})))
    except ValueError as error:
        return str(error)
    return "nothing was raised"
