"""Microbatches hold every response token once, in balance, in equal number."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_vopd.errors import UserError
from megatron_vopd.megatron.microbatch import PackingSettings, deal
from megatron_vopd.trainer.packing import balanced_bins, pack
from megatron_vopd.types import Prompt, Rollout
from tests.support.data_cases import random_rollouts


def _labels(rows: list[list]) -> list[int]:
    return sorted(int(i) for replica in rows for row in replica for i in row.labels_T)


@pytest.mark.parametrize("seed", range(40))
def test_every_response_token_once_and_at_its_place(seed: int) -> None:
    draw = random.Random(seed)
    rollouts = random_rollouts(draw.randrange(0, 30), seed, teachers=draw.choice([1, 3]))
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
    (first,), (second,) = pack(random_rollouts(1, 2), PackingSettings(2, 100))
    assert first.num_tokens > 0 and second.num_tokens == 0 and second.lengths == (1,)
    for rows in pack([], PackingSettings(2, 100, alignment=4)):
        assert [row.lengths for row in rows] == [(4,)]


def test_refusals_say_what_to_do() -> None:
    long = Rollout(Prompt("long", (1, 2)), 0, (3,) * 20, None, "length", -1)
    with pytest.raises(UserError, match=r"prompt long: .* 21 tokens, a row holds 20; set train\."):
        pack([long], PackingSettings(1, 20))
    with pytest.raises(UserError, match="prompt none: no tokens"):
        pack([Rollout(Prompt("none", ()), 0, (3,), None, "stop", -1)], PackingSettings(1, 20))
