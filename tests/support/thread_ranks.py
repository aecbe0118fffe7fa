"""Several vocabulary-parallel ranks inside one process: threads that meet at the one exchange."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.ops import autograd, native

CPU = torch.device("cpu")


def splits(vocab_size: int, tp: int, kind: str = "even") -> list[tuple[int, int]]:
    """Return contiguous shards: even (ceil), or uneven with an empty one where tp allows it."""
    width = -(-vocab_size // tp)
    edges = [min(rank * width, vocab_size) for rank in range(tp + 1)]
    if kind == "uneven" and tp > 1:
        cuts = torch.rand(tp - 1, generator=torch.Generator().manual_seed(tp)) * vocab_size
        edges = [0, *sorted(int(cut) for cut in cuts), vocab_size]
        edges[1] = edges[2] if tp > 2 else edges[1]
    return list(itertools.pairwise(edges))


def on_ranks(
    bounds: list[tuple[int, int]],
    function: Callable[[autograd.Problem], Any],
    impl: str = "cpu",
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    topk: int = 0,
) -> list[Any]:
    """Return `function(problem)` of every rank, in order; the problems share one exchange."""
    barrier = threading.Barrier(len(bounds), timeout=60)
    slots: list[Tensor | None] = [None] * len(bounds)
    kernels = native.resolve(impl, CPU, dtype)

    def run(rank: int) -> Any:
        def gather(bits: Tensor) -> Tensor:
            slots[rank] = bits
            barrier.wait()
            stacked = torch.stack([slot for slot in slots if slot is not None])
            barrier.wait()
            return stacked

        try:
            start, stop = bounds[rank]
            problem = autograd.Problem(start, stop, rank, temperature, topk, kernels, gather)
            return function(problem)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(bounds)) as pool:
        return [future.result() for future in [pool.submit(run, r) for r in range(len(bounds))]]


def shard_of(logits_TV: Tensor, problem: autograd.Problem, surplus: int = 3) -> Tensor:
    """Return this rank's columns, and poisoned padding behind them that nothing may read."""
    own = logits_TV[:, problem.start : problem.stop]
    poison = torch.full((len(own), surplus), torch.nan, dtype=own.dtype)
    return torch.cat([own, poison], dim=1)
