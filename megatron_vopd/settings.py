"""From the configuration to the numbers that a step is made of. Below, nothing reads config."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_vopd.config import Config
from megatron_vopd.config.method import ObjectiveSection
from megatron_vopd.objectives import Objective, ObjectiveSettings

# (estimator, direction) -> key of objectives.OBJECTIVES. Other pairs are refused by config.rules.
_OBJECTIVE_NAMES = {
    ("sampled", "reverse"): "sampled",
    ("exact", "reverse"): "reverse",
    ("exact", "forward"): "forward",
    ("exact", "mixed"): "mixed",
    ("topk", "reverse"): "topk_reverse",
    ("hard", "reverse"): "hard",
}


@dataclass(frozen=True)
class StepSettings:
    """What a step is made of.

    Attributes:
        objective: what is minimised.
        num_prompts, samples_per_prompt: responses of a step.
        prefix_fractions: share of the prompts by source: student (an engine samples), teacher or
            dataset (given responses); the shares sum to 1.
        temperature, top_p, stop_ids: how responses are drawn.
        max_tokens_per_microbatch: longest row.
        max_staleness: policy versions that rollouts may lag; 1 overlaps generation.
        task_reward_weight: of the group-normalised grade in the advantage; 0: none.
        spike_factor, max_consecutive_skips: of the step guard.
        deadline_seconds: longest wait for the rollouts of a step.
        seed: of the run.
        replay_dir: where batches of skipped steps are written; None: nowhere.
    """

    objective: Objective
    num_prompts: int
    samples_per_prompt: int = 1
    prefix_fractions: dict[str, float] = field(default_factory=lambda: {"student": 1.0})
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    max_tokens_per_microbatch: int = 8192
    max_staleness: int = 0
    task_reward_weight: float = 0.0
    spike_factor: float = 10.0
    max_consecutive_skips: int = 5
    deadline_seconds: float = 1800.0
    seed: int = 0
    replay_dir: Path | None = None

    @property
    def num_given(self) -> int:
        """Responses of a step that are given, not sampled."""
        share = 1 - self.prefix_fractions.get("student", 0.0)
        return round(share * self.num_prompts) * self.samples_per_prompt

    @property
    def num_asked(self) -> int:
        """Prompts of a step that an engine answers."""
        return self.num_prompts - self.num_given // self.samples_per_prompt


def objective_of(section: ObjectiveSection, temperature: float = 1.0) -> Objective:
    """The objective that a configuration asks for.

    Args:
        temperature: of the rollouts, at which both models are compared.
    """
    settings = ObjectiveSettings(
        baseline=section.baseline,
        reverse_weight=section.reverse_weight,
        importance=section.importance,
        importance_cap=section.importance_cap,
        entropy_gate=section.entropy_gate,
        reward_floor=section.reward_floor,
    )
    name = _OBJECTIVE_NAMES[section.estimator, section.direction]
    return Objective(name, settings, section.topk, temperature)


def step_settings(
    config: Config, stop_ids: tuple[int, ...] = (), replay_dir: Path | None = None
) -> StepSettings:
    """Settings of a step from a whole configuration.

    Args:
        stop_ids: ids that end a response, from the models and `data.eos_contract`.
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
