"""The protocol between training and whatever samples responses.

An engine belongs to one data-parallel leader. All of its methods are called from the main thread,
and each ends within the engine's deadline: with its result, or with an EngineError that names the
phase. After an EngineError the engine holds no usable weights until the next `update_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_vopd.types import Prompt, Rollout, UserError


class EngineError(RuntimeError):
    """The engine failed, hung or answered wrongly: phase, engine, what was seen."""


class SamplingError(UserError):
    """Sampling settings that the objective cannot be computed from."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_tokens: longest response.
        samples: responses per prompt.
        temperature, top_p: of the distribution sampled; temperature 0 is greedy (evaluation).
        seed: of the step; each response's own seed is derived from it, its prompt id and its
            sample number, so that the spread of prompts over engines does not change samples.
        stop_ids: ids that end a response (they are part of it).
    """

    max_tokens: int
    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PushReport:
    """What one weight push did."""

    policy_version: int
    num_bytes: int
    seconds: float


Progress = Callable[[int, int], None]  # finished responses, all responses


class Engine(Protocol):
    """What training asks of an engine; `vllm_local`, `vllm_server` and `scripted` are three."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """`samples` rollouts of each prompt, ordered by prompt, then by sample."""
        ...

    def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PushReport:
        """Replace all weights by the HF-named `tensors`, all of them or none (R5)."""
        ...

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(ids[i] | ids[:i]) for i >= 1 of each sequence, by the weights that sample now."""
        ...

    def sleep(self) -> None:
        """Give device memory back between generations, where the engine can."""
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...

    def close(self) -> None:
        """Stop the engine and every process it started. May be called twice."""
        ...
