"""The settings of a training step, which run/settings fills from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vopd.objectives import Objective


@dataclass(frozen=True)
class StepSettings:
    """The settings of a training step. None has a default: defaults are the configuration's.

    Attributes:
        objective: objective to minimise.
        num_prompts: prompts of a step.
        samples_per_prompt: responses to each prompt.
        prefix_fractions: share of the prompts by source: student (an engine samples), teacher or
            dataset (given responses); the shares sum to 1.
        temperature, top_p: distribution from which an engine samples.
        stop_ids: ids that end a response.
        max_tokens_per_microbatch: longest packed row, in tokens.
        max_staleness: policy versions that rollouts may lag, 0 or 1; 1 overlaps generation.
        task_reward_weight: weight of the group-normalised grade in the advantage; 0: none.
        spike_factor: multiple of the median gradient norm above which a step is skipped.
        max_consecutive_skips: skipped steps in a row that end the run.
        deadline_seconds: longest wait for the rollouts of a step.
        seed: seed of the run.
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
        """Number of responses of a step that are given, not sampled."""
        share = 1 - self.prefix_fractions.get("student", 0.0)
        return round(share * self.num_prompts) * self.samples_per_prompt

    @property
    def num_asked(self) -> int:
        """Number of prompts of a step that an engine answers."""
        return self.num_prompts - self.num_given // self.samples_per_prompt
