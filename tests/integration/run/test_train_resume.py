"""The training command killed and started again: the bits of an undisturbed run (T1, T4, T8)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import command, environment, save_run, started, without_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
needs_engine = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM: make engine")
STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    save_run(root)
    return root


def _arguments(root: Path, name: str, *more: str) -> list[str]:
    shared = [f"run.name={name}", f"train.steps={STEPS}", "checkpoint.interval=2"]
    return command(2, str(root / "config.yaml"), *shared, *more)


def _run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300)


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics but for times; every step is there once."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    clocks = ("time/", "perf/", "rollout/tokens_per", "rollout/generation", "weight_sync/giga")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in lines]


def _status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def _until_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def _disturbed(root: Path, name: str, number: int, *more: str) -> float:
    """Send a signal to the launcher in step 3; return the seconds until it has ended."""
    run_dir = root / "runs" / name
    with started(root / f"out_{name}", *_arguments(root, name, *more)) as process:
        _until_step(run_dir, 2, process)
        sent = time.monotonic()
        process.send_signal(number)
        process.wait(timeout=60)
        return time.monotonic() - sent


def _compare(root: Path, first: str, second: str) -> None:
    """Assert that weights, Adam's state and metrics are equal."""
    runs = root / "runs"
    assert _lines(runs / first) == _lines(runs / second)
    for name in (f"hf/step_{STEPS}/model.safetensors", *_shards(runs / first)):
        assert (runs / first / name).read_bytes() == (runs / second / name).read_bytes(), name


def _shards(run_dir: Path) -> list[str]:
    folder = run_dir / "checkpoints" / f"step_{STEPS}"
    return [str(path.relative_to(run_dir)) for path in sorted(folder.glob("*.distcp"))]


def test_sigterm_and_sigkill(root: Path) -> None:
    """SIGTERM saves within 30 s, SIGKILL leaves the checkpoint before; both resumes are exact."""
    own = without_engine(root)
    runs = root / "runs"
    assert _run(_arguments(root, "whole", *own)).returncode == 0
    done = {"reason": "done", "step": STEPS, "last_checkpoint": f"step_{STEPS}"}
    assert _status(runs / "whole") == {**done, "requeue": False, "message": ""}

    seconds = _disturbed(root, "term", signal.SIGTERM, *own)
    found = _status(runs / "term")
    print(f"\nSIGTERM: ended after {seconds:.1f} s, saved step {found['step']}")
    assert seconds < 30
    assert found["reason"] == "preempted" and found["requeue"]
    assert found["last_checkpoint"] == f"step_{found['step']}"
    assert len(_lines(runs / "term")) == found["step"] >= 2
    again = _run(_arguments(root, "term", *own))
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"resumed: step {found['step']}" in again.stdout
    _compare(root, "whole", "term")

    _disturbed(root, "kill", signal.SIGKILL, *own)
    assert not (runs / "kill" / "status.json").exists()
    again = _run(_arguments(root, "kill", *own))
    assert again.returncode == 0, again.stderr[-2000:]
    _compare(root, "whole", "kill")

    # T4: a mistake is not to be tried again; nothing of the finished run is lost.
    wrong = _run(_arguments(root, "term", *own, "optimizer.beta1=0.5"))
    assert wrong.returncode != 0 and "optimizer.beta1: got 0.5, expected 0.9" in wrong.stderr
    found = _status(runs / "term")
    assert found["reason"] == "do not requeue" and not found["requeue"]
    assert "optimizer.beta1" in found["message"]
    _compare(root, "whole", "term")


@needs_engine
def test_real_engine(root: Path) -> None:
    """C8 with vLLM: token for token the same responses, so the same metrics and weights."""
    own = ("rollout.num_prompts=4", "parallel.tp=2")
    first = _run(_arguments(root, "engine", *own))
    assert first.returncode == 0, first.stderr[-2000:]
    seconds = _disturbed(root, "engine_term", signal.SIGTERM, *own)
    found = _status(root / "runs" / "engine_term")
    print(f"\nSIGTERM: ended after {seconds:.1f} s, saved step {found['step']}")
    assert found["reason"] == "preempted"
    again = _run(_arguments(root, "engine_term", *own))
    assert again.returncode == 0, again.stderr[-2000:]
    _compare(root, "engine", "engine_term")
    assert not _orphans(root)


def _orphans(root: Path) -> list[str]:
    """List our processes that name this test's folder."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    own = str(os.getpid())
    lines = listed.stdout.splitlines()
    return [line for line in lines if str(root) in line and not line.strip().startswith(own)]
