"""An engine without a model, for tests: repeatable, instant, and able to misbehave on request.

Each prompt has a distribution of its own, from which every token of its responses is drawn, so that
`logprobs` can say of any response whether it belongs to a prompt. The engine holds no weights, only
digests of those it was given. It stands in for vLLM where a test is about what surrounds an
engine, never as the proof that an engine works.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_vopd.errors import EngineError
from megatron_vopd.rollout.engine import (
    GenerationReport,
    Progress,
    PushReport,
    Sampling,
    generation_report,
    response_seed,
)
from megatron_vopd.rollout.weights.memory_file import digest
from megatron_vopd.types import Prompt, Rollout

Fault = str  # one of FAULTS
FAULTS = (
    "empty",
    "one_token",
    "too_long",
    "too_few",
    "too_many",
    "duplicates",
    "reordered",
    "out_of_range",
    "nan",
    "none",
    "exception",
    "timeout",
    "stale_version",
    "swapped_responses",
    "not_sampled",
    "positive_logprob",
)


class ScriptedEngine:
    """An engine that draws responses without a model, and misbehaves on request.

    Attributes:
        weights: name -> digest of every tensor of the last push.

    Args:
        vocab_size: ids are drawn from 0 <= id < vocab_size.
        faults: number of a `generate` call (from 0) -> what goes wrong in it.
        push_faults: numbers of `update_weights` calls that fail.
        shared_dtype: see `Engine`.
    """

    num_replicas = 1

    def __init__(
        self,
        vocab_size: int,
        faults: Mapping[int, Fault] | None = None,
        push_faults: Sequence[int] = (),
        shared_dtype: torch.dtype | None = None,
    ) -> None:
        self.shared_dtype = shared_dtype
        self.vocab_size = vocab_size
        self.policy_version: int | None = None
        self.generation: GenerationReport | None = None
        self.weights: dict[str, str] = {}
        self.num_generations = self.num_pushes = 0
        self.is_asleep = self.is_closed = False
        self._faults = dict(faults or {})
        assert set(self._faults.values()) <= set(FAULTS), faults
        self._push_faults = set(push_faults)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """Sample from each prompt's distribution; make a call faulty as asked for."""
        fault = self._faults.get(self.num_generations)
        self.num_generations += 1
        self.wake()
        if self.policy_version is None:
            raise EngineError("scripted engine, generate: no weights were pushed")
        if fault in ("exception", "timeout"):
            self.policy_version = None
            raise EngineError(f"scripted engine, generate: {fault}")
        rollouts = [
            self._rollout(prompt, sample, sampling)
            for prompt in prompts
            for sample in range(sampling.samples)
        ]
        if progress is not None:
            progress(len(rollouts), len(rollouts))
        if fault is not None:
            rollouts = _misbehave(rollouts, fault, sampling, self.vocab_size)
        self.generation = generation_report(rollouts, 0.0)
        return rollouts

    def _rollout(self, prompt: Prompt, sample: int, sampling: Sampling) -> Rollout:
        assert self.policy_version is not None
        draw = random.Random(response_seed(sampling.seed, prompt.prompt_id, sample))
        ids: list[int] = []
        weights = _weights(prompt.ids, self.vocab_size)
        while len(ids) < sampling.max_tokens and (not ids or ids[-1] not in sampling.stop_ids):
            ids += draw.choices(range(self.vocab_size), weights)
        return Rollout(
            prompt=prompt,
            sample=sample,
            response_ids=tuple(ids),
            rollout_logprobs=tuple(self.logprobs(prompt.ids, ids)),
            finish_reason="stop" if ids[-1] in sampling.stop_ids else "length",
            policy_version=self.policy_version,
        )

    def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Return the log-probs of a response under its prompt's distribution."""
        weights = _weights(prompt_ids, self.vocab_size)
        total = math.log(sum(weights))
        return [math.log(weights[i]) - total for i in response_ids]

    def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PushReport:
        """Keep a digest of each tensor."""
        number = self.num_pushes
        self.num_pushes += 1
        self.policy_version = None
        weights, num_bytes = {}, 0
        for name, tensor in tensors:
            if number in self._push_faults and weights:
                raise EngineError("scripted engine, push: fails as asked for")
            weights[name] = digest(tensor.detach().contiguous())
            num_bytes += tensor.nbytes
        self.weights, self.policy_version = weights, policy_version
        return PushReport(policy_version, num_bytes, 0.0, len(weights))

    def probe_logprobs(
        self, sequences: Sequence[Sequence[int]], replica: int = 0
    ) -> list[list[float]]:
        """Return the log-probs of a probe, whose first id is the prompt."""
        return [self.logprobs(ids[:1], ids[1:]) for ids in sequences]

    def refuse_weights(self, reason: str) -> None:
        """Refuse to sample until the next push."""
        self.policy_version = None

    def sleep(self, keeps_weights: bool) -> None:
        """Record the call only."""
        self.is_asleep = True

    def wake(self) -> None:
        """Record the call only."""
        self.is_asleep = False

    def close(self) -> None:
        """Record the call only."""
        self.is_closed = True


def _weights(prompt_ids: Sequence[int], vocab_size: int) -> list[float]:
    """Return unnormalised probabilities [V], within a factor of 20 of one another."""
    draw = random.Random(repr(tuple(prompt_ids)))
    return [0.05 + 0.95 * draw.random() for _ in range(vocab_size)]


def _misbehave(
    rollouts: list[Rollout], fault: Fault, sampling: Sampling, vocab_size: int
) -> list[Rollout]:
    """Make one fault, in the first rollout or between the first and the last."""
    first, last, middle = rollouts[0], rollouts[-1], rollouts[1:-1]
    ids = tuple(first.response_ids)
    assert first.rollout_logprobs is not None
    logprobs = tuple(first.rollout_logprobs)

    def with_response(new_ids: tuple[int, ...], new_logprobs: tuple | None) -> list[Rollout]:
        changed = replace(first, response_ids=new_ids, rollout_logprobs=new_logprobs)
        return [changed, *rollouts[1:]]

    long = ids + (0,) * (sampling.max_tokens + 1 - len(ids))
    swapped = [
        replace(
            one,
            response_ids=other.response_ids,
            rollout_logprobs=other.rollout_logprobs,
            finish_reason=other.finish_reason,
        )
        for one, other in ((first, last), (last, first))
    ]
    made = {
        "empty": with_response((), ()),
        "one_token": with_response(ids[:1], logprobs[:1]),
        "too_long": with_response(long, (logprobs[0],) * len(long)),
        "too_few": rollouts[:-1],
        "too_many": [*rollouts, replace(last, sample=sampling.samples)],
        "duplicates": [first, *middle, first],
        "reordered": [last, *middle, first],
        "out_of_range": with_response((vocab_size, *ids[1:]), logprobs),
        "nan": with_response(ids, (math.nan, *logprobs[1:])),
        "none": with_response(ids, None),
        "stale_version": [replace(first, policy_version=first.policy_version - 1), *rollouts[1:]],
        "swapped_responses": [swapped[0], *middle, swapped[1]],
        "not_sampled": with_response(ids, logprobs[:-1]),
        "positive_logprob": with_response(ids, (0.5, *logprobs[1:])),
    }
    return made[fault]
