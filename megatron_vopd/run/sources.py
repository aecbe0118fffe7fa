"""The data of a run: prompts to answer, ready responses, and problems to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vopd.collectives import all_ranks, some_ranks, tensor_of_rank_0
from megatron_vopd.config.schema import Config
from megatron_vopd.data.parcel import ReadData, from_tensors, to_tensors
from megatron_vopd.data.prompts import (
    Prompts,
    PromptTokenizer,
    TrainingPrompts,
    load_evaluation_prompts,
    load_training_prompts,
    training_prompts,
)
from megatron_vopd.data.responses import load_responses
from megatron_vopd.data.stream import PromptStream
from megatron_vopd.hf.folder import ModelFolder
from megatron_vopd.types import Rollout


@dataclass(frozen=True)
class Sources:
    """The data of a run.

    Attributes:
        prompts: prompts for the engine; with given responses alone, their prompts.
        responses: stream of given responses; None: there are none.
        given: all given responses, in the order of the data.
        problems: task -> its problems, when the run evaluates.
        summary: log lines.
    """

    prompts: TrainingPrompts
    responses: PromptStream[Rollout] | None
    given: tuple[Rollout, ...]
    problems: dict[str, Prompts]
    summary: tuple[str, ...]


def load_sources(
    config: Config,
    tokenizer: PromptTokenizer,
    stop_ids: tuple[int, ...],
    models: Mapping[str, ModelFolder],
    device: str,
) -> Sources:
    """Read the data that the objective's prefixes and the evaluation ask for.

    Rank 0 reads and tokenizes, however long that takes; the others get the result by broadcasts: 4
    bytes per token, and the names and answers as text. Every rank of the world calls it.

    Args:
        stop_ids: ids that end a response.
        models: the student, and by its key each teacher that scores.
        device: of the tensors that are sent.

    Raises:
        DataError: naming the file and line; on the other ranks a UserError of the same line.
    """

    def read() -> ReadData:
        data, teachers = config.data, list(config.named_teachers)
        problems = load_evaluation_prompts(data, tokenizer) if config.evaluates else {}
        given: tuple[Rollout, ...] = ()
        if set(config.objective.prefix_fractions) - {"student"}:
            context = models["student"].facts.max_positions
            context = min(context, config.max_sequence_tokens)
            vocab_size = min(model.facts.vocab_size for model in models.values())
            known = (teachers, stop_ids, context, vocab_size)
            given = tuple(load_responses(data, tokenizer, *known).rollouts)
            if not config.has_rollouts and data.train is None:
                return ReadData(problems, given, None)
        needs_answer = config.objective.task_reward_weight > 0
        training = load_training_prompts(data, tokenizer, teachers, needs_answer)
        return ReadData(problems, given, training)

    found = _from_rank_0(read, tokenizer, device)
    gated = config.curriculum.kind == "entropy_gated"
    num_held_out = config.curriculum.held_out_prompts if gated else 0
    return all_ranks(_sources, found, num_held_out, config.run.seed)


def _from_rank_0(read: Callable[[], ReadData], tokenizer: PromptTokenizer, device: str) -> ReadData:
    """Read on rank 0, and return on every rank what it read."""
    found = some_ranks(read if dist.get_rank() == 0 else None)
    if dist.get_world_size() > 1:
        ids, text = (None, None) if found is None else to_tensors(found)
        ids = tensor_of_rank_0(ids, torch.int32, device)
        text = tensor_of_rank_0(text, torch.uint8, device)
        found = found or from_tensors(ids, text, tokenizer.shared)
    assert found is not None, "rank 0 has read the data"
    return found


def _sources(read: ReadData, num_held_out: int, seed: int) -> Sources:
    """Make the streams of what was read, the same on every rank."""
    given = read.given
    summary = [
        f"evaluation: {task}, {len(found.prompts)} problems, {found.num_too_long} left out as "
        "too long"
        for task, found in read.problems.items()
    ]
    responses = PromptStream(given, seed) if given else None
    if read.training is None:
        unused = TrainingPrompts(PromptStream([r.prompt for r in given], seed), [], 0)
        return Sources(unused, responses, given, read.problems, tuple(summary))
    prompts = training_prompts(read.training, num_held_out, seed)
    counts = f"{len(prompts.stream)} prompts, {prompts.num_too_long} left out as too long"
    summary.append(f"data: {counts}, {len(prompts.held_out)} held out")
    return Sources(prompts, responses, given, read.problems, tuple(summary))
