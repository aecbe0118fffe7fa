"""Runs that die: a rank or an engine killed or stopped, Ctrl-C, SIGTERM, a start without torchrun.

Each ends in one line of ours within the deadline, with every completed step on record and no
process left; a killed engine costs one attempt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import (
    command,
    environment,
    save_run,
    started,
    without_engine,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MISTAKE, FAILED = 2, 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deaths")
    save_run(root)
    return root


def _own_lines(folder: Path) -> list[str]:
    """Standard error without torchrun's report, which begins with the launcher's own log lines."""
    lines = (folder / "err").read_text().splitlines()
    ends = [i for i, line in enumerate(lines) if "torch/distributed/elastic" in line]
    ours = [line for line in lines[: min(ends, default=len(lines))] if line]
    return [line for line in ours if not line.startswith(("W", "E")) or "elastic" not in line]


def _wait(until: Callable[[], Any], what: str, process: subprocess.Popen, seconds: float) -> Any:
    """The first true answer of `until`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = until()
        if answer:
            return answer
        assert process.poll() is None, f"the run ended before {what}: {process.returncode}"
        time.sleep(0.2)
    raise TimeoutError(what)


def _steps(root: Path, name: str) -> list[int]:
    """Steps that a run has recorded."""
    path = root / "runs" / name / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _ranks(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the ranks, by rank."""
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
    """A run of two ranks without an engine that has made two steps of very many."""
    with ExitStack() as stack:

        def start(name: str) -> tuple[subprocess.Popen, list[int], Path]:
            folder = root / f"launch_{name}"
            overrides = [*without_engine(root), "train.steps=100000", f"run.name={name}"]
            module = "tests.integration.impatient_train"
            arguments = command(2, str(root / "config.yaml"), *overrides, module=module)
            launcher = stack.enter_context(started(folder, *arguments))
            _wait(lambda: len(_steps(root, name)) > 2, "the third step", launcher, 240)
            return launcher, _ranks(launcher), folder

        yield start


WAYS = {
    "a rank is killed": (1, signal.SIGKILL, "rank 0: another rank is gone or hangs"),
    "the first rank is killed": (0, signal.SIGKILL, "rank 1: another rank is gone or hangs"),
    "a rank is stopped": (1, signal.SIGSTOP, "rank 0: another rank is gone or hangs"),
    "Ctrl-C": (None, signal.SIGINT, "interrupted; what was recorded is in the run folder"),
    "SIGTERM": (None, signal.SIGTERM, "interrupted; what was recorded is in the run folder"),
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
