"""The exchange of rollouts: from the ranks that generated them to the same list on every rank.

Two all-gathers: integers (order, sample, length, finish reason, version, whether log-probs follow,
then the response ids) and fp64 numbers (grade, then log-probs), each padded to the largest
contribution; lengths are gathered first. Prompts are not sent: every rank drew the same ones.
Callers exchange errors before (`collectives.first_error`), so that a rank whose engine failed makes
all ranks raise instead of leaving them in a collective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.data.grading import Outcome
from megatron_vopd.megatron.microbatch import as_tensor
from megatron_vopd.types import FinishReason, Prompt, Rollout, TensorNumbers

_HEADER = 6
_FINISH: tuple[FinishReason, ...] = ("stop", "length")


@dataclass(frozen=True)
class Graded:
    """A rollout with its place in the step's list, and its grade (NaN: not graded)."""

    order: int
    rollout: Rollout
    grade: float = math.nan


def share_rollouts(
    own: Sequence[Graded], prompts: Sequence[Prompt], samples: int, device: torch.device | str
) -> list[Graded]:
    """Return the rollouts of all ranks, sorted by `order`, on every rank.

    A collective of the whole world: two all-gathers of padded vectors, int64 and fp64. Ids and
    log-probs are `TensorNumbers`, parts of these vectors: a rank reads those that it needs.

    Args:
        own: rollouts of this rank, in any order; may be empty.
        prompts: prompts of the step, the same on every rank; rollout `order` answers prompt
            `order // samples`.
        samples: responses per prompt.
        device: device of the vectors that are gathered.
    """
    integers, numbers = _encode(own)
    all_integers, all_numbers = (_gather(part.to(device)) for part in (integers, numbers))
    shared = [
        graded
        for ints, floats in zip(all_integers, all_numbers, strict=True)
        for graded in _decode(ints, floats, prompts, samples)
    ]
    return sorted(shared, key=lambda graded: graded.order)


def share_outcomes(own: Sequence[Graded], device: torch.device | str) -> list[Outcome]:
    """Return grade and length of every rank's rollouts, sorted by `order`, on every rank.

    A collective of the whole world: an all-gather of four fp64 numbers for each rollout. Tokens
    are not sent.

    Args:
        own: rollouts of this rank, in any order; may be empty.
        device: device of the vector that is gathered.
    """
    numbers = [
        (one.order, one.grade, len(one.rollout.response_ids), one.rollout.finish_reason == "length")
        for one in own
    ]
    flat = [float(number) for row in numbers for number in row]
    gathered = _gather(torch.tensor(flat, dtype=torch.float64, device=device))
    rows = sorted(tuple(row) for part in gathered for row in part.view(-1, 4).tolist())
    return [Outcome(grade, int(length), bool(cut)) for _, grade, length, cut in rows]


def _encode(own: Sequence[Graded]) -> tuple[Tensor, Tensor]:
    """Flatten rollouts into int64 and fp64 numbers, from which `_decode` rebuilds them."""
    integers, numbers = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.float64)]
    for graded in own:
        rollout = graded.rollout
        length, finish = len(rollout.response_ids), _FINISH.index(rollout.finish_reason)
        has_logprobs = int(rollout.rollout_logprobs is not None)
        header = (graded.order, rollout.sample, length, finish, rollout.policy_version)
        integers.append(torch.tensor((*header, has_logprobs)))
        integers.append(as_tensor(rollout.response_ids, torch.int64))
        numbers.append(torch.tensor([graded.grade], dtype=torch.float64))
        numbers.append(as_tensor(rollout.rollout_logprobs or (), torch.float64))
    return torch.cat(integers), torch.cat(numbers)


def _decode(
    integers: Tensor, numbers: Tensor, prompts: Sequence[Prompt], samples: int
) -> list[Graded]:
    """Rebuild the rollouts that one rank has encoded; ids and log-probs stay in the tensors."""
    found, at, number_at = [], 0, 0
    while at < len(integers):
        header = integers[at : at + _HEADER].tolist()
        order, sample, length, finish, version, has_logprobs = header
        at += _HEADER
        grade, logprobs = float(numbers[number_at]), None
        number_at += 1
        if has_logprobs:
            logprobs = TensorNumbers(numbers[number_at : number_at + length])
            number_at += length
        prompt = prompts[order // samples]
        ids = TensorNumbers(integers[at : at + length])
        at += length
        rollout = Rollout(prompt, sample, ids, logprobs, _FINISH[finish], version)
        found.append(Graded(order, rollout, grade))
    return found


def _gather(own: Tensor) -> list[Tensor]:
    """Gather one-dimensional tensors of different lengths; return them by rank, on the CPU."""
    world = range(dist.get_world_size())
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in world]
    dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
    longest = max(int(size) for size in sizes)
    padded = own.new_zeros(longest)
    padded[: len(own)] = own
    everyone = [torch.empty_like(padded) for _ in world]
    dist.all_gather(everyone, padded)
    return [row[: int(size)].cpu() for row, size in zip(everyone, sizes, strict=True)]
