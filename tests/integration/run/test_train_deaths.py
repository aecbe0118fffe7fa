"""Runs that die: a rank or an engine killed or stopped, Ctrl-C, SIGTERM, a start without torchrun.

Each ends in one line of ours within the deadline, with every completed step on record and no
process left; a killed engine costs one attempt.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.files.metrics_file import METRICS_NAME, read_metrics
from tests.support.runs import command, environment, save_model, save_run, started, without_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MISTAKE, FAILED = 2, 1
needs_engine = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM: make engine")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deaths")
    save_run(root)
    return root


def _own_lines(folder: Path) -> list[str]:
    """Return standard error without torchrun's report: its log lines, and its traceback."""
    lines = (folder / "err").read_text().splitlines()
    assert not [line for line in lines if "megatron_vopd/" in line and ".py" in line], lines
    ends = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    ours = lines[: min(ends, default=len(lines))]
    return [line for line in ours if line and not re.match(r"[WE]\d{4} ", line)]


def _wait(until: Callable[[], Any], what: str, process: subprocess.Popen, seconds: float) -> Any:
    """Wait for the first true answer of `until`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = until()
        if answer:
            return answer
        assert process.poll() is None, f"the run ended before {what}: {process.returncode}"
        time.sleep(0.2)
    raise TimeoutError(what)


def _steps(root: Path, name: str) -> list[int]:
    """List the steps that a run has recorded."""
    path = root / "runs" / name / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _ranks(launcher: subprocess.Popen) -> list[int]:
    """Return the process ids of the ranks, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    ranks = {
        int(entry.removeprefix(b"RANK=")): int(pid)
        for pid, entries in environments.items()
        for entry in entries
        if entry.startswith(b"RANK=")
    }
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.fixture
def running(root: Path) -> Iterator[Any]:
    """Start a run of two ranks without an engine, and wait for two steps of very many."""
    with ExitStack() as stack:

        def start(name: str) -> tuple[subprocess.Popen, list[int], Path]:
            folder = root / f"launch_{name}"
            overrides = [*without_engine(root), "train.steps=100000", f"run.name={name}"]
            module = "tests.support.impatient_train"
            arguments = command(2, str(root / "config.yaml"), *overrides, module=module)
            launcher = stack.enter_context(started(folder, *arguments))
            _wait(lambda: len(_steps(root, name)) > 2, "the third step", launcher, 240)
            return launcher, _ranks(launcher), folder

        yield start


WAYS = {
    "a rank is killed": (1, signal.SIGKILL, "rank 0: another rank is gone or hangs"),
    "the first rank is killed": (0, signal.SIGKILL, "rank 1: another rank is gone or hangs"),
    "a rank is stopped": (1, signal.SIGSTOP, "rank 0: another rank is gone or hangs"),
}


@pytest.mark.parametrize("way", WAYS)
def test_deaths(way: str, root: Path, running: Any) -> None:
    who, how, says = WAYS[way]
    name = way.replace(" ", "_")
    launcher, ranks, folder = running(name)
    begin = time.monotonic()
    os.kill(launcher.pid if who is None else ranks[who], how)
    # The ranks' own patience (impatient_train), 30 s of torchrun's until it kills, and a busy CPU.
    status = launcher.wait(timeout=90)
    seconds = time.monotonic() - begin
    lines = _own_lines(folder)
    print(f"\n{way}: status {status} after {seconds:.1f} s: {lines}")
    assert status != 0
    assert len(lines) == 1 and lines[0].startswith(says), lines
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    steps = _steps(root, name)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves(how: signal.Signals, root: Path, running: Any) -> None:
    """Ctrl-C and SIGTERM end a run between two steps, with all that it recorded in a checkpoint."""
    launcher, ranks, folder = running(how.name)
    begin = time.monotonic()
    os.kill(launcher.pid, how)
    launcher.wait(timeout=90)
    print(f"\n{how.name}: {time.monotonic() - begin:.1f} s")
    assert not _own_lines(folder)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    steps = _steps(root, how.name)
    assert steps == list(range(1, len(steps) + 1))
    status = json.loads((root / "runs" / how.name / "status.json").read_text())
    assert (status["reason"], status["requeue"]) == ("preempted", True)
    assert status["last_checkpoint"] == f"step_{steps[-1]}"


def test_full_disk(root: Path) -> None:
    """A limit on the size of files stands for the disk; what was recorded before can be read."""
    folder = root / "launch_full"
    overrides = [*without_engine(root), "train.steps=1000", "run.name=full"]
    overrides.append("logging.tensorboard=false")
    limited = ["bash", "-c", 'ulimit -f 12; exec "$@"', "limited"]
    arguments = command(2, str(root / "config.yaml"), *overrides)
    with started(folder, *limited, *arguments) as launcher:
        assert launcher.wait(timeout=240) == FAILED
    lines = _own_lines(folder)
    print(lines)
    assert len(lines) == 1 and "metrics.jsonl" in lines[0] and "free space" in lines[0]
    recorded = read_metrics(root / "runs" / "full" / METRICS_NAME).lines
    assert [line["step"] for line in recorded] == list(range(1, len(recorded) + 1))
    assert len(recorded) > 2


def test_without_torchrun(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "megatron_vopd.train", str(root / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert run.returncode == MISTAKE and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "torchrun --nproc-per-node" in run.stderr


def _engines(launcher: subprocess.Popen) -> list[int]:
    """List the process ids of the children of running engines."""
    found = []
    for rank in _ranks(launcher):
        for supervisor in Path(f"/proc/{rank}/task/{rank}/children").read_text().split():
            found += Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return [int(pid) for pid in found]


def _another_engine(launcher: subprocess.Popen, child: int) -> bool:
    try:
        return any(pid != child for pid in _engines(launcher))
    except OSError:  # one ended while it was looked at
        return False


@needs_engine
def test_engine_killed(root: Path) -> None:
    """The responses are sampled again: the run ends as if nothing had happened."""
    runs = {}
    for name in ("undisturbed", "killed"):
        overrides = ["train.steps=20", f"run.name={name}", "checkpoint.export_hf=false"]
        arguments = command(1, str(root / "config.yaml"), *overrides)
        folder = root / f"launch_{name}"
        with started(folder, *arguments) as launcher:
            _wait(lambda name=name: _steps(root, name), "the first step", launcher, 200)
            if name == "killed":
                (child,) = _engines(launcher)
                os.kill(child, signal.SIGKILL)
                restarted = partial(_another_engine, launcher, child)
                _wait(restarted, "the engine was started again", launcher, 60)
            assert launcher.wait(timeout=200) == 0, (folder / "err").read_text()
        lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
        runs[name] = [json.loads(line) for line in lines]
    keys = ("step", "loss/mean", "reward/mean", "optim/grad_norm", "rollout/length_mean")
    kept = {name: [[line[key] for key in keys] for line in run] for name, run in runs.items()}
    assert kept["killed"] == kept["undisturbed"]


@needs_engine
def test_engine_that_cannot_start(root: Path) -> None:
    """vLLM's attention on CPU takes no heads of 24; and a fixed configuration starts at once."""
    path = save_model(root, "narrow", 0, head_dim=24)
    folder = root / "launch_narrow"
    overrides = [f"student.path={path}", "run.name=narrow"]
    with started(folder, *command(1, str(root / "config.yaml"), *overrides)) as launcher:
        assert launcher.wait(timeout=240) == FAILED
    lines = _own_lines(folder)
    print(lines)
    assert len(lines) == 1 and "head_dim=24" in lines[0] and "engine_0.log" in lines[0]
    assert _steps(root, "narrow") == []
