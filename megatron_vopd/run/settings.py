"""From a configuration to the objective and the settings of a step. Below, nothing reads config."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from megatron_vopd.config import Config
from megatron_vopd.config.method import ObjectiveSection
from megatron_vopd.objectives import Objective, ObjectiveSettings
from megatron_vopd.trainer.settings import StepSettings


def objective_of(section: ObjectiveSection, temperature: float) -> Objective:
    """Return the objective that a configuration asks for.

    Args:
        temperature: of the rollouts, at which both models are compared.
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
