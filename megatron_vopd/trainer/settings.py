"""From the configuration to the numbers that a step is made of. Below, nothing reads config."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_vopd.objectives import Objective


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
