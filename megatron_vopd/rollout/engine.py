"""The protocol between training and whatever samples responses.

An engine belongs to one data-parallel leader. Its methods are called one at a time (`generate` of a
step that is sampled ahead from another thread than the rest), and each ends within the engine's
deadline: with its result, or with an EngineError that names the phase. After an EngineError the
engine holds no usable weights until the next `update_weights`, which also starts what has to be
started again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_vopd.errors import UserError
from megatron_vopd.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """The way in which responses are drawn.

    Attributes:
        max_tokens: longest response.
        samples: responses per prompt.
        temperature, top_p: of the distribution sampled; temperature 0 is greedy (evaluation).
        seed: of the step; each response's own seed is derived from it, its prompt id and its
            sample number, so that the spread of prompts over engines does not change samples.
        stop_ids: ids that end a response (they are part of it).

    Raises:
        UserError: a value out of its range.
    """

    max_tokens: int
    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("samples", self.samples >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop_ids", all(i >= 0 for i in self.stop_ids), "token ids, 0 or more"),
        ):
            if not fits:
                raise UserError(f"sampling {name}: got {getattr(self, name)}, expected {expected}")


def response_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Return a response's seed, 0 <= seed < 2^63, the same wherever and whenever it is sampled."""
    text = f"{seed}\0{prompt_id}\0{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class PushReport:
    """The report of one weight push.

    Attributes:
        policy_version: version that the engine reports now.
        num_bytes: size of all tensors, each counted once.
        seconds: time from the first tensor to the engine's answer that it samples from them.
        num_tensors: HF tensors sent.
        probe_gap: largest |log-prob of the engine - of the trainer| over the probe, nats; None:
            not probed.
        attempts: pushes it took; more than one means that an engine was rebuilt.
    """

    policy_version: int
    num_bytes: int
    seconds: float
    num_tensors: int = 0
    probe_gap: float | None = None
    attempts: int = 1

    @property
    def gigabytes_per_second(self) -> float:
        """Rate of the push in 10^9 bytes per second."""
        return self.num_bytes / 1e9 / max(self.seconds, 1e-9)

    def metrics(self) -> dict[str, float]:
        """Return the run's metrics of this push."""
        found = {
            "time/weight_sync_seconds": self.seconds,
            "weight_sync/bytes": float(self.num_bytes),
            "weight_sync/gigabytes_per_second": self.gigabytes_per_second,
            "weight_sync/attempts": float(self.attempts),
        }
        return (
            found if self.probe_gap is None else found | {"weight_sync/probe_gap": self.probe_gap}
        )


@dataclass(frozen=True)
class GenerationReport:
    """The report of one call of `generate`; lengths are of responses, in tokens."""

    seconds: float
    num_responses: int
    num_tokens: int
    max_length: int
    num_truncated: int

    def metrics(self) -> dict[str, float]:
        """Return the run's metrics of this call, also of one that sampled nothing."""
        responses = max(self.num_responses, 1)
        return {
            "time/rollout_seconds": self.seconds,
            "rollout/tokens_per_second": self.num_tokens / max(self.seconds, 1e-9),
            "rollout/length_mean": self.num_tokens / responses,
            "rollout/length_max": float(self.max_length),
            "rollout/truncated_frac": self.num_truncated / responses,
            "rollout/eos_frac": 1 - self.num_truncated / responses,
        }


def generation_report(rollouts: Sequence[Rollout], seconds: float) -> GenerationReport:
    """Count what was sampled in `seconds`."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    truncated = sum(rollout.finish_reason == "length" for rollout in rollouts)
    return GenerationReport(
        seconds, len(rollouts), sum(lengths), max(lengths, default=0), truncated
    )


Progress = Callable[[int, int], None]  # finished responses, all responses


class Engine(Protocol):
    """The methods that training needs of an engine; `vllm.local` and `vllm.server` have them.

    Attributes:
        policy_version: version of the weights that it samples from; None: it has none.
        num_replicas: copies of the weights that sample, each probed by itself (servers).
        shared_dtype: type of the weights that it reads from this machine's memory; None: it does
            not read them there.
        generation: report of the last `generate`.
    """

    policy_version: int | None
    generation: GenerationReport | None

    @property
    def num_replicas(self) -> int: ...

    @property
    def shared_dtype(self) -> torch.dtype | None: ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """Sample `samples` rollouts of each prompt, ordered by prompt, then by sample."""
        ...

    def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PushReport:
        """Replace all weights by the HF-named `tensors`, all of them or none (R5)."""
        ...

    def probe_logprobs(
        self, sequences: Sequence[Sequence[int]], replica: int = 0
    ) -> list[list[float]]:
        """Score log p(ids[i] | ids[:i]), i >= 1, of each sequence by the weights that sample now.

        The last one is computed as sampling does, from cached keys and values where there are any.
        """
        ...

    def refuse_weights(self, reason: str) -> None:
        """Drop weights that turned out wrong: no more samples until the next `update_weights`."""
        ...

    def sleep(self, keeps_weights: bool) -> None:
        """Give device memory back until the next push or generation, where the engine can.

        Args:
            keeps_weights: False: a push comes before the next generation, so that the weights may
                be dropped; an engine that drops them has none until then.
        """
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...

    def close(self) -> None:
        """Stop the engine and every process it started. May be called twice."""
        ...


def step_seed(seed: int, step: int | str) -> int:
    """Return the seed of a step's sampling, or of a named one's; 0 <= seed < 2^63."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
