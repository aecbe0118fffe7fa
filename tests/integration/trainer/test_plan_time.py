"""F20: Python's time for a large step's plan on one of 64 replicas, against building all rows."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
import torch

from megatron_vopd.megatron.groups import init_single_process
from megatron_vopd.megatron.microbatch import PackingSettings
from megatron_vopd.trainer.exchange import Graded, share_rollouts
from megatron_vopd.trainer.packing import pack
from megatron_vopd.types import Prompt, Rollout, TensorNumbers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REPLICAS, SAMPLES = 64, 8


def _responses(number: int, length: int) -> tuple[list[Prompt], list[Graded]]:
    draw = random.Random(0)
    prompts = [Prompt(f"p{i}", tuple(range(200))) for i in range(number // SAMPLES)]
    graded = []
    for i in range(number):
        size = draw.randint(length // 2, length * 3 // 2)
        ids = TensorNumbers(torch.randint(0, 150_000, (size,)))
        logprobs = TensorNumbers(-torch.rand(size, dtype=torch.float64))
        rollout = Rollout(prompts[i // SAMPLES], i % SAMPLES, ids, logprobs, "stop", 0)
        graded.append(Graded(i, rollout, 0.5))
    return prompts, graded


def _lazy(prompts: list[Prompt], graded: list[Graded]) -> int:
    """Share, plan, and build the rows of two replicas: as many as a rank trains and scores."""
    shared = share_rollouts(graded, prompts, SAMPLES, "cpu")
    rows = pack([one.rollout for one in shared], PackingSettings(REPLICAS, 16_384), [0.5] * 10**6)
    return sum(row.microbatch.num_tokens for replica in rows[:2] for row in replica)


def _eager(graded: Sequence[Graded]) -> int:
    """Decode every response and build every row, of Python's numbers."""
    decoded = [
        (tuple(g.rollout.response_ids), tuple(g.rollout.rollout_logprobs or ())) for g in graded
    ]
    number = 0
    for begin in range(0, len(decoded), 4):
        ids, rows, labels, logprobs, advantages = [], [], [], [], []
        members = zip(graded[begin : begin + 4], decoded[begin : begin + 4], strict=True)
        for one, (response, own) in members:
            first = len(ids) + len(one.rollout.prompt.ids) - 1
            rows.extend(range(first, first + len(response)))
            labels.extend(response)
            ids.extend([*one.rollout.prompt.ids, *response[:-1]])
            logprobs.extend(own)
            advantages.extend([0.5] * len(response))
        for values in (ids, rows, labels):
            torch.tensor(values, dtype=torch.int64)
        for values in (logprobs, advantages):
            torch.tensor(values, dtype=torch.float32)
        number += len(labels)
    return number


@pytest.mark.parametrize(("number", "length"), [(512, 2048), (4096, 4096)])
def test_a_plan_costs_little_beside_building_all_rows(number: int, length: int) -> None:
    init_single_process()
    prompts, graded = _responses(number, length)
    seconds = {"lazy": 0.0, "eager": 0.0}
    for _ in range(2):
        for name in seconds:
            begin = time.process_time()
            count = _lazy(prompts, graded) if name == "lazy" else _eager(graded)
            seconds[name] = time.process_time() - begin
            assert count > number * length / REPLICAS
    ratio = seconds["eager"] / seconds["lazy"]
    print(f"\n{number * length:,} tokens: {seconds}, {ratio:.0f} x")
    # `_lazy` also encodes what 64 ranks would, each its part.
    assert ratio > 4
