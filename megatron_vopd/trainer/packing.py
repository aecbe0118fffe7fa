"""Rollouts packed into microbatches: rows balanced by tokens over the student's data parallelism.

Pure: the plan follows from the lengths alone, so every rank that has the same rollouts computes the
same plan, at a cost that does not grow with tokens; a rank then builds the rows that it scores or
trains, and no others. A sequence is never split over rows. All replicas get equally many
microbatches; one that lacks sequences gets rows of filling alone, without response tokens, which
add nothing to loss and gradient and keep collectives in step.

A sequence enters as prompt + response without its last token: nothing is predicted from that one.
The hidden state at row position `rows_T[t]` predicts `labels_T[t]`.

Context parallelism cuts every sequence into 2 cp equal chunks and gives rank r the chunks r and
2 cp - 1 - r (megatron-core's and TransformerEngine's order, which balances causal attention).
Sequences are filled up to a multiple of 2 cp for that. The loss sums over the responses that a rank
holds, and megatron-core adds sums and counts over dp x cp: the cut does not change the token mean.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import partial

import torch

from megatron_vopd.errors import UserError
from megatron_vopd.megatron.microbatch import (
    FILLING_ID,
    Microbatch,
    PackingSettings,
    Row,
    as_tensor,
    deal,
)
from megatron_vopd.types import Rollout


def pack(
    rollouts: Sequence[Rollout],
    settings: PackingSettings,
    task_advantages: Sequence[float] | None = None,
) -> list[list[Row]]:
    """Plan the rows of each data-parallel replica.

    Rollouts without a response are left out. All sequences of a row have the same teacher.

    Args:
        rollouts: of the whole step, the same on every rank.
        settings: number of replicas, and size and alignment of rows.
        task_advantages: one number per rollout, given to each of its tokens; None: no task reward.

    Returns:
        One list per replica, all equally long, with at least one row. No token is looked at before
        a row's `microbatch` is asked for.

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
    replicas: list[list[Row]] = [[] for _ in range(settings.num_replicas)]
    for teacher, indices in sorted(groups.items()) or [("", [])]:
        loads = [sizes[index] for index in indices]
        bins = balanced_bins(loads, settings.num_replicas, settings.max_tokens)
        totals = [sum(loads[i] for i in members) for members in bins]
        for own, dealt in zip(replicas, deal(totals, settings.num_replicas), strict=True):
            for position in dealt:
                members = tuple(indices[i] for i in bins[position])
                lengths = _lengths([sizes[index] for index in members], settings)
                num_tokens = sum(len(rollouts[index].response_ids) for index in members)
                build = partial(_build, rollouts, members, lengths, teacher, task_advantages)
                own.append(Row(lengths, num_tokens, teacher, members, build))
    return replicas


def _sequence_size(rollout: Rollout, settings: PackingSettings) -> int:
    """Return the tokens that a sequence takes in a row, filling included."""
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
    """Place the indices of `loads` in bins of at most `capacity`.

    The heaviest load goes first, each into the lightest bin; as few bins as that allows.

    Args:
        loads: sizes, none above `capacity`: no number of bins would do.
        multiple: the number of bins is a multiple of this.
        capacity: largest sum of a bin's loads.
    """
    assert max(loads, default=0) <= capacity, f"a load of {max(loads)} in bins of {capacity}"
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


def _lengths(sizes: Sequence[int], settings: PackingSettings) -> tuple[int, ...]:
    """Return the lengths of a row's sequences, and of the filling behind them where there is any.

    A row without sequences is filling alone.
    """
    multiple = settings.alignment * settings.segment
    filling = -sum(sizes) % multiple or (0 if sizes else multiple)
    return (*sizes, filling) if filling else tuple(sizes)


def _build(
    rollouts: Sequence[Rollout],
    members: tuple[int, ...],
    lengths: tuple[int, ...],
    teacher: str,
    task_advantages: Sequence[float] | None,
) -> Microbatch:
    """Build the row of the rollouts at indices `members`; of filling alone without any."""
    ids_S = torch.full((sum(lengths),), FILLING_ID, dtype=torch.int64)
    sampled = any(rollouts[index].rollout_logprobs is not None for index in members)
    none = torch.zeros(0, dtype=torch.int64)
    rows, labels, logprobs, advantages = [none], [none], [none.float()], [none.float()]
    start = 0
    for index, length in zip(members, lengths, strict=False):
        rollout = rollouts[index]
        prompt_ids = torch.tensor(rollout.prompt.ids, dtype=torch.int64)
        response_ids = as_tensor(rollout.response_ids, torch.int64)
        first, size = start + len(prompt_ids) - 1, len(response_ids)
        ids_S[start : first + 1] = prompt_ids
        ids_S[first + 1 : first + size] = response_ids[:-1]
        rows.append(torch.arange(first, first + size))
        labels.append(response_ids)
        if rollout.rollout_logprobs is None:
            logprobs.append(torch.full((size,), math.nan))
        else:
            logprobs.append(as_tensor(rollout.rollout_logprobs, torch.float32))
        if task_advantages is not None:
            advantages.append(torch.full((size,), task_advantages[index]))
        start += length
    return Microbatch(
        ids_S,
        lengths,
        torch.cat(rows),
        torch.cat(labels),
        torch.cat(logprobs) if sampled else None,
        None if task_advantages is None else torch.cat(advantages),
        teacher,
        members,
    )
