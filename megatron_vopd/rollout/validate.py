"""Checks of rollouts before any of them is trained on (R6): what does not fit is refused.

An engine that returns something else than what was asked for has a fault, and the step is sampled
again. No rollout is repaired or dropped: that would quietly change the objective. Responses that
were swapped between prompts fit every check; `mismatch/kl` shows them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_vopd.errors import EngineError
from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.types import Prompt, Rollout

MAX_SHOWN = 4
# A log-prob above 0 by rounding is no fault; engines compute in fp32 at least.
ROUNDING_NATS = 1e-4


def check_rollouts(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    policy_version: int,
    max_staleness: int,
    vocab_size: int,
) -> None:
    """Check that `rollouts` are exactly what `generate(prompts, sampling)` promises, in its order.

    Args:
        policy_version: version of the trainer's weights.
        max_staleness: versions that a rollout may lag behind it.

    Raises:
        EngineError: anything missing, surplus, twice, out of order, empty, too long, cut short
            without a reason, without finite log-probs, from unknown ids or from old weights.
    """
    faults = list(_place_faults(rollouts, prompts, sampling.samples))
    for rollout in rollouts:
        where = f"prompt {rollout.prompt.prompt_id} sample {rollout.sample}"
        for kind, seen in _response_faults(rollout, sampling, vocab_size):
            faults.append((kind, f"{where}: {seen}"))
        staleness = policy_version - rollout.policy_version
        if not 0 <= staleness <= max_staleness:
            faults.append(("stale version", f"{where}: {rollout.policy_version}"))
    if faults:
        counts = Counter(kind for kind, _ in faults)
        shown = "; ".join(f"{kind} ({seen})" for kind, seen in faults[:MAX_SHOWN])
        tally = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        raise EngineError(
            f"rollouts refused at policy version {policy_version}: {tally}; for example {shown}"
        )


def _place_faults(
    rollouts: Sequence[Rollout], prompts: Sequence[Prompt], samples: int
) -> Iterator[tuple[str, str]]:
    """Find every (prompt, sample) that does not come once and in its place.

    A prompt that occurs twice was asked for twice.
    """
    expected = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    found = [(rollout.prompt, rollout.sample) for rollout in rollouts]
    if found == expected:
        return
    names = Counter((prompt.prompt_id, sample) for prompt, sample in expected)
    seen = Counter((prompt.prompt_id, sample) for prompt, sample in found)
    for kind, difference in (("missing", names - seen), ("surplus", seen - names)):
        for (prompt_id, sample), number in difference.items():
            twice = kind == "surplus" and (prompt_id, sample) in names
            yield "duplicate" if twice else kind, f"{number} x prompt {prompt_id} sample {sample}"
    if names == seen:
        place = next(i for i, pair in enumerate(expected) if pair != found[i])
        yield "out of order", f"place {place} has prompt {found[place][0].prompt_id}"


def _response_faults(
    rollout: Rollout, sampling: Sampling, vocab_size: int
) -> Iterator[tuple[str, str]]:
    ids, logprobs = rollout.response_ids, rollout.rollout_logprobs
    length, stops = len(ids), set(sampling.stop_ids)
    if not ids:
        yield "empty response", "no token"
        return
    if length > sampling.max_tokens:
        yield "too long", f"{length} tokens, limit {sampling.max_tokens}"
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        yield "unknown id", f"{outside[0]} of a vocabulary of {vocab_size}"
    if any(i in stops for i in ids[:-1]):
        yield "continues after its end", f"{length} tokens"
    if rollout.finish_reason == "stop" and ids[-1] not in stops:
        yield "stopped without a stop id", f"{length} tokens, last id {ids[-1]}"
    if rollout.finish_reason == "length" and length < sampling.max_tokens:
        yield "cut short", f"{length} tokens, limit {sampling.max_tokens}"
    if logprobs is None:
        yield "no log-probs", "None"
    elif len(logprobs) != length:
        yield "log-probs of another length", f"{len(logprobs)} for {length} tokens"
    else:
        wrong = [x for x in logprobs if not isinstance(x, float) or not math.isfinite(x)]
        if wrong:
            yield "log-prob not finite", f"{wrong[0]}"
        elif max(logprobs) > ROUNDING_NATS:
            yield "log-prob above 0", f"{max(logprobs):g}"
