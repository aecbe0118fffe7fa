"""Microbatches hold every response token once, in balance, in equal number; cp cuts them fairly."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_vopd.errors import UserError
from megatron_vopd.megatron.microbatch import (
    PackingSettings,
    cp_chunks,
    cp_shard,
    cp_tokens,
    deal,
    empty_row,
)
from megatron_vopd.megatron.teacher import teacher_plan
from megatron_vopd.objectives import group_advantages
from megatron_vopd.trainer.packing import balanced_bins, pack
from megatron_vopd.types import Prompt, Rollout


def _rollouts(num: int, seed: int, teachers: int = 1) -> list[Rollout]:
    """Random ones; some responses are empty, some not sampled by an engine."""
    draw = random.Random(seed)
    rollouts = []
    for i in range(num):
        prompt_ids = tuple(draw.randrange(100, 200) for _ in range(draw.randint(1, 12)))
        length = draw.choice([0, 1, 2, draw.randint(3, 40)])
        ids = tuple(draw.randrange(1000 * i + 1000, 1000 * i + 1999) for _ in range(length))
        logprobs = tuple(-draw.random() for _ in ids) if draw.random() < 0.7 else None
        prompt = Prompt(f"p{i}", prompt_ids, None, f"t{draw.randrange(teachers)}")
        rollouts.append(Rollout(prompt, 0, ids, logprobs, "stop", 0))
    return rollouts


def _labels(rows: list[list]) -> list[int]:
    return sorted(int(i) for replica in rows for row in replica for i in row.labels_T)


@pytest.mark.parametrize("seed", range(40))
def test_every_response_token_once_and_at_its_place(seed: int) -> None:
    draw = random.Random(seed)
    rollouts = _rollouts(draw.randrange(0, 30), seed, teachers=draw.choice([1, 3]))
    settings = PackingSettings(
        num_replicas=draw.choice([1, 2, 3, 4]),
        max_tokens=draw.choice([56, 80, 200]),
        alignment=draw.choice([1, 2, 4]),
        cp=draw.choice([1, 2]),
    )
    advantages = [float(i) for i in range(len(rollouts))]
    replicas = pack(rollouts, settings, advantages)
    assert len(replicas) == settings.num_replicas
    assert len({len(rows) for rows in replicas}) == 1 and len(replicas[0]) >= 1
    assert _labels(replicas) == sorted(i for r in rollouts for i in r.response_ids)
    for row in (row for rows in replicas for row in rows):
        assert sum(row.lengths) == len(row.ids_S) > 0
        assert len(row.ids_S) % settings.alignment == 0
        assert all(length % settings.segment == 0 for length in row.lengths)
        assert len(row.ids_S) < settings.max_tokens + settings.alignment * settings.segment
        at = 0
        for position, index in enumerate(row.rollouts):
            rollout, start = rollouts[index], sum(row.lengths[:position])
            assert rollout.prompt.teacher == row.teacher
            length = len(rollout.response_ids)
            here = slice(at, at + length)
            known = [*rollout.prompt.ids, *rollout.response_ids]
            # The state at the row's position has seen exactly the ids before the label.
            for t, place in enumerate(row.rows_T[here].tolist()):
                seen = row.ids_S[start : place + 1].tolist()
                assert seen == known[: len(rollout.prompt.ids) + t]
            assert row.labels_T[here].tolist() == list(rollout.response_ids)
            assert row.task_advantage_T is not None
            assert row.task_advantage_T[here].tolist() == [float(index)] * length
            if rollout.rollout_logprobs is not None:
                assert row.rollout_logprob_T is not None
                expected = torch.tensor(rollout.rollout_logprobs)
                assert torch.equal(row.rollout_logprob_T[here], expected)
            elif row.rollout_logprob_T is not None:
                assert row.rollout_logprob_T[here].isnan().all()
            at += length
        assert at == row.num_tokens


def test_rows_are_balanced() -> None:
    """No replica has more than one sequence's worth of tokens above another."""
    for seed in range(20):
        draw = random.Random(seed)
        loads = [draw.randint(1, 60) for _ in range(50)]
        bins = balanced_bins(loads, 4, 256)
        sums = [sum(loads[i] for i in members) for members in bins]
        assert sorted(i for members in bins for i in members) == list(range(50))
        assert max(sums) <= 256 and max(sums) - min(sums) <= 60
        # Rounds of 4 bins; one round less would not hold the tokens, or nearly.
        assert len(bins) % 4 == 0 and len(bins) <= 4 * (math.ceil(sum(loads) / (4 * 256)) + 1)
        hands = deal(sums, 4)
        totals = [sum(sums[i] for i in hand) for hand in hands]
        assert len({len(hand) for hand in hands}) == 1
        assert max(totals) - min(totals) <= 60


