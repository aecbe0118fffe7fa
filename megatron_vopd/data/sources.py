"""The data of a run: prompts to answer, ready responses, and problems to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vopd.config import Config
from megatron_vopd.data.prompts import (
    Prompts,
    PromptTokenizer,
    TrainingPrompts,
    load_evaluation_prompts,
    load_training_prompts,
)
from megatron_vopd.data.responses import load_responses
from megatron_vopd.data.stream import PromptStream
from megatron_vopd.hf.folder import read_model_folder
from megatron_vopd.hf.hub import local_model_folder
from megatron_vopd.types import Rollout


@dataclass(frozen=True)
class Sources:
    """What a run's responses come from.

    Attributes:
        prompts: to be answered by an engine; with given responses alone, their prompts.
        responses: stream of given responses; None: there are none.
        given: all of them, in the order of the data.
        problems: task -> its problems, when the run evaluates.
        summary: lines for the reader.
    """

    prompts: TrainingPrompts
    responses: PromptStream[Rollout] | None
    given: tuple[Rollout, ...]
    problems: dict[str, Prompts]
    summary: tuple[str, ...]


def load_sources(
    config: Config, tokenizer: PromptTokenizer, stop_ids: tuple[int, ...], student_dir: str
) -> Sources:
    """Read what the objective's prefixes and the evaluation ask for.

    Args:
        stop_ids: of `stop_ids.stop_ids`.

    Raises:
        DataError: naming the file and line.
    """
    problems = load_evaluation_prompts(config, tokenizer) if config.evaluates else {}
    summary = [
        f"evaluation: {task}, {len(found.prompts)} problems, {found.num_too_long} left out as "
        "too long"
        for task, found in problems.items()
    ]
    fractions, responses = config.objective.prefix_fractions, None
    given: tuple[Rollout, ...] = ()
    if set(fractions) - {"student"}:
        student = read_model_folder(student_dir).facts
        context = min(student.max_positions, config.train.max_tokens_per_microbatch)
        vocab_size = min([student.vocab_size, *_teacher_vocabularies(config)])
        given = tuple(load_responses(config, tokenizer, stop_ids, context, vocab_size).rollouts)
        responses = PromptStream(given, config.run.seed)
        if not config.has_rollouts and config.data.train is None:
            prompts = [rollout.prompt for rollout in given]
            unused = TrainingPrompts(PromptStream(prompts, config.run.seed), [], 0)
            return Sources(unused, responses, given, problems, tuple(summary))
    prompts = load_training_prompts(config, tokenizer)
    counts = f"{len(prompts.stream)} prompts, {prompts.num_too_long} left out as too long"
    summary.append(f"data: {counts}, {len(prompts.held_out)} held out")
    return Sources(prompts, responses, given, problems, tuple(summary))


def _teacher_vocabularies(config: Config) -> list[int]:
    teachers = config.named_teachers if config.scores_with_teacher else {}
    folders = [local_model_folder(t.path, f"{key}.path") for key, t in teachers.items()]
    return [read_model_folder(folder).facts.vocab_size for folder in folders]
