"""Rollouts packed into microbatches: rows balanced by tokens over the student's data parallelism.

Pure: the plan follows from the rollouts alone, so every rank that has the same rollouts computes
the same plan. A sequence is never split over rows. All replicas get equally many microbatches; one
that lacks sequences gets rows of filling alone, without response tokens, which add nothing to loss
and gradient and keep collectives in step.

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

import torch

from megatron_vopd.errors import UserError
from megatron_vopd.megatron.microbatch import FILLING_ID, Microbatch, PackingSettings, deal
from megatron_vopd.types import Rollout


def pack(
    rollouts: Sequence[Rollout],
    settings: PackingSettings,
    task_advantages: Sequence[float] | None = None,
) -> list[list[Microbatch]]:
    """Pack rollouts into the microbatches of each data-parallel replica.

    Rollouts without a response are left out. All sequences of a row have the same teacher.

    Args:
        rollouts: of the whole step, the same on every rank.
        settings: number of replicas, and size and alignment of rows.
        task_advantages: one number per rollout, given to each of its tokens; None: no task reward.

    Returns:
        One list per replica, all equally long, with at least one microbatch; tensors are on the
        CPU, whole rows (not cut over cp).

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
        loads: sizes, none above `capacity`.
        multiple: the number of bins is a multiple of this.
        capacity: largest sum of a bin's loads.
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


def _row(
    rollouts: Sequence[Rollout],
    members: tuple[int, ...],
    teacher: str,
    settings: PackingSettings,
    task_advantages: Sequence[float] | None,
) -> Microbatch:
    """Build the row of the rollouts at indices `members`; of filling alone without any."""
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
