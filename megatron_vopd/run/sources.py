"""The data of a run: prompts to answer, ready responses, and problems to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vopd.config.schema import Config
from megatron_vopd.data.prompts import (
    Prompts,
    PromptTokenizer,
    TrainingPrompts,
    load_evaluation_prompts,
    load_training_prompts,
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
) -> Sources:
    """Read the data that the objective's prefixes and the evaluation ask for.

    Args:
        stop_ids: ids that end a response.
        models: the student, and by its key each teacher that scores.

    Raises:
        DataError: naming the file and line.
    """
    data, seed, teachers = config.data, config.run.seed, list(config.named_teachers)
    problems = load_evaluation_prompts(data, tokenizer) if config.evaluates else {}
    summary = [
        f"evaluation: {task}, {len(found.prompts)} problems, {found.num_too_long} left out as "
        "too long"
        for task, found in problems.items()
    ]
    given: tuple[Rollout, ...] = ()
    responses = None
    if set(config.objective.prefix_fractions) - {"student"}:
        context = models["student"].facts.max_positions
        context = min(context, config.max_sequence_tokens)
        vocab_size = min(model.facts.vocab_size for model in models.values())
        known = (teachers, stop_ids, context, vocab_size)
        given = tuple(load_responses(data, tokenizer, *known).rollouts)
        responses = PromptStream(given, seed)
        if not config.has_rollouts and data.train is None:
            unused = TrainingPrompts(PromptStream([r.prompt for r in given], seed), [], 0)
            return Sources(unused, responses, given, problems, tuple(summary))
    gated = config.curriculum.kind == "entropy_gated"
    num_held_out = config.curriculum.held_out_prompts if gated else 0
    needs_answer = config.objective.task_reward_weight > 0
    prompts = load_training_prompts(data, tokenizer, teachers, needs_answer, num_held_out, seed)
    counts = f"{len(prompts.stream)} prompts, {prompts.num_too_long} left out as too long"
    summary.append(f"data: {counts}, {len(prompts.held_out)} held out")
    return Sources(prompts, responses, given, problems, tuple(summary))
