"""A real engine across restarts, with two workers, and what it leaves behind: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.rollout.push import make_probe, push
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.rollout.vllm.supervisor import session_pids
from megatron_vopd.types import Layout
from tests.support import ROOT
from tests.support.engines import (
    MODELS,
    STOP,
    TOLERANCE,
    VOCAB,
    Student,
    make_prompts,
    needs_vllm,
    settings,
    worst_gap,
)
from tests.support.harness import spawn
from tests.support.layouts import Case, enter

pytestmark = needs_vllm
SAMPLING = Sampling(max_tokens=64, samples=2, seed=11, stop_ids=(STOP,))


def _restarted(folder: str, log_path: str, tp: int, prompts: Any) -> tuple[Any, float, int]:
    """On a rank: return rollouts of an engine and its successor, and the gap to the trainer."""
    groups = enter(Case("tp1", Layout(1)))
    student = Student(folder, Case("tp1", Layout(1)), groups)
    runs = []
    for _ in range(2):
        engine = LocalEngine(settings(folder, log_path, tp=tp))
        try:
            for version in (1, 2):
                report = push(
                    student.model,
                    student.facts,
                    groups,
                    engine,
                    version,
                    score_fn=student.score,
                    probe=make_probe(VOCAB, tolerance=TOLERANCE),
                )
                assert report.attempts == 1
            runs.append(engine.generate(prompts, SAMPLING))
        finally:
            engine.close()
    gap, tokens = worst_gap(student, runs[0])
    return runs, gap, tokens


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tp", "name", "num_prompts", "longest"),
    [
        (1, "qwen3-tied", 16, 60),
        (2, "qwen3-tied", 16, 60),
        (2, "qwen3_moe", 16, 60),
        (1, "qwen3-tied", 120, 150),  # more tokens than vLLM reads at a time
    ],
)
def test_a_restarted_engine_repeats_itself(
    tp: int, name: str, num_prompts: int, longest: int, tmp_path: Path
) -> None:
    """With the same seed and prompts come the same ids and the same bits of every log-prob."""
    folder = MODELS[name].save(tmp_path)
    prompts = make_prompts(num_prompts, longest)
    log_path = str(tmp_path / "engine.log")
    ((runs, gap, tokens),) = spawn(_restarted, 1, str(folder), log_path, tp, prompts)
    print(f"\ntp {tp} {name}: {tokens} tokens, largest gap {gap:.1e}")
    assert tokens >= 1000 and gap <= TOLERANCE
    assert [r.response_ids for r in runs[0]] == [r.response_ids for r in runs[1]]
    assert [r.rollout_logprobs for r in runs[0]] == [r.rollout_logprobs for r in runs[1]]


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def _listening(pids: list[int]) -> set[str]:
    """Return the addresses on which processes accept connections."""
    return {
        connection.laddr.ip
        for pid in pids
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["close", "leave", "exception", "wait"])
def test_nothing_is_left_behind(how: str, tmp_path: Path) -> None:
    """This holds after a normal end, one without `close`, an exception, SIGKILL of the trainer."""
    before = _shared_memory()
    folder = MODELS["qwen3-untied"].save(tmp_path)
    trainer = subprocess.Popen(
        [sys.executable, "-m", "tests.support.engine_trainer", folder, tmp_path / "log", how],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert trainer.stdin is not None and trainer.stdout is not None
    line = trainer.stdout.readline()
    assert line.startswith("UP "), (tmp_path / "log").read_text()[-3000:]
    session = int(line.split()[1])
    pids = session_pids(session)
    assert len(pids) >= 4, "supervisor, child and two workers"
    addresses = _listening(pids)
    assert addresses <= {"127.0.0.1", "::1"}, addresses
    if how == "wait":
        trainer.kill()
    else:
        trainer.stdin.write("\n")
        trainer.stdin.flush()
    trainer.wait(timeout=60)
    deadline = time.monotonic() + 30
    while session_pids(session):
        assert time.monotonic() < deadline, f"{how}: {session_pids(session)} still run"
        time.sleep(0.1)
    left = _shared_memory() - before
    print(f"\n{how}: sockets on {addresses or 'none'}, left in shared memory: {left or 'nothing'}")
    assert not left