def test_a_sequence_that_fits_only_alone_gets_its_row() -> None:
    assert sorted(map(len, balanced_bins([10, 10, 10], 1, 10))) == [1, 1, 1]
    assert sorted(map(len, balanced_bins([10, 10, 10], 2, 10))) == [0, 1, 1, 1]


def test_replicas_without_data_get_a_row_of_one_token() -> None:
    (first,), (second,) = pack(_rollouts(1, 2), PackingSettings(2, 100))
    assert first.num_tokens > 0 and second.num_tokens == 0 and second.lengths == (1,)
    for rows in pack([], PackingSettings(2, 100, alignment=4)):
        assert [row.lengths for row in rows] == [(4,)]


def test_refusals_say_what_to_do() -> None:
    long = Rollout(Prompt("long", (1, 2)), 0, (3,) * 20, None, "length", -1)
    with pytest.raises(UserError, match=r"prompt long: .* 21 tokens, a row holds 20; set train\."):
        pack([long], PackingSettings(1, 20))
    with pytest.raises(UserError, match="prompt none: no tokens"):
        pack([Rollout(Prompt("none", ()), 0, (3,), None, "stop", -1)], PackingSettings(1, 20))


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_context_parallel_shards_cover_the_row_once(cp: int) -> None:
    settings = PackingSettings(1, 400, alignment=2, cp=cp)
    rollouts = _rollouts(12, 5)
    (rows,) = pack(rollouts, settings, [1.0] * 12)
    for row in rows:
        shards = [cp_shard(row, rank, cp) for rank in range(cp)]
        chunks = [cp_chunks(row.lengths, rank, cp) for rank in range(cp)]
        assert sorted(torch.cat(chunks).tolist()) == list(range(len(row.ids_S)))
        assert len({len(shard.ids_S) for shard in shards}) == 1
        tokens = [cp_tokens(row, rank, cp) for rank in range(cp)]
        assert sorted(torch.cat(tokens).tolist()) == list(range(row.num_tokens))
        for shard, chunk, own in zip(shards, chunks, tokens, strict=True):
            assert shard.lengths == row.lengths
            assert torch.equal(shard.ids_S, row.ids_S[chunk])
            assert torch.equal(shard.labels_T, row.labels_T[own])
            # The local position points to the same place of the whole row.
            assert torch.equal(chunk[shard.rows_T], row.rows_T[own])


def test_chunks_of_a_sequence_are_those_of_megatron() -> None:
    """Rank r holds chunks r and 2 cp - 1 - r of each sequence."""
    assert cp_chunks([8, 4], 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert cp_chunks([8, 4], 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


def test_teacher_replicas_score_equally_many_rows() -> None:
    plan = teacher_plan([5, 9, 1, 7, 3], 2)
    assert sorted(i for hand in plan for i in hand if i is not None) == [0, 1, 2, 3, 4]
    assert [len(hand) for hand in plan] == [3, 3]
    (row,) = pack(_rollouts(3, 1), PackingSettings(1, 200, alignment=4))[0]
    filling = empty_row(row)
    assert filling.num_tokens == 0 and sum(filling.lengths) == len(filling.ids_S)


def test_group_advantages_are_centred_with_unit_variance() -> None:
    prompts = [Prompt(name, (1,)) for name in "abc"]
    rollouts = [Rollout(p, s, (1,), None, "stop", -1) for p in prompts for s in range(4)]
    grades = [0, 1, 1, 0, 5, 5, 5, 5, -1, 0, 2, 4]
    values = group_advantages(rollouts, grades)
    assert values[:4] == [-1, 1, 1, -1]
    assert values[4:8] == [0, 0, 0, 0]
    assert abs(sum(values[8:])) < 1e-12
    assert abs(sum(v * v for v in values[8:]) / 4 - 1) < 1e-12
