"""The data of a run as two tensors and back: one rank reads and tokenizes it, the others get it.

Token ids are one vector; names, answers, teachers and lengths are JSON, so nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.data.prompts import Prompts
from megatron_vopd.types import Prompt, Rollout


@dataclass(frozen=True)
class ReadData:
    """The prompts and responses that were read of a run's data sets.

    Attributes:
        problems: task -> its problems, when the run evaluates.
        given: all given responses, in the order of the data.
        training: prompts for the engine; None: those of the given responses.
    """

    problems: dict[str, Prompts]
    given: tuple[Rollout, ...]
    training: Prompts | None


def to_tensors(data: ReadData) -> tuple[Tensor, Tensor]:
    """Return all token ids, int32 [n], and everything else as JSON, uint8 [m]."""
    lists: list[Sequence[int]] = []

    def prompt_row(prompt: Prompt) -> list[Any]:
        lists.append(prompt.ids)
        return [prompt.prompt_id, prompt.answer, prompt.teacher, len(prompt.ids)]

    def prompts_of(prompts: Prompts) -> dict[str, Any]:
        rows = [prompt_row(prompt) for prompt in prompts.prompts]
        return {"num_too_long": prompts.num_too_long, "rows": rows}

    def response_row(rollout: Rollout) -> list[Any]:
        assert rollout.rollout_logprobs is None and rollout.policy_version == -1
        row = prompt_row(rollout.prompt)
        lists.append(rollout.response_ids)
        return [*row, rollout.sample, len(rollout.response_ids), rollout.finish_reason]

    content = {
        "problems": {task: prompts_of(prompts) for task, prompts in data.problems.items()},
        "given": [response_row(rollout) for rollout in data.given],
        "training": None if data.training is None else prompts_of(data.training),
    }
    ids = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int32)
    return ids, torch.frombuffer(bytearray(json.dumps(content).encode("ascii")), dtype=torch.uint8)


def from_tensors(
    ids: Tensor, text: Tensor, shared: Callable[[Sequence[int]], tuple[int, ...]]
) -> ReadData:
    """Rebuild what `to_tensors` was given.

    Args:
        shared: makes the tuple of a list of ids (`PromptTokenizer.shared`, which spares memory).
    """
    content = json.loads(text.numpy().tobytes())
    at = 0

    def taken(count: int) -> tuple[int, ...]:
        nonlocal at
        at += count
        return shared(ids[at - count : at].tolist())

    def prompt(name: str, answer: str | None, teacher: str, count: int) -> Prompt:
        return Prompt(name, taken(count), answer, teacher)

    def prompts(stored: dict[str, Any]) -> Prompts:
        return Prompts([prompt(*row) for row in stored["rows"]], stored["num_too_long"])

    def responses() -> Iterator[Rollout]:
        for *row, sample, count, finish in content["given"]:
            yield Rollout(prompt(*row), sample, taken(count), None, finish, -1)

    problems = {task: prompts(stored) for task, stored in content["problems"].items()}
    given = tuple(responses())
    training = content["training"]
    return ReadData(problems, given, None if training is None else prompts(training))
