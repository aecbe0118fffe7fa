"""Faulty rollouts are refused or counted (S5), sampling settings are checked with their reason."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_vopd.errors import EngineError, UserError
from megatron_vopd.rollout.engine import (
    PushReport,
    Sampling,
    generation_report,
    response_seed,
)
from megatron_vopd.rollout.validate import check_rollouts
from megatron_vopd.types import Prompt, Rollout
from tests.support.scripted import FAULTS, Fault, ScriptedEngine

VOCAB, STOP = 50, 7
PROMPTS = [Prompt(f"data:{i}", (i, i + 1)) for i in range(4)]
SAMPLING = Sampling(max_tokens=24, samples=2, seed=5, stop_ids=(STOP,))


def _engine(fault: Fault | None = None) -> ScriptedEngine:
    engine = ScriptedEngine(VOCAB, {} if fault is None else {0: fault})
    engine.update_weights([], policy_version=3)
    return engine


def _check(rollouts: list[Rollout], version: int = 3, max_staleness: int = 0) -> None:
    check_rollouts(rollouts, PROMPTS, SAMPLING, version, max_staleness, VOCAB)


def test_sound_rollouts_pass_and_are_counted() -> None:
    rollouts = _engine().generate(PROMPTS, SAMPLING)
    _check(rollouts)
    report = generation_report(rollouts, 2.0)
    num_tokens = sum(len(r.response_ids) for r in rollouts)
    assert (report.num_responses, report.num_tokens) == (8, num_tokens)
    num_cut = sum(r.response_ids[-1] != STOP for r in rollouts)
    assert report.num_truncated == num_cut and 0 < num_cut < 8
    assert report.metrics()["rollout/tokens_per_second"] == num_tokens / 2
    assert report.metrics()["rollout/truncated_frac"] == num_cut / 8


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_calls_are_refused(fault: Fault) -> None:
    """S5: whatever the fault, but for the one that no count can see."""
    if fault == "swapped_responses":
        _check(_engine(fault).generate(PROMPTS, SAMPLING))
        return
    with pytest.raises(EngineError) as caught:
        _check(_engine(fault).generate(PROMPTS, SAMPLING))
    message = str(caught.value)
    if fault not in ("exception", "timeout"):
        assert message.startswith("rollouts refused at policy version 3: 1 ")
        assert "data:" in message, "the message names no prompt"


def test_a_response_may_be_one_token() -> None:
    ended = Rollout(PROMPTS[0], 0, (STOP,), (-1.0,), "stop", 3)
    check_rollouts([ended], PROMPTS[:1], replace(SAMPLING, samples=1), 3, 0, VOCAB)


def test_log_probs_may_round_to_above_0() -> None:
    rollouts = _engine().generate(PROMPTS, SAMPLING)
    for logprob, is_sound in ((5e-5, True), (2e-4, False)):
        logprobs = (logprob,) * len(rollouts[0].response_ids)
        changed = [replace(rollouts[0], rollout_logprobs=logprobs), *rollouts[1:]]
        if is_sound:
            _check(changed)
        else:
            with pytest.raises(EngineError, match=r"1 log-prob above 0; .*: 0\.0002"):
                _check(changed)


def test_many_faults_are_counted_and_a_few_are_shown() -> None:
    rollouts = [replace(r, policy_version=2) for r in _engine().generate(PROMPTS, SAMPLING)]
    rollouts[0] = replace(rollouts[0], response_ids=(), rollout_logprobs=())
    with pytest.raises(EngineError) as caught:
        _check(rollouts)
    tally, _, shown = str(caught.value).partition("; for example ")
    assert tally.endswith(": 1 empty response, 8 stale version")
    assert shown.count("data:") == 4


def test_further_faults_are_named() -> None:
    sound = Rollout(PROMPTS[0], 0, (1, 2, STOP), (-1.0, -2.0, -0.5), "stop", 3)
    for change, kind in (
        ({"response_ids": (1, STOP, STOP)}, "continues after its end"),
        ({"finish_reason": "length"}, "cut short"),
        ({"response_ids": (1, 2, 3)}, "stopped without a stop id"),
        ({"policy_version": 4}, "stale version"),
        ({"rollout_logprobs": (-1.0, -math.inf, -1.0)}, "not finite"),
    ):
        with pytest.raises(EngineError, match=kind):
            check_rollouts(
                [replace(sound, **change)], PROMPTS[:1], replace(SAMPLING, samples=1), 3, 0, VOCAB
            )


def test_staleness_is_allowed_up_to_its_limit() -> None:
    rollouts = _engine().generate(PROMPTS, SAMPLING)
    _check(rollouts, version=4, max_staleness=1)
    with pytest.raises(EngineError, match="8 stale version"):
        _check(rollouts, version=5, max_staleness=1)


def test_a_prompt_may_occur_twice() -> None:
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    rollouts = _engine().generate(prompts, SAMPLING)
    check_rollouts(rollouts, prompts, SAMPLING, 3, 0, VOCAB)
    assert len(rollouts) == 6
    with pytest.raises(EngineError, match="missing"):
        check_rollouts(rollouts[:-1], prompts, SAMPLING, 3, 0, VOCAB)


def test_samples_do_not_depend_on_the_engine_or_the_order() -> None:
    whole = _engine().generate(PROMPTS, SAMPLING)
    parts = [r for p in PROMPTS[::-1] for r in _engine().generate([p], SAMPLING)]
    assert sorted(parts, key=lambda r: (r.prompt.prompt_id, r.sample)) == whole
    seeds = {response_seed(s, p, n) for s in range(9) for p in ("a", "b", "a0") for n in range(9)}
    assert len(seeds) == 243 and all(0 <= seed < 2**63 for seed in seeds)


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
    with pytest.raises(UserError, match=f"sampling {next(iter(change))}: got"):
        replace(SAMPLING, **change)


def test_push_metrics() -> None:
    report = PushReport(1, num_bytes=3_000_000_000, seconds=1.5, probe_gap=2e-6)
    assert report.metrics()["weight_sync/gigabytes_per_second"] == 2.0
    assert report.metrics()["weight_sync/probe_gap"] == 2e-6
