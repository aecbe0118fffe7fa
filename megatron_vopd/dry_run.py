"""One step on random tokens: does everything fit, before a long run is started.

Models, optimizer, teachers and data are those of the run, at its longest prompts' rows and at the
last rung of the length ladder, so memory is what the run will need. No engine is started: on a GPU
that one shares, `rollout.memory_fraction` of the memory comes on top.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_vopd.config import Config
from megatron_vopd.config.schema import CurriculumSection
from megatron_vopd.rollout.engine import (
    GenerationReport,
    Progress,
    PushReport,
    Sampling,
    generation_report,
    response_seed,
)
from megatron_vopd.types import Prompt, Rollout


def at_full_length(config: Config) -> Config:
    """The configuration with the longest responses from the first step on."""
    longest = CurriculumSection(kind="fixed", ladder=(config.max_response_tokens,))
    return config.model_copy(update={"curriculum": longest})


class RandomEngine:
    """An `Engine` that answers every prompt with uniformly random ids of the full length."""

    num_replicas = 1

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.policy_version: int | None = 0
        self.generation: GenerationReport | None = None
        self.shared_dtype: torch.dtype | None = None

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """Ids that end no response, with the log-prob of the uniform distribution."""
        ids = [i for i in range(self._vocab_size) if i not in sampling.stop_ids]
        logprobs = (-math.log(len(ids)),) * sampling.max_tokens
        rollouts = []
        for prompt in prompts:
            for sample in range(sampling.samples):
                draw = random.Random(response_seed(sampling.seed, prompt.prompt_id, sample))
                response = tuple(draw.choices(ids, k=sampling.max_tokens))
                rollouts.append(Rollout(prompt, sample, response, logprobs, "length", 0))
        self.generation = generation_report(rollouts, 0.0)
        return rollouts

    def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PushReport:
        """Accepts every push, and reads it to the end."""
        num_bytes = sum(tensor.nbytes for _, tensor in tensors)
        self.policy_version = policy_version
        return PushReport(policy_version, num_bytes, 0.0)

    def probe_logprobs(
        self, sequences: Sequence[Sequence[int]], replica: int = 0
    ) -> list[list[float]]:
        """Nothing that it says of a sequence would be true."""
        raise NotImplementedError("a random engine has no weights")

    def refuse_weights(self, reason: str) -> None:
        self.policy_version = None

    def sleep(self) -> None:
        """It holds no memory."""

    def wake(self) -> None:
        """Nothing slept."""

    def close(self) -> None:
        """Nothing was started."""
