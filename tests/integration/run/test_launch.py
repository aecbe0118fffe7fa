"""An example's launch script with real torchrun and real training, for every way a run may end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.runs import descendants, save_run, started, without_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
WAIT_SECONDS = 600
SCRIPT = ROOT / "examples" / "math_qwen3_4b" / "launch.sh"
PROGRAMS = {"vopd": "megatron_vopd.cli", "torchrun": "torch.distributed.run"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Put the script beside a small run's configuration, and programs of this environment."""
    root = tmp_path_factory.mktemp("launch")
    save_run(root)
    shutil.copy(SCRIPT, root / "launch.sh")
    (root / "bin").mkdir()
    for name, module in PROGRAMS.items():
        (root / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (root / "bin" / name).chmod(0o755)
    return root


@contextmanager
def _launched(root: Path, name: str, *settings: str) -> Iterator[subprocess.Popen]:
    variables = {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "GPUS": "2"}
    arguments = [*without_engine(root), f"run.name={name}", *settings]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        with started(root / f"out_{name}", "bash", str(root / "launch.sh"), *arguments) as process:
            yield process


def _ended(root: Path, name: str, process: subprocess.Popen) -> tuple[int, str]:
    code = process.wait(timeout=WAIT_SECONDS)
    folder = root / f"out_{name}"
    return code, (folder / "out").read_text() + (folder / "err").read_text()


def _until_steps(root: Path, name: str, number: int, process: subprocess.Popen) -> None:
    path, deadline = root / "runs" / name / "metrics.jsonl", time.monotonic() + WAIT_SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_done(workplace: Path) -> None:
    with _launched(workplace, "done") as process:
        code, out = _ended(workplace, "done", process)
    assert code == 0 and "done after step 3" in out, out


def test_stopped_then_started_again(workplace: Path) -> None:
    made = 0
    for _ in range(2):
        with _launched(workplace, "stopped", "train.steps=3000") as process:
            _until_steps(workplace, "stopped", made + 2, process)
            process.send_signal(signal.SIGTERM)
            code, out = _ended(workplace, "stopped", process)
        assert code == 75 and "preempted after step" in out, out
        assert made == 0 or f"resumed: step {made}" in out, out
        made = int(out.split("preempted after step ")[1].split(";")[0])


def test_a_mistake(workplace: Path) -> None:
    with _launched(workplace, "mistake", "data.response_field=no") as process:
        code, out = _ended(workplace, "mistake", process)
    assert code == 93, out
    with _launched(workplace, "mistake", "data.prompt_field=question") as process:
        code, out = _ended(workplace, "mistake", process)
    assert code == 93, out


def test_a_killed_rank(workplace: Path) -> None:
    with _launched(workplace, "killed", "train.steps=3000") as process:
        _until_steps(workplace, "killed", 1, process)
        commands = {pid: _command_line(pid) for pid in descendants(process.pid)}
        ranks = [pid for pid, line in commands.items() if " -u -m megatron_vopd.train" in line]
        assert len(ranks) == 2, commands
        os.kill(max(ranks), signal.SIGKILL)
        code, out = _ended(workplace, "killed", process)
    assert code == 1 and ("crash after step" in out or "not there" in out), out


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
