"""One reduction over the world: only contributing ranks count, all end with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vopd.trainer.metrics import reduce_sums, token_sums
from tests.support.harness import spawn
from tests.support.metric_cases import metrics_of, random_stats
from tests.support.settings import objective_named

OBJECTIVE = objective_named("sampled")


def _reduced() -> tuple[dict[str, float], dict[str, float], int, str]:
    """Reduce 10 and 20 tokens of ranks 0 and 2, nothing of 1, and sums of 3 that must not count."""
    rank = dist.get_rank()
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counted(values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(values.numel())
        return all_reduce(values, *args, **kwargs)

    dist.all_reduce = counted  # type: ignore[assignment]
    stats = random_stats((10, 0, 20, 30)[rank], seed=rank)
    sums = token_sums(OBJECTIVE, stats, None)
    if rank != 3:
        sums["loss/mean"] = torch.tensor(float(rank + 1))
    result = reduce_sums({} if rank == 1 else sums, contributes=rank in (0, 2))
    empty = reduce_sums({}, contributes=rank == 0)
    refused = ""
    try:
        reduce_sums({"unknown": torch.zeros(())}, contributes=False)
    except ValueError as error:
        refused = str(error)
    return result, empty, len(calls), refused


def test_only_contributing_ranks_count_and_all_agree() -> None:
    results = spawn(_reduced, 4)
    first, empty, num_calls, refused = results[0]
    assert all(result[0] == first for result in results)
    assert num_calls == 2 and "unknown" in refused
    parts = [token_sums(OBJECTIVE, random_stats(n, seed=r), None) for r, n in ((0, 10), (2, 20))]
    expected = metrics_of({key: parts[0][key] + parts[1][key] for key in parts[0]})
    assert first == pytest.approx({**expected, "loss/mean": (1 + 3) / 30}, rel=1e-12)
    assert empty == {"loss/num_tokens": 0}
