"""Responses of the leaders' engines reach every rank, whole and in order, or all ranks raise."""

from __future__ import annotations

import functools
import json
import threading
import time
from typing import Any

import pytest

from megatron_vopd.data.stream import PromptStream
from megatron_vopd.errors import EngineError, UserError
from megatron_vopd.megatron.groups import Groups, init_world, student_groups
from megatron_vopd.rollout.engine import Sampling, step_seed
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.types import Layout, Prompt, Rollout
from tests.support.harness import spawn
from tests.support.scripted import ScriptedEngine
from tests.support.settings import step_settings

VOCAB = 50
LAYOUT = Layout(4, tp=2)
PROMPTS = [Prompt(f"p{i}", (i, i + 1), str(i)) for i in range(11)]


def _engine(faults: Any = None) -> ScriptedEngine:
    engine = ScriptedEngine(VOCAB, faults)
    engine.update_weights([], 0)
    return engine


class SlowEngine(ScriptedEngine):
    """An engine that records when it samples, and takes its time."""

    def generate(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Rollout]:
        self.thread = threading.current_thread().name
        time.sleep(0.3)
        return super().generate(prompts, sampling, progress)


@functools.cache
def _groups() -> Groups:
    return student_groups(LAYOUT)


def _collector(
    engine: ScriptedEngine | None,
    responses: Any = None,
    grader: Any = None,
    push: Any = None,
    **changes: Any,
) -> RolloutCollector:
    settings = step_settings(**{"num_prompts": 5, "samples_per_prompt": 2, **changes})
    groups = _groups()
    own = engine if groups.is_leader else None
    stream = PromptStream(PROMPTS, seed=1)
    return RolloutCollector(groups, own, stream, settings, VOCAB, "cpu", responses, grader, push)


def _grade(rollout: Rollout) -> float:
    return rollout.sample + rollout.prompt.ids[0] / 100


def _two_steps() -> Any:
    engine = _engine()
    collector = _collector(engine, grader=_grade)
    taken = [collector.take(step, 7, 0) for step in range(2)]
    return taken, engine.num_generations, engine.is_asleep


FAULTS = ("exception", "timeout", "too_few", "duplicates", "nan", "out_of_range", "empty")


def _all_faults() -> list[str]:
    """Generate while leader 1's engine fails in each call; return every rank's errors."""
    collector = _collector(_engine())
    messages = []
    for fault in FAULTS:
        wrong: Any = {0: fault} if collector._groups.coordinates.dp == 1 else None
        collector._engine = _engine(wrong) if collector._engine is not None else None
        with pytest.raises(EngineError) as caught:
            collector.take(0, 7, 0)
        messages.append(str(caught.value))
    return messages


MENDED = ("exception", "timeout", "nan", "stale_version", "too_few")


def _with_faults(faults: Any) -> tuple[RolloutCollector, list[int]]:
    """Make a collector whose engine fails where this is leader 1, and a list of its pushes."""
    engine = _engine(faults if _groups().coordinates.dp == 1 else None)
    pushed: list[int] = []

    def push(policy_version: int) -> None:
        pushed.append(policy_version)
        engine.update_weights([], policy_version)

    return _collector(engine, push=push), pushed


def _recovery() -> Any:
    """Generate with an engine of leader 1 that fails once and is started again by a push."""
    found = []
    for fault in MENDED:
        collector, pushed = _with_faults({0: fault})
        found.append((collector.take(0, 7, 0), pushed))
    return found


def _given_up() -> tuple[str, list[int]]:
    """Generate with an engine of leader 1 that fails in both calls of a step."""
    collector, pushed = _with_faults({0: "nan", 1: "timeout"})
    with pytest.raises(EngineError) as caught:
        collector.take(0, 7, 0)
    return str(caught.value), pushed


class PickyEngine(ScriptedEngine):
    """An engine that refuses a prompt, as engines do that have no room for it."""

    def generate(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Rollout]:
        raise UserError("a prompt of 9 tokens exceeds max_model_len=8")


def _users_mistake() -> str:
    """Generate once only: a second attempt would fail as well."""
    collector = _collector(PickyEngine(VOCAB), push=lambda _: pytest.fail("pushed"))
    with pytest.raises(UserError) as caught:
        collector.take(0, 7, 0)
    return str(caught.value)


def _overlapped() -> Any:
    """Generate at staleness 1, push after each step, save and restore midway."""
    engine = SlowEngine(VOCAB)
    engine.update_weights([], 0)
    samples_at_push = []

    def push(policy_version: int) -> None:
        samples_at_push.append(any(t.name == "generation" for t in threading.enumerate()))
        engine.update_weights([], policy_version)

    collector = _collector(engine, max_staleness=1, push=push)
    taken, waits, threads = [], [], set()
    for step in range(3):
        started = time.perf_counter()
        taken.append(collector.take(step, 7, step))
        waits.append(time.perf_counter() - started)
        time.sleep(1.0 if step else 0.0)  # the training, meanwhile
        if step == 1:
            state = json.loads(json.dumps(collector.state_dict(step), default=list))
            collector._ready = None
            assert collector._prompts is not None
            collector._prompts.next(3)
            collector.load_state_dict(state)
        collector.push(step + 1)
        if collector._engine is not None:
            threads.add(engine.thread)
    assert not any(samples_at_push)
    return taken, waits, threads


