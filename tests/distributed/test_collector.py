"""Responses from the leaders' engines reach every rank, whole and in order, or all ranks are told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_vopd.collector import RolloutCollector, step_seed
from megatron_vopd.objectives import Objective, ObjectiveSettings
from megatron_vopd.parallel import init_world, student_groups
from megatron_vopd.prompt_stream import PromptStream
from megatron_vopd.rollout.engine import EngineError, Sampling
from megatron_vopd.rollout.scripted import ScriptedEngine
from megatron_vopd.settings import StepSettings
from megatron_vopd.types import Layout, Prompt, Rollout
from tests.distributed.harness import spawn

VOCAB = 50
LAYOUT = Layout(4, tp=2)
PROMPTS = [Prompt(f"p{i}", (i, i + 1), str(i)) for i in range(11)]
OBJECTIVE = Objective("sampled", ObjectiveSettings())


def _engine(faults: Any = None) -> ScriptedEngine:
    engine = ScriptedEngine(VOCAB, faults)
    engine.update_weights([], 0)
    return engine


class SlowEngine(ScriptedEngine):
    """Says when it samples, and takes its time."""

    def generate(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Rollout]:
        self.thread = threading.current_thread().name
        started = time.perf_counter()
        time.sleep(0.3)
        rollouts = super().generate(prompts, sampling, progress)
        self.span = started, time.perf_counter()
        return rollouts


def _collector(
    engine: ScriptedEngine | None, responses: Any = None, grader: Any = None, **changes: Any
) -> RolloutCollector:
    settings = StepSettings(OBJECTIVE, **{"num_prompts": 5, "samples_per_prompt": 2, **changes})
    groups = student_groups(LAYOUT)
    at = groups.coordinates
    own = engine if (at.tp, at.pp) == (0, 0) else None
    stream = PromptStream(PROMPTS, seed=1)
    return RolloutCollector(groups, own, stream, settings, VOCAB, "cpu", responses, grader)


def _grade(rollout: Rollout) -> float:
    return rollout.sample + rollout.prompt.ids[0] / 100


def _two_steps() -> Any:
    init_world("cpu")
    engine = _engine()
    collector = _collector(engine, grader=_grade)
    return [collector.take(step, 7, 0) for step in range(2)], engine.num_generations


def test_every_rank_has_every_response_in_order() -> None:
    results = spawn(_two_steps, LAYOUT.world_size)
    stream = PromptStream(PROMPTS, seed=1)
    for step in range(2):
        prompts = stream.next(5)
        seed = step_seed(0, step)
        alone = _engine().generate(prompts, Sampling(7, samples=2, seed=seed))
        for steps, _ in results:
            assert [one.rollout for one in steps[step]] == alone
            assert [one.grade for one in steps[step]] == [_grade(r) for r in alone]
            assert [one.order for one in steps[step]] == list(range(10))
    # Five prompts over two leaders: both generated in each step, the other ranks never.
    assert [number for _, number in results] == [2, 0, 2, 0]


def _all_faults(faults: Sequence[str]) -> list[str]:
    """On a rank: leader 1's engine misbehaves in each call; what every rank is told."""
    init_world("cpu")
    collectors = _collector(_engine())
    messages = []
    for fault in faults:
        wrong: Any = {0: fault} if collectors._groups.coordinates.dp == 1 else None
        collectors._engine = _engine(wrong) if collectors._engine is not None else None
        with pytest.raises(EngineError) as caught:
            collectors.take(0, 7, 0)
        messages.append(str(caught.value))
    return messages


def test_a_fault_of_one_engine_is_raised_on_all_ranks() -> None:
    faults = ("exception", "timeout", "too_few", "duplicates", "nan", "out_of_range", "empty")
    results = spawn(_all_faults, LAYOUT.world_size, faults)
    assert results[0] == results[1] == results[2] == results[3]
    # Leader 1 is rank 2: tp is the fastest axis.
    assert all(message.startswith("rank 2: ") for message in results[0])
    assert len(results[0]) == len(faults)


def _overlapped(steps: int) -> Any:
    """On a rank: staleness 1; weights are pushed after each step; saved and restored midway."""
    init_world("cpu")
    engine = SlowEngine(VOCAB)
    engine.update_weights([], 0)
    collector = _collector(engine, max_staleness=1)
    taken, waits, spans = [], [], []
    for step in range(steps):
        started = time.perf_counter()
        taken.append(collector.take(step, 7, step))
        waits.append(time.perf_counter() - started)
        time.sleep(0.5)  # the training, meanwhile
        if step == 1:
            state = json.loads(json.dumps(collector.state_dict(step)))
            collector._ready = None
            collector.load_state_dict(state)
        collector.settle(step)
        if collector._engine is not None:
            spans.append((engine.thread, engine.span))
            engine.update_weights([], step + 1)
    return taken, waits, spans


def test_one_step_off_generation_overlaps_training() -> None:
    results = spawn(_overlapped, LAYOUT.world_size, 4)
    stream = PromptStream(PROMPTS, seed=1)
    for step in range(4):
        prompts = stream.next(5)
        alone = _engine().generate(prompts, Sampling(7, samples=2, seed=step_seed(0, step)))
        for taken, waits, _ in results:
            found = [one.rollout for one in taken[step]]
            assert [r.response_ids for r in found] == [r.response_ids for r in alone]
            assert {r.policy_version for r in found} == {max(step - 1, 0)}
            # Only the first step waits for its own generation.
            assert (waits[step] > 0.3) == (step == 0), waits
    assert {thread for _, _, spans in results for thread, _ in spans} == {"generation"}


class _Given:
    def next(self, n: int) -> list[Rollout]:
        prompt = Prompt("given", (1, 2))
        return [Rollout(prompt, 0, tuple(range(20)), None, "stop", -1) for _ in range(n)]


def _mixed() -> Any:
    init_world("cpu")
    shares = {"student": 0.6, "dataset": 0.4}
    collector = _collector(_engine(), _Given(), prefix_fractions=shares, samples_per_prompt=1)
    return collector.take(0, 7, 0)


def test_sampled_and_given_responses_in_one_step() -> None:
    for graded in spawn(_mixed, LAYOUT.world_size):
        assert [one.order for one in graded] == list(range(5))
        sampled, given = graded[:3], graded[3:]
        assert all(one.rollout.policy_version == 0 for one in sampled)
        for one in given:
            # Cut to the curriculum's length.
            assert one.rollout.response_ids == tuple(range(7))
            assert (one.rollout.finish_reason, one.rollout.policy_version) == ("length", -1)


def _hanging() -> str:
    init_world("cpu")
    engine = SlowEngine(VOCAB)
    engine.update_weights([], 0)
    collector = _collector(engine, max_staleness=1, deadline_seconds=0.01)
    collector.take(0, 7, 0)
    import megatron_vopd.collector

    megatron_vopd.collector.GRACE_SECONDS = 0.0
    with pytest.raises(EngineError) as caught:
        collector.settle(0)
    return str(caught.value)


def test_a_generation_in_flight_has_a_deadline() -> None:
    for message in spawn(_hanging, LAYOUT.world_size):
        assert "no answer after 0.01 s (rollout.deadline_seconds)" in message
