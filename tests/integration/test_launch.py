"""An example's launch script with real torchrun and real training, for every way a run may end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.runs import descendants, environment, save_run, without_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).parents[2] / "examples" / "math_qwen3_4b" / "launch.sh"
PROGRAMS = {"vopd": "megatron_vopd.cli", "torchrun": "torch.distributed.run"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script beside a small run's configuration, and its programs from this environment."""
    root = tmp_path_factory.mktemp("launch")
    save_run(root)
    shutil.copy(SCRIPT, root / "launch.sh")
    (root / "bin").mkdir()
    for name, module in PROGRAMS.items():
        (root / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (root / "bin" / name).chmod(0o755)
    return root


def _start(root: Path, name: str, *settings: str) -> subprocess.Popen[str]:
    variables = environment() | {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "GPUS": "2"}
    arguments = [*without_engine(root), f"run.name={name}", *settings]
    return subprocess.Popen(
        ["bash", str(root / "launch.sh"), *arguments],
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def _until_steps(root: Path, name: str, number: int, process: subprocess.Popen[str]) -> None:
    path, deadline = root / "runs" / name / "metrics.jsonl", time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_done(workplace: Path) -> None:
    code, out = _ended(_start(workplace, "done"))
    assert code == 0 and "done after step 3" in out, out


def test_stopped_then_started_again(workplace: Path) -> None:
    process = _start(workplace, "stopped", "train.steps=300")
    _until_steps(workplace, "stopped", 2, process)
    process.send_signal(signal.SIGTERM)
    code, out = _ended(process)
    assert code == 75 and "preempted after step" in out, out
    process = _start(workplace, "stopped", "train.steps=300")
    made = int(out.split("preempted after step ")[1].split(";")[0])
    _until_steps(workplace, "stopped", made + 1, process)
    process.send_signal(signal.SIGTERM)
    code, out = _ended(process)
    assert code == 75 and f"resumed: step {made}" in out, out


def test_a_mistake(workplace: Path) -> None:
    code, out = _ended(_start(workplace, "mistake", "data.prompt_field=question"))
    assert code == 93 and "do not requeue after step 0" in out, out


def test_a_killed_rank(workplace: Path) -> None:
    process = _start(workplace, "killed", "train.steps=300")
    _until_steps(workplace, "killed", 1, process)
    ranks = [
        pid
        for pid in descendants(process.pid)
        if b"megatron_vopd.train" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    code, out = _ended(process)
    assert code == 1 and ("crash after step" in out or "not there" in out), out