class _Given:
    def next(self, n: int) -> list[Rollout]:
        prompt = Prompt("given", (1, 2))
        return [Rollout(prompt, 0, tuple(range(20)), None, "stop", -1) for _ in range(n)]


def _mixed() -> Any:
    shares = {"student": 0.6, "dataset": 0.4}
    collector = _collector(_engine(), _Given(), prefix_fractions=shares, samples_per_prompt=1)
    collected = collector.take(0, 7, 0)
    given: Any = _Given()
    settings = step_settings(num_prompts=5, prefix_fractions={"dataset": 1.0}, max_staleness=1)
    only = RolloutCollector(_groups(), None, None, settings, VOCAB, "cpu", given)
    return collected, only.take(0, 7, 0)


def _hanging() -> str:
    import megatron_vopd.trainer.collector

    engine = SlowEngine(VOCAB)
    engine.update_weights([], 0)
    collector = _collector(engine, max_staleness=1, deadline_seconds=0.01)
    collector.take(0, 7, 0)
    megatron_vopd.trainer.collector.GRACE_SECONDS = 0.0
    with pytest.raises(EngineError) as caught:
        collector.settle(0)
    return str(caught.value)


def _everything() -> dict[str, Any]:
    """On a rank: do all of the above in one world, whose start is what costs."""
    init_world("cpu")
    parts = (_two_steps, _all_faults, _recovery, _given_up, _users_mistake, _overlapped)
    parts += (_mixed, _hanging)
    return {part.__name__: part() for part in parts}


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return spawn(_everything, LAYOUT.world_size)


def test_every_rank_has_every_response_in_order(seen: list[dict[str, Any]]) -> None:
    results = [rank["_two_steps"] for rank in seen]
    stream = PromptStream(PROMPTS, seed=1)
    for step in range(2):
        prompts = stream.next(5)
        seed = step_seed(0, step)
        alone = _engine().generate(prompts, Sampling(7, samples=2, seed=seed))
        for steps, _, _ in results:
            assert [one.rollout for one in steps[step]] == alone
            assert [one.grade for one in steps[step]] == [_grade(r) for r in alone]
            assert [one.order for one in steps[step]] == list(range(10))
    # Five prompts over two leaders: both generated in each step, the other ranks never.
    assert [number for _, number, _ in results] == [2, 0, 2, 0]
    # An engine that has answered gives its memory to teacher and student.
    assert [is_asleep for _, _, is_asleep in results] == [True, False, True, False]


def test_a_fault_of_one_engine_is_raised_on_all_ranks(seen: list[dict[str, Any]]) -> None:
    results = [rank["_all_faults"] for rank in seen]
    assert results[0] == results[1] == results[2] == results[3]
    # Leader 1 is rank 2: tp is the fastest axis.
    assert all(message.startswith("rank 2: ") for message in results[0])
    assert len(results[0]) == len(FAULTS)


def test_a_failed_engine_is_started_again_and_asked_again(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        undisturbed, _, _ = rank["_two_steps"]
        assert len(rank["_recovery"]) == len(MENDED)
        for graded, pushed in rank["_recovery"]:
            assert pushed == [0]
            assert [one.rollout for one in graded] == [one.rollout for one in undisturbed[0]]


def test_a_step_that_fails_twice_is_given_up_by_all(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["_given_up"] == ("rank 2: scripted engine, generate: timeout", [0])


def test_a_mistake_of_the_user_is_not_tried_again(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["_users_mistake"] == "rank 0: a prompt of 9 tokens exceeds max_model_len=8"


def test_one_step_off_generation_overlaps_training(seen: list[dict[str, Any]]) -> None:
    results = [rank["_overlapped"] for rank in seen]
    stream = PromptStream(PROMPTS, seed=1)
    for step in range(3):
        prompts = stream.next(5)
        alone = _engine().generate(prompts, Sampling(7, samples=2, seed=step_seed(0, step)))
        for taken, waits, _ in results:
            found = [one.rollout for one in taken[step]]
            assert [r.response_ids for r in found] == [r.response_ids for r in alone]
            assert {r.policy_version for r in found} == {max(step - 1, 0)}
            # Only the first step waits for its own generation of 0.3 s.
            assert (waits[step] >= 0.3) == (step == 0), waits
    assert set().union(*(threads for _, _, threads in results)) == {"generation"}


def test_sampled_and_given_responses_in_one_step(seen: list[dict[str, Any]]) -> None:
    for graded, only_given in (rank["_mixed"] for rank in seen):
        assert len(only_given) == 5
        assert [one.order for one in graded] == list(range(5))
        sampled, given = graded[:3], graded[3:]
        assert all(one.rollout.policy_version == 0 for one in sampled)
        for one in given:
            # Cut to the curriculum's length.
            assert one.rollout.response_ids == tuple(range(7))
            assert (one.rollout.finish_reason, one.rollout.policy_version) == ("length", -1)


def test_a_generation_in_flight_has_a_deadline(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "no answer after 0.01 s (rollout.deadline_seconds)" in rank["_hanging"]
