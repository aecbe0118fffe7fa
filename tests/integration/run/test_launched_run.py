"""A launched run with real torchrun and real training: stopped, killed, started again, done."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_vopd.files.metrics_file import read_metrics
from megatron_vopd.run.folder import saved_steps
from megatron_vopd.run.launch import Launch, started, steps_done
from tests.support.runs import descendants, save_run, without_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WAIT_SECONDS = 300


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launched")
    save_run(root)
    return root


def _launch(root: Path, name: str, *overrides: str) -> Launch:
    settings = (*without_engine(root), *overrides)
    return Launch(root / "config.yaml", settings, 2, root / "runs" / name)


def _until_step(run_dir: Path, process: subprocess.Popen[str]) -> None:
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + WAIT_SECONDS
    while not path.exists() or b"\n" not in path.read_bytes():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def _finished(launch: Launch) -> int:
    with started(launch) as process:
        return process.wait(WAIT_SECONDS)


def test_a_stopped_run_is_resumed_where_it_was(workplace: Path) -> None:
    long = _launch(workplace, "stopped", "train.steps=3000")
    with started(long) as process:
        _until_step(long.run_dir, process)
    saved = saved_steps(long.run_dir)[0]
    assert steps_done(long.run_dir) is None and saved >= 1
    last = saved + 2
    assert _finished(_launch(workplace, "stopped", f"train.steps={last}")) == 0
    assert steps_done(long.run_dir) == last
    steps = [line["step"] for line in read_metrics(long.run_dir / "metrics.jsonl").lines]
    assert steps == list(range(1, last + 1))


def test_a_run_killed_before_its_first_checkpoint_is_begun_again(workplace: Path) -> None:
    long = _launch(workplace, "killed", "train.steps=3000")
    with started(long) as process:
        _until_step(long.run_dir, process)
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert not saved_steps(long.run_dir)
    assert _finished(_launch(workplace, "killed", "train.steps=2")) == 0
    assert steps_done(long.run_dir) == 2
