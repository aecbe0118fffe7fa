"""Faulty rollouts are refused or counted (S5), sampling settings are checked with their reason."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_vopd.errors import EngineError
from megatron_vopd.rollout.engine import (
    PushReport,
    Sampling,
    SamplingError,
    check_sampling,
    generation_report,
    response_seed,
)
from megatron_vopd.rollout.validate import AccountingError, check_rollouts, require_agreement
from megatron_vopd.types import Prompt, Rollout
from tests.support.scripted import FAULTS, Fault, ScriptedEngine

VOCAB, STOP = 50, 7
PROMPTS = [Prompt(f"data:{i}", (i, i + 1)) for i in range(4)]
SAMPLING = Sampling(max_tokens=24, samples=2, seed=5, stop_ids=(STOP,))


def _engine(fault: Fault | None = None) -> ScriptedEngine:
    engine = ScriptedEngine(VOCAB, {} if fault is None else {0: fault})
    engine.update_weights([], policy_version=3)
    return engine


def _train_on(engine: ScriptedEngine) -> list[Rollout]:
    """What a trainer does before it trains; returns what it would train on."""
    rollouts = engine.generate(PROMPTS, SAMPLING)
    check_rollouts(rollouts, PROMPTS, SAMPLING, 3, 0, VOCAB)
    scored = [engine.logprobs(r.prompt.ids, r.response_ids) for r in rollouts]
    require_agreement(rollouts, scored, max_mean_gap=1e-5)
    return rollouts


def test_sound_rollouts_pass_and_are_counted() -> None:
    rollouts = _train_on(_engine())
    found = check_rollouts(rollouts, PROMPTS, SAMPLING, 3, 0, VOCAB)
    report = generation_report(rollouts, 2.0)
    assert found.num_rollouts == report.num_responses == 8
    assert found.num_tokens == sum(len(r.response_ids) for r in rollouts) == report.num_tokens
    ended = [r.response_ids[-1] == STOP for r in rollouts]
    assert found.num_truncated == ended.count(False) and 0 < found.num_truncated < 8
    assert report.metrics()["rollout/tokens_per_second"] == found.num_tokens / 2
    assert report.metrics()["rollout/truncated_frac"] == found.num_truncated / 8


@pytest.mark.parametrize("fault", FAULTS)
def test_no_token_of_a_faulty_call_is_trained(fault: Fault) -> None:
    """S5: refused, whatever the fault."""
    with pytest.raises(EngineError) as caught:
        _train_on(_engine(fault))
    if fault not in ("exception", "timeout"):
        assert isinstance(caught.value, AccountingError)
    if fault not in ("exception", "timeout", "swapped_responses", "too_few"):
        assert "data:" in str(caught.value), "the message names no prompt"


def test_only_the_trainer_sees_swapped_responses() -> None:
    """The counts alone let them pass, which is why the log-probs are compared too."""
    rollouts = _engine("swapped_responses").generate(PROMPTS, SAMPLING)
    check_rollouts(rollouts, PROMPTS, SAMPLING, 3, 0, VOCAB)


def test_one_token_responses_that_end_are_sound_and_counted() -> None:
    ended = Rollout(PROMPTS[0], 0, (STOP,), (-1.0,), "stop", 3)
    found = check_rollouts([ended], PROMPTS[:1], replace(SAMPLING, samples=1), 3, 0, VOCAB)
    assert found.num_one_token == 1 and found.num_truncated == 0


def test_further_faults_are_named() -> None:
    sound = Rollout(PROMPTS[0], 0, (1, 2, STOP), (-1.0, -2.0, -0.5), "stop", 3)
    for change, kind in (
        ({"response_ids": (1, STOP, STOP)}, "goes on after its end"),
        ({"finish_reason": "length"}, "cut short"),
        ({"response_ids": (1, 2, 3)}, "stopped without a stop id"),
        ({"policy_version": 4}, "stale version"),
        ({"rollout_logprobs": (-1.0, -math.inf, -1.0)}, "not finite"),
    ):
        with pytest.raises(AccountingError, match=kind):
            check_rollouts(
                [replace(sound, **change)], PROMPTS[:1], replace(SAMPLING, samples=1), 3, 0, VOCAB
            )


def test_staleness_is_allowed_up_to_its_limit() -> None:
    rollouts = _engine().generate(PROMPTS, SAMPLING)
    assert check_rollouts(rollouts, PROMPTS, SAMPLING, 4, 1, VOCAB).max_staleness == 1
    with pytest.raises(AccountingError, match="8 stale version"):
        check_rollouts(rollouts, PROMPTS, SAMPLING, 5, 1, VOCAB)


def test_a_prompt_may_occur_twice() -> None:
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    rollouts = _engine().generate(prompts, SAMPLING)
    assert check_rollouts(rollouts, prompts, SAMPLING, 3, 0, VOCAB).num_rollouts == 6
    with pytest.raises(AccountingError, match="missing"):
        check_rollouts(rollouts[:-1], prompts, SAMPLING, 3, 0, VOCAB)


def test_samples_do_not_depend_on_the_engine_or_the_order() -> None:
    whole = _engine().generate(PROMPTS, SAMPLING)
    parts = [r for p in PROMPTS[::-1] for r in _engine().generate([p], SAMPLING)]
    assert sorted(parts, key=lambda r: (r.prompt.prompt_id, r.sample)) == whole
    seeds = {response_seed(s, p, n) for s in range(9) for p in ("a", "b", "a0") for n in range(9)}
    assert len(seeds) == 243 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("change", "estimator", "importance", "reason"),
    [
        ({"temperature": 0.7}, "sampled", "truncate", "temperature 1"),
        ({"top_p": 0.9}, "sampled", "truncate", "nucleus"),
        ({"temperature": 0.0}, "sampled", "none", "greedy"),
        ({"temperature": 0.0}, "exact", "mask", "greedy"),
    ],
)
def test_sampling_the_objective_cannot_use(
    change: dict, estimator: str, importance: str, reason: str
) -> None:
    with pytest.raises(SamplingError, match=reason):
        check_sampling(replace(SAMPLING, **change), estimator, importance)


def test_sampling_the_objective_can_use() -> None:
    check_sampling(SAMPLING, "sampled")
    check_sampling(replace(SAMPLING, temperature=0.7, top_p=0.9), "exact")
    check_sampling(replace(SAMPLING, temperature=0.7), "sampled", allow_biased=True)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"samples": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop_ids": (-1,)},
    ],
)
def test_values_out_of_range(change: dict) -> None:
    with pytest.raises(SamplingError, match=f"sampling {next(iter(change))}: got"):
        replace(SAMPLING, **change)


def test_push_metrics() -> None:
    report = PushReport(1, num_bytes=3_000_000_000, seconds=1.5, probe_gap=2e-6)
    assert report.metrics()["weight_sync/gigabytes_per_second"] == 2.0
    assert report.metrics()["weight_sync/probe_gap"] == 2e-6
