# ruff: noqa: N815  (field names carry shapes, like every name here)
"""Rollouts -> microbatches: packed rows, balanced by tokens over the student's data parallelism.

Pure: the plan follows from the rollouts alone, so every rank that has the same rollouts computes
the same plan. A sequence is never split over rows. All replicas get equally many microbatches; one
that lacks sequences gets rows of a single token with no response, which add nothing to loss and
gradient and keep collectives in step.

A sequence enters as prompt + response without its last token: nothing is predicted from that one.
The hidden state at row position `rows_T[t]` predicts `labels_T[t]`.

Context parallelism cuts every sequence into 2 cp equal chunks and gives rank r the chunks r and
2 cp - 1 - r (megatron-core's and TransformerEngine's order, which balances causal attention).
Sequences are filled up to a multiple of 2 cp for that. The loss sums over the responses that a rank
holds, and megatron-core adds sums and counts over dp x cp: the token mean does not notice the cut.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vopd.types import Rollout, UserError

# Fills rows up; any id of the vocabulary would do, since no response token sees it.
FILLING_ID = 0


@dataclass(frozen=True)
class Microbatch:
    """One packed row, and what the loss needs to know of its T response tokens.

    Attributes:
        ids_S: [S] int64 token ids, sequence after sequence; on a cp rank its chunks only.
        lengths: tokens of each sequence, filling included; of the whole row, on cp ranks too.
        rows_T: [T] int64 positions in `ids_S` whose hidden states predict the response.
        labels_T: [T] int64 response ids.
        rollout_logprob_T: [T] fp32 log mu, NaN for responses no engine sampled; None: all of them.
        task_advantage_T: [T] fp32 task reward, weighted; None: none.
        teacher: key of the teacher that scores all of the row.
        rollouts: index of each sequence in the list that was packed.
    """

    ids_S: Tensor
    lengths: tuple[int, ...]
    rows_T: Tensor
    labels_T: Tensor
    rollout_logprob_T: Tensor | None
    task_advantage_T: Tensor | None
    teacher: str
    rollouts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return len(self.labels_T)


@dataclass(frozen=True)
class PackingSettings:
    """How rows are made.

    Attributes:
        num_replicas: data-parallel replicas of the student.
        max_tokens: longest row; a row may exceed it by less than `alignment`.
        alignment: rows are filled up to a multiple (tp under sequence parallelism).
        cp: context-parallel size of the student.
    """

    num_replicas: int
    max_tokens: int
    alignment: int = 1
    cp: int = 1

    @property
    def segment(self) -> int:
        """Sequences are filled up to a multiple of this."""
        return 2 * self.cp if self.cp > 1 else 1


def pack(
    rollouts: Sequence[Rollout],
    settings: PackingSettings,
    task_advantages: Sequence[float] | None = None,
) -> list[list[Microbatch]]:
    """Microbatches of each data-parallel replica, equally many; at least one.

    Rollouts without a response are left out. A row belongs to one teacher.

    Args:
        task_advantages: one per rollout, the same for each of its tokens.

    Raises:
        UserError: a sequence that does not fit into a row; a response without a prompt.
    """
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        if rollout.response_ids:
            groups.setdefault(rollout.prompt.teacher, []).append(index)
    sizes = {
        index: _sequence_size(rollouts[index], settings)
        for indices in groups.values()
        for index in indices
    }
    replicas: list[list[Microbatch]] = [[] for _ in range(settings.num_replicas)]
    for teacher, indices in sorted(groups.items()) or [("", [])]:
        loads = [sizes[index] for index in indices]
        bins = balanced_bins(loads, settings.num_replicas, settings.max_tokens)
        totals = [sum(loads[i] for i in members) for members in bins]
        for own, dealt in zip(replicas, deal(totals, settings.num_replicas), strict=True):
            for position in dealt:
                members = tuple(indices[i] for i in bins[position])
                own.append(_row(rollouts, members, teacher, settings, task_advantages))
    return replicas


def _sequence_size(rollout: Rollout, settings: PackingSettings) -> int:
    prompt = rollout.prompt
    if not prompt.ids:
        raise UserError(f"prompt {prompt.prompt_id}: no tokens; give a prompt of at least one")
    size = len(prompt.ids) + len(rollout.response_ids) - 1
    size += -size % settings.segment
    if size > settings.max_tokens:
        raise UserError(
            f"prompt {prompt.prompt_id}: prompt and response have {size} tokens, a row holds "
            f"{settings.max_tokens}; set train.max_tokens_per_microbatch={size} or shorten them"
        )
    return size


def balanced_bins(loads: Sequence[int], multiple: int, capacity: int) -> list[list[int]]:
    """Indices of `loads` in bins of at most `capacity`; the number of bins is a multiple.

    Longest first into the lightest bin; as few bins as that allows.
    """
    rounds = max(1, math.ceil(sum(loads) / (multiple * capacity)))
    order = sorted(range(len(loads)), key=lambda i: (-loads[i], i))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * multiple)]
        heap = [(0, position) for position in range(len(bins))]
        for index in order:
            load, position = heapq.heappop(heap)
            bins[position].append(index)
            heapq.heappush(heap, (load + loads[index], position))
        if max(load for load, _ in heap) <= capacity:
            return bins
        rounds += 1


def deal(loads: Sequence[int], num_hands: int) -> list[list[int]]:
    """Indices of `loads` dealt out heaviest first, back and forth: hands differ by one at most."""
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    for turn, index in enumerate(sorted(range(len(loads)), key=lambda i: (-loads[i], i))):
        lap, seat = divmod(turn, num_hands)
        hands[seat if lap % 2 == 0 else num_hands - 1 - seat].append(index)
    return hands


def _row(
    rollouts: Sequence[Rollout],
    members: tuple[int, ...],
    teacher: str,
    settings: PackingSettings,
    task_advantages: Sequence[float] | None,
) -> Microbatch:
    ids: list[int] = []
    lengths, rows, labels = [], [], []
    logprobs: list[float] = []
    advantages: list[float] = []
    for index in members:
        rollout = rollouts[index]
        prompt_ids, response_ids = rollout.prompt.ids, rollout.response_ids
        first = len(ids) + len(prompt_ids) - 1
        rows.extend(range(first, first + len(response_ids)))
        labels.extend(response_ids)
        ids.extend([*prompt_ids, *response_ids[:-1]])
        size = len(prompt_ids) + len(response_ids) - 1
        ids.extend([FILLING_ID] * (-size % settings.segment))
        lengths.append(size + -size % settings.segment)
        logprobs.extend(rollout.rollout_logprobs or [math.nan] * len(response_ids))
        if task_advantages is not None:
            advantages.extend([task_advantages[index]] * len(response_ids))
    multiple = settings.alignment * settings.segment
    filling = -len(ids) % multiple or (0 if ids else multiple)
    if filling:
        ids.extend([FILLING_ID] * filling)
        lengths.append(filling)
    sampled = any(rollouts[index].rollout_logprobs is not None for index in members)
    return Microbatch(
        torch.tensor(ids, dtype=torch.int64),
        tuple(lengths),
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(logprobs, dtype=torch.float32) if sampled else None,
        None if task_advantages is None else torch.tensor(advantages, dtype=torch.float32),
        teacher,
        members,
    )


def empty_row(like: Microbatch) -> Microbatch:
    """A row without responses for the same teacher, as replicas without data get it."""
    none = torch.zeros(0, dtype=torch.int64)
    segment = like.lengths[-1:]  # a length that is a multiple of whatever lengths must be
    ids_S = torch.full(segment, FILLING_ID, dtype=torch.int64)
    return Microbatch(ids_S, segment, none, none, None, None, like.teacher, ())


def cp_chunks(lengths: Sequence[int], rank: int, cp: int) -> Tensor:
    """Positions of a whole row that cp rank `rank` holds [S / cp], in its local order.

    Args:
        lengths: of the sequences, multiples of 2 cp (any, when cp is 1).
    """
    if cp == 1:
        return torch.arange(sum(lengths))
    parts, start = [], 0
    for length in lengths:
        assert length % (2 * cp) == 0, (length, cp)
        chunk = length // (2 * cp)
        for position in (rank, 2 * cp - 1 - rank):
            parts.append(torch.arange(start + position * chunk, start + (position + 1) * chunk))
        start += length
    return torch.cat(parts)


def cp_tokens(row: Microbatch, rank: int, cp: int) -> Tensor:
    """Which of the row's response tokens cp rank `rank` trains: indices into T, ascending."""
    if cp == 1:
        return torch.arange(row.num_tokens)
    held = torch.zeros(len(row.ids_S), dtype=torch.bool)
    held[cp_chunks(row.lengths, rank, cp)] = True
    return held[row.rows_T].nonzero()[:, 0]


