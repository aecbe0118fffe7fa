"""Settings of the packages below, made from the configuration, which they do not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from megatron_vopd.config.method import CurriculumSection, ObjectiveSection
from megatron_vopd.config.schema import Config, EvaluationSection
from megatron_vopd.curriculum import Curriculum, EntropyGatedLength, FixedLength, LinearLength
from megatron_vopd.objectives import Objective, ObjectiveSettings
from megatron_vopd.rollout.engine import Sampling, step_seed
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.evaluation import Evaluator
from megatron_vopd.trainer.settings import StepSettings
from megatron_vopd.types import Prompt


def build_curriculum(section: CurriculumSection) -> Curriculum:
    """Build the curriculum that a configuration asks for."""
    if section.kind == "fixed":
        return FixedLength(section.ladder)
    if section.kind == "linear":
        return LinearLength(section.ladder, section.interval)
    return EntropyGatedLength(
        section.ladder,
        section.min_entropy,
        section.min_entropy_fraction,
        section.interval,
        section.ema,
    )


def objective_of(section: ObjectiveSection, temperature: float) -> Objective:
    """Return the objective that a configuration asks for.

    Args:
        temperature: that of the rollouts, at which both models are compared.
    """
    names = [field.name for field in fields(ObjectiveSettings)]
    settings = ObjectiveSettings(**{name: getattr(section, name) for name in names})
    return Objective(section.name, settings, section.topk, temperature)


def step_settings(
    config: Config, stop_ids: tuple[int, ...], replay_dir: Path | None
) -> StepSettings:
    """Return the settings of a step from a whole configuration.

    Args:
        stop_ids: ids that end a response, from the models and `data.eos_contract`.
        replay_dir: where batches of skipped steps are written; None: nowhere.
    """
    rollout, train = config.rollout, config.train
    return StepSettings(
        objective=objective_of(config.objective, rollout.temperature),
        num_prompts=rollout.num_prompts,
        samples_per_prompt=rollout.samples_per_prompt,
        prefix_fractions=config.objective.prefix_fractions,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        stop_ids=stop_ids,
        max_tokens_per_microbatch=train.max_tokens_per_microbatch,
        max_staleness=rollout.max_staleness,
        task_reward_weight=config.objective.task_reward_weight,
        spike_factor=train.spike_factor,
        max_consecutive_skips=train.max_consecutive_skips,
        deadline_seconds=rollout.deadline_seconds,
        seed=config.run.seed,
        replay_dir=replay_dir,
    )


def evaluator_of(
    section: EvaluationSection,
    problems: Mapping[str, Sequence[Prompt]],
    collector: RolloutCollector,
    stop_ids: tuple[int, ...],
    seed: int,
    num_steps: int,
) -> Evaluator:
    """Make the evaluator that a configuration asks for.

    Args:
        problems: task -> its problems.
        collector: one with a grader.
        stop_ids: ids that end a response.
        seed: seed of the run.
        num_steps: optimizer steps of the run.
    """
    sampling = Sampling(
        max_tokens=section.max_tokens,
        samples=section.samples,
        temperature=section.temperature,
        top_p=section.top_p,
        seed=step_seed(seed, "evaluation"),
        stop_ids=stop_ids,
    )
    return Evaluator(problems, collector, sampling, section.interval, section.k, num_steps)
