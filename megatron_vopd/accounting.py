"""What came back from an engine is what was asked for, or it is not trained on (R6). Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_vopd.rollout.engine import EngineError, Sampling
from megatron_vopd.types import Prompt, Rollout

# A log-probability may exceed 0 by rounding.
LOGPROB_SLACK = 1e-3


class StalenessError(RuntimeError):
    """Rollouts from weights that are older than allowed, or newer than the trainer's."""


def require_answers(
    rollouts: Sequence[Rollout], prompts: Sequence[Prompt], sampling: Sampling, vocab_size: int
) -> None:
    """Check an engine's answer: every prompt, every sample, in order, of tokens that exist.

    Empty responses pass; they are counted and not trained.

    Raises:
        EngineError: what was expected and what came, and for which prompt.
    """
    expected = len(prompts) * sampling.samples
    if len(rollouts) != expected:
        raise EngineError(
            f"rollout: expected {len(prompts)} prompts x {sampling.samples} samples = {expected} "
            f"responses, got {len(rollouts)}"
        )
    for position, rollout in enumerate(rollouts):
        index, sample = divmod(position, sampling.samples)
        if (rollout.prompt, rollout.sample) != (prompts[index], sample):
            raise EngineError(
                f"rollout: response {position} should answer prompt {prompts[index].prompt_id} "
                f"sample {sample}, but is for {rollout.prompt.prompt_id} sample {rollout.sample}"
            )
        problem = _problem(rollout, sampling, vocab_size)
        if problem:
            raise EngineError(
                f"rollout: prompt {rollout.prompt.prompt_id} sample {sample}: {problem}"
            )


def _problem(rollout: Rollout, sampling: Sampling, vocab_size: int) -> str:
    ids, logprobs = rollout.response_ids, rollout.rollout_logprobs
    if len(ids) > sampling.max_tokens:
        return f"{len(ids)} tokens, longer than the {sampling.max_tokens} asked for"
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        return f"token id {outside[0]} is outside the vocabulary of {vocab_size}"
    if logprobs is None or len(logprobs) != len(ids):
        return f"{len(logprobs or ())} log-probabilities for {len(ids)} tokens"
    wrong = [value for value in logprobs if not -math.inf < value <= LOGPROB_SLACK]
    if wrong:
        return f"log-probability {wrong[0]} of a token that was sampled"
    if rollout.finish_reason not in ("stop", "length"):
        return f"finish reason {rollout.finish_reason!r}, expected stop or length"
    return ""


def require_version(rollouts: Sequence[Rollout], policy_version: int, max_staleness: int) -> None:
    """Check how far sampled rollouts lag behind the trainer's weights; given ones (-1) pass.

    Raises:
        StalenessError: naming both versions.
    """
    for rollout in rollouts:
        staleness = policy_version - rollout.policy_version
        if rollout.policy_version != -1 and not 0 <= staleness <= max_staleness:
            raise StalenessError(
                f"prompt {rollout.prompt.prompt_id} was answered by policy version "
                f"{rollout.policy_version}, the trainer is at {policy_version}; allowed lag "
                f"{max_staleness} (rollout.max_staleness)"
            )


def rollout_metrics(rollouts: Sequence[Rollout], policy_version: int) -> dict[str, float]:
    """`rollout/*` of one step: lengths in tokens, fractions of all responses."""
    if not rollouts:
        return {}
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    count = len(rollouts)
    lags = [policy_version - r.policy_version for r in rollouts if r.policy_version != -1]
    return {
        "rollout/length_mean": sum(lengths) / count,
        "rollout/length_max": float(max(lengths)),
        "rollout/empty_frac": lengths.count(0) / count,
        "rollout/truncated_frac": sum(r.finish_reason == "length" for r in rollouts) / count,
        "rollout/eos_frac": sum(r.finish_reason == "stop" for r in rollouts) / count,
        "rollout/staleness_mean": sum(lags) / len(lags) if lags else 0.0,
    }