def cp_shard(row: Microbatch, rank: int, cp: int) -> Microbatch:
    """The part of a whole row that cp rank `rank` runs; the row itself when cp is 1."""
    if cp == 1:
        return row
    positions, tokens = cp_chunks(row.lengths, rank, cp), cp_tokens(row, rank, cp)
    local = torch.empty(len(row.ids_S), dtype=torch.int64)
    local[positions] = torch.arange(len(positions))
    logprobs, advantages = row.rollout_logprob_T, row.task_advantage_T
    return replace(
        row,
        ids_S=row.ids_S[positions],
        rows_T=local[row.rows_T[tokens]],
        labels_T=row.labels_T[tokens],
        rollout_logprob_T=None if logprobs is None else logprobs[tokens],
        task_advantage_T=None if advantages is None else advantages[tokens],
    )


def group_advantages(rollouts: Sequence[Rollout], grades: Sequence[float]) -> list[float]:
    """(grade - mean) / standard deviation over the samples of the same prompt; 0 where all agree.

    The deviation is the population's, so that the advantages of a group have variance one.
    """
    groups: dict[str, list[float]] = {}
    for rollout, grade in zip(rollouts, grades, strict=True):
        groups.setdefault(rollout.prompt.prompt_id, []).append(grade)
    moments = {}
    for prompt_id, values in groups.items():
        mean = sum(values) / len(values)
        moments[prompt_id] = mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    advantages = []
    for rollout, grade in zip(rollouts, grades, strict=True):
        mean, deviation = moments[rollout.prompt.prompt_id]
        advantages.append((grade - mean) / deviation if deviation > 1e-9 else 0.0)
    return advantages
