# ruff: noqa: N815  (field names carry shapes, like every name here)
"""One packed row of sequences, planned and built, and how context parallelism cuts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_vopd.types import TensorNumbers, sequence_multiple

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
class Row:
    """One row of a step's plan. Every rank knows it; its tensors are made on ranks that need them.

    Attributes:
        lengths, teacher, rollouts: of the microbatch.
        num_tokens: response tokens.
        build: makes the microbatch.
    """

    lengths: tuple[int, ...]
    num_tokens: int
    teacher: str
    rollouts: tuple[int, ...]
    build: Callable[[], Microbatch]

    @property
    def size(self) -> int:
        """Tokens of the row, filling included."""
        return sum(self.lengths)

    @cached_property
    def microbatch(self) -> Microbatch:
        """The row's tensors, whole (not cut over cp), on the CPU; made once."""
        return self.build()


@dataclass(frozen=True)
class PackingSettings:
    """The sizes by which rows are made.

    Attributes:
        num_replicas: data-parallel replicas of the student.
        max_tokens: longest row; a row may exceed it by less than `alignment` x `segment`.
        alignment: rows are filled up to a multiple (tp under sequence parallelism).
        cp: context-parallel size of the student.
    """

    num_replicas: int
    max_tokens: int
    alignment: int = 1
    cp: int = 1

    @property
    def segment(self) -> int:
        """Tokens to whose multiple each sequence is filled up."""
        return sequence_multiple(self.cp)


def as_tensor(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return ids or log-probs of a response as a tensor on the CPU; not to be written to."""
    if isinstance(numbers, TensorNumbers):
        return numbers.values.to(dtype)
    return torch.tensor(numbers, dtype=dtype)


def deal(loads: Sequence[int], num_hands: int) -> list[list[int]]:
    """Deal out indices of `loads`, heaviest first, back and forth; hands differ by one at most."""
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    for turn, index in enumerate(sorted(range(len(loads)), key=lambda i: (-loads[i], i))):
        lap, seat = divmod(turn, num_hands)
        hands[seat if lap % 2 == 0 else num_hands - 1 - seat].append(index)
    return hands


def empty_row(like: Row) -> Microbatch:
    """Return a row without responses for the teacher of `like`, for replicas without data."""
    none = torch.zeros(0, dtype=torch.int64)
    segment = like.lengths[-1:]  # a length that is a multiple of whatever lengths must be
    ids_S = torch.full(segment, FILLING_ID, dtype=torch.int64)
    return Microbatch(ids_S, segment, none, none, None, None, like.teacher, ())


def filled_row(row: Microbatch, multiple: int) -> Microbatch:
    """Return the row with filling behind its last sequence, up to a multiple of tokens."""
    filling = -len(row.ids_S) % multiple
    if not filling:
        return row
    ids_S = torch.cat([row.ids_S, torch.full((filling,), FILLING_ID, dtype=torch.int64)])
    return replace(row, ids_S=ids_S, lengths=(*row.lengths, filling))


def cp_chunks(lengths: Sequence[int], rank: int, cp: int) -> Tensor:
    """Return the positions of a whole row that cp rank `rank` holds, [S / cp], in its order.

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
    """Return which of the row's T response tokens cp rank `rank` trains: indices, ascending."""
    if cp == 1:
        return torch.arange(row.num_tokens)
    held = torch.zeros(len(row.ids_S), dtype=torch.bool)
    held[cp_chunks(row.lengths, rank, cp)] = True
    return held[row.rows_T].nonzero()[:, 0]


def cp_shard(row: Microbatch, rank: int, cp: int) -> Microbatch:
    """Return the part of a whole row that cp rank `rank` runs; the row itself when cp is 1."""
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
