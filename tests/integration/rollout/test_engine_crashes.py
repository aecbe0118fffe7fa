"""S4: an engine that dies or hangs, while it generates or is pushed to, costs one attempt.

Detected within the deadline, ended with everything it had started, started again, and the batch
sampled again: the rollouts are those of an undisturbed run, to the last bit.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.errors import EngineError
from megatron_vopd.megatron.weights import export_weights
from megatron_vopd.rollout import push
from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.types import Layout
from tests.support.engines import (
    MODELS,
    STOP,
    TOLERANCE,
    VOCAB,
    Student,
    make_collector,
    make_prompts,
    needs_vllm,
    settings,
)
from tests.support.harness import spawn
from tests.support.layouts import Case, enter

pytestmark = needs_vllm
ALONE = Case("tp1", Layout(1))
STALL_SECONDS = 15.0
SAMPLING = Sampling(max_tokens=150, samples=2, seed=3, stop_ids=(STOP,))


def find(engine: LocalEngine, who: str) -> int:
    """Return the id of the supervisor, the child (vLLM's core), or a tensor-parallel worker."""
    pids = engine.processes()
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in pids}
    supervisor = {pid for pid, command in commands.items() if "vllm.supervisor" in command}
    child = {pid for pid, command in commands.items() if "vllm.child" in command} - supervisor
    trackers = {pid for pid, command in commands.items() if "resource_tracker" in command}
    workers = set(pids) - supervisor - child - trackers
    return min({"supervisor": supervisor, "child": child, "worker": workers}[who])


class Run:
    """On a rank: an engine with a student's weights, and faults to order."""

    def __init__(self, folder: str, log_path: str, tp: int) -> None:
        self.groups = enter(ALONE)
        self.student = Student(folder, ALONE, self.groups)
        self.engine = LocalEngine(
            settings(folder, log_path, tp=tp, stall_seconds=STALL_SECONDS, push_seconds=20.0)
        )
        self.collector = make_collector(self.groups, self.engine, self.push)
        self.push(1)

    def push(self, policy_version: int) -> Any:
        return push.push(
            self.student.model,
            self.student.facts,
            self.groups,
            self.engine,
            policy_version,
            score_fn=self.student.score,
            probe=push.make_probe(VOCAB, tolerance=TOLERANCE),
        )

    def sample(self) -> Any:
        return self.collector.sample(make_prompts(12), SAMPLING, 1)

    def hit(self, who: str, how: int) -> None:
        os.kill(find(self.engine, who), how)


def _mid_generate(folder: str, log_path: str, tp: int, cases: list[tuple[str, int]]) -> Any:
    """On a rank: return undisturbed rollouts, those of each case, and the detection's seconds."""
    run = Run(folder, log_path, tp)
    try:
        undisturbed, found = run.sample(), []
        begin = time.monotonic()
        run.engine.generate(make_prompts(12), SAMPLING)
        usual = time.monotonic() - begin
        for who, how in cases:
            seen: list[float] = []
            original = run.engine.generate

            strike = threading.Timer(usual / 8, run.hit, (who, how))

            def watched(
                *args: Any, seen: list = seen, original: Any = original, strike: Any = strike
            ) -> Any:
                begin = time.monotonic()
                if strike.ident is None:
                    strike.start()
                try:
                    return original(*args)
                except EngineError:
                    seen.append(time.monotonic() - begin)
                    raise

            run.engine.generate = watched  # type: ignore[method-assign]
            rollouts = run.sample()
            strike.join()
            run.engine.generate = original  # type: ignore[method-assign]
            found.append((rollouts == undisturbed, seen, run.engine.num_starts))
        if cases[-1][0] == "supervisor":
            with pytest.raises(EngineError, match="supervisor is gone"):
                run.engine.generate(make_prompts(1), SAMPLING)
        return found
    finally:
        run.engine.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tp", [1, 2])
def test_mid_generate(tp: int, tmp_path: Path) -> None:
    cases = [("child", signal.SIGKILL), ("child", signal.SIGSTOP), ("supervisor", signal.SIGKILL)]
    if tp == 2:
        cases = [("worker", signal.SIGKILL), ("worker", signal.SIGSTOP)]
    folder = MODELS["qwen3-tied"].save(tmp_path)
    arguments = (str(folder), str(tmp_path / "engine.log"), tp, cases)
    before = set(os.listdir("/dev/shm"))
    (found,) = spawn(_mid_generate, 1, *arguments)
    assert set(os.listdir("/dev/shm")) <= before, "shared memory of a crashed engine is left"
    starts = 1
    for (who, how), (equal, seen, num_starts) in zip(cases, found, strict=True):
        name = f"tp {tp}: {who} {signal.Signals(how).name}"
        print(f"\n{name}: detected after {seen} s of generating")
        assert equal, f"{name}: other rollouts than undisturbed"
        if who == "supervisor":
            continue  # nothing was lost; the next call notices
        starts += 1
        assert num_starts == starts and len(seen) == 1, name
        assert seen[0] <= STALL_SECONDS + 10, name


def _mid_push(folder: str, log_path: str) -> Any:
    """On a rank: push while the child is killed, then stopped."""
    run = Run(folder, log_path, 1)
    found = []
    try:
        for how in (signal.SIGKILL, signal.SIGSTOP):

            def struck(*args: Any, how: int = how, **options: Any) -> Iterator:
                for number, pair in enumerate(export_weights(*args, **options)):
                    if number == 20:
                        push.export_weights = export_weights
                        run.hit("child", how)
                    yield pair

            push.export_weights = struck  # type: ignore[assignment]
            begin = time.monotonic()
            report = run.push(1)
            found.append((report, time.monotonic() - begin, bool(run.sample())))
        return found, run.engine.num_starts
    finally:
        run.engine.close()


@pytest.mark.timeout(600)
def test_mid_push(tmp_path: Path) -> None:
    folder = MODELS["qwen3-untied"].save(tmp_path)
    ((found, starts),) = spawn(_mid_push, 1, str(folder), str(tmp_path / "engine.log"))
    assert starts == 3
    for report, seconds, samples in found:
        print(f"\npush after a crash: {seconds:.1f} s with {report.attempts} attempts")
        assert report.attempts == 2 and samples
