"""The numbers that a step is made of. run/settings fills them from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vopd.objectives import Objective


@dataclass(frozen=True)
class StepSettings:
    """The numbers that a step is made of, none with a default: those are the configuration's.

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
    samples_per_prompt: int
    prefix_fractions: dict[str, float]
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    max_tokens_per_microbatch: int
    max_staleness: int
    task_reward_weight: float
    spike_factor: float
    max_consecutive_skips: int
    deadline_seconds: float
    seed: int
    replay_dir: Path | None

    @property
    def num_given(self) -> int:
        """Responses of a step that are given, not sampled."""
        share = 1 - self.prefix_fractions.get("student", 0.0)
        return round(share * self.num_prompts) * self.samples_per_prompt

    @property
    def num_asked(self) -> int:
        """Prompts of a step that an engine answers."""
        return self.num_prompts - self.num_given // self.samples_per_prompt
