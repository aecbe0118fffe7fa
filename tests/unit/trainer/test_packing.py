"""Microbatches hold every response token once, in balance, in equal number."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_vopd.errors import UserError
from megatron_vopd.megatron.microbatch import PackingSettings, deal
from megatron_vopd.trainer.packing import balanced_bins, pack
from megatron_vopd.types import Prompt, Rollout, TensorNumbers
from tests.support.data_cases import random_rollouts


def _labels(rows: list[list]) -> list[int]:
    return sorted(int(i) for replica in rows for row in replica for i in row.microbatch.labels_T)


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
    for planned in (row for rows in replicas for row in rows):
        row = planned.microbatch
        assert (planned.size, planned.num_tokens) == (len(row.ids_S), row.num_tokens)
        assert planned.rollouts == row.rollouts and planned.lengths == row.lengths
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


def test_a_load_that_no_bin_holds_is_refused() -> None:
    """F20: more bins would never help; a search for enough of them has no end."""
    with pytest.raises(AssertionError, match="a load of 11 in bins of 10"):
        balanced_bins([3, 11], 2, 10)


class Sealed(Sequence[int]):
    """Numbers whose count may be known, and which note when they are looked at."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers, self.looked = tuple(numbers), False

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        self.looked = True
        return self.numbers[index]


def test_a_plan_looks_at_lengths_alone_and_a_rank_at_its_own_rows() -> None:
    """F20: of 40 responses a rank of four replicas reads those that it trains, no others."""
    plain = [rollout for rollout in random_rollouts(40, 3) if rollout.response_ids]
    sealed: list[Any] = [replace(r, response_ids=Sealed(r.response_ids)) for r in plain]
    settings = PackingSettings(4, 80)
    replicas = pack(sealed, settings, [0.5] * len(sealed))
    assert not any(rollout.response_ids.looked for rollout in sealed)
    for row in replicas[1]:
        assert row.microbatch is row.microbatch
    own = {index for row in replicas[1] for index in row.rollouts}
    looked = {i for i, rollout in enumerate(sealed) if rollout.response_ids.looked}
    assert looked == own and 0 < len(own) < len(sealed) / 3


def _eager(
    rollouts: Sequence[Rollout], members: Sequence[int], settings: PackingSettings, grade: Any
) -> tuple[list[int], list[int], list[int], list[int], list[float], list[float]]:
    """Build a row of Python's numbers, token by token."""
    ids, lengths, rows, labels, logprobs, advantages = [], [], [], [], [], []
    for rollout in (rollouts[index] for index in members):
        start, count = len(ids), len(rollout.response_ids)
        for place, token in enumerate([*rollout.prompt.ids, *rollout.response_ids][:-1]):
            ids.append(token)
            if place >= len(rollout.prompt.ids) - 1:
                rows.append(start + place)
        while (len(ids) - start) % settings.segment:
            ids.append(0)
        lengths.append(len(ids) - start)
        labels += rollout.response_ids
        logprobs += rollout.rollout_logprobs or [math.nan] * count
        advantages += [grade(rollout)] * count
    start = len(ids)
    while not ids or len(ids) % (settings.alignment * settings.segment):
        ids.append(0)
    return (
        ids,
        lengths + [len(ids) - start] * (len(ids) > start),
        rows,
        labels,
        logprobs,
        advantages,
    )


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_rows_are_those_of_a_plan_that_builds_all(seed: int, as_tensors: bool) -> None:
    """F20: bits of every tensor, whether responses come as tuples or in tensors."""
    draw = random.Random(seed)
    rollouts = random_rollouts(25, seed, teachers=2)
    settings = PackingSettings(3, 120, draw.choice([1, 4]), draw.choice([1, 2]))
    grades = {rollout.prompt.prompt_id: draw.uniform(-2, 2) for rollout in rollouts}
    given = [_in_tensors(rollout) for rollout in rollouts] if as_tensors else rollouts
    replicas = pack(given, settings, [grades[r.prompt.prompt_id] for r in rollouts])
    assert given == rollouts
    for row in (row for rows in replicas for row in rows):
        expected = _eager(rollouts, row.rollouts, settings, lambda r: grades[r.prompt.prompt_id])
        ids, lengths, rows, labels, logprobs, advantages = expected
        built = row.microbatch
        assert (built.ids_S.tolist(), list(built.lengths)) == (ids, lengths)
        assert (built.rows_T.tolist(), built.labels_T.tolist()) == (rows, labels)
        tensors = (built.ids_S, built.rows_T, built.labels_T)
        assert {tensor.dtype for tensor in tensors} == {torch.int64}
        assert built.task_advantage_T is not None
        assert torch.equal(built.task_advantage_T, torch.tensor(advantages))
        if any(rollouts[index].rollout_logprobs is not None for index in row.rollouts):
            assert built.rollout_logprob_T is not None
            expected_T = torch.tensor(logprobs)
            assert built.rollout_logprob_T.dtype == expected_T.dtype == torch.float32
            same = built.rollout_logprob_T.view(torch.int32) == expected_T.view(torch.int32)
            assert same.all()
        else:
            assert built.rollout_logprob_T is None


def _in_tensors(rollout: Rollout) -> Rollout:
    logprobs = rollout.rollout_logprobs
    return replace(
        rollout,
        response_ids=TensorNumbers(torch.tensor(rollout.response_ids, dtype=torch.int64)),
        rollout_logprobs=None
        if logprobs is None
        else TensorNumbers(torch.tensor(logprobs, dtype=torch.float64)),
    )


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
