"""C4, C5, T2: a rank that is killed, stopped or out of disk while it writes; a second SIGTERM.

Real runs of two ranks without an engine. Each ends with one line or saved; the checkpoint before
stays as it was, and the same command resumes from it to the bits of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import command, environment, save_run, started, without_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, MODULE = 4, "tests.support.faulty_save"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    save_run(root)
    run = subprocess.run(
        _arguments(root, "whole"), env=environment(), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return root


def _arguments(root: Path, name: str, **more: Any) -> list[str]:
    shared = [*without_engine(root), f"run.name={name}", f"train.steps={STEPS}"]
    shared += ["checkpoint.interval=2", "checkpoint.export_hf=false", "logging.tensorboard=false"]
    return command(2, str(root / "config.yaml"), *shared, **more)


def _faulty(root: Path, name: str, fault: str, rank: int, step: int) -> Any:
    os.environ |= {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEP": str(step)}
    return started(root / f"launch_{name}", *_arguments(root, name, module=MODULE))


def _own_lines(folder: Path) -> list[str]:
    """Return standard error without torchrun's report."""
    lines = (folder / "err").read_text().splitlines()
    assert not [line for line in lines if "megatron_vopd/" in line and ".py" in line], lines
    ends = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    ours = lines[: min(ends, default=len(lines))]
    return [line for line in ours if line and not re.match(r"[WE]\d{4} ", line)]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def _resumed(root: Path, name: str) -> str:
    """Run the same command without the fault, to the bits of the undisturbed run."""
    run = subprocess.run(
        _arguments(root, name), env=environment(), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    folders = [root / "runs" / one / "checkpoints" for one in ("whole", name)]
    assert not list(folders[1].glob("*.tmp-*"))
    for path in sorted((folders[0] / f"step_{STEPS}").glob("*.distcp")):
        assert path.read_bytes() == (folders[1] / f"step_{STEPS}" / path.name).read_bytes()
    return run.stdout


WAYS = {
    "killed": ("KILL", 1, "rank 0: another rank is gone or hangs"),
    "the first killed": ("KILL", 0, "rank 1: another rank is gone or hangs"),
    "stopped": ("STOP", 1, "rank 0: another rank is gone or hangs"),
    "out of disk": ("LIMIT", 1, "__1_0.distcp: File too large; "),
    "the first out of disk": ("LIMIT", 0, "__0_0.distcp: File too large; "),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_writer_comes_to_harm(way: str, root: Path) -> None:
    fault, rank, says = WAYS[way]
    name = way.replace(" ", "_")
    run_dir = root / "runs" / name
    with _faulty(root, name, fault, rank, STEPS) as launcher:
        _until(run_dir / "checkpoints" / "step_2", launcher)
        before = _bytes(run_dir / "checkpoints" / "step_2")
        begin = time.monotonic()
        # The ranks' own patience of 30 s, 30 s of torchrun's, and a busy machine.
        assert launcher.wait(timeout=300) != 0
    lines = _own_lines(root / f"launch_{name}")
    print(f"\n{way}: ended {time.monotonic() - begin:.1f} s after step_2: {lines}")
    assert len(lines) == 1 and says in lines[0], lines
    if fault == "LIMIT":
        assert "bytes of it were written" in lines[0] and "make room" in lines[0]
    assert not (run_dir / "checkpoints" / f"step_{STEPS}").exists()
    assert _bytes(run_dir / "checkpoints" / "step_2") == before
    assert "resumed: step 2" in _resumed(root, name)


def _until(path: Path, process: subprocess.Popen, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not (list(path.parent.glob(path.name)) if path.parent.is_dir() else []):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def _ranks(launcher: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


def test_a_second_sigterm_while_saving(root: Path) -> None:
    """T2: schedulers repeat themselves. The save that the first one asked for is finished."""
    run_dir, folder = root / "runs" / "twice", root / "launch_twice"
    with _faulty(root, "twice", "SLOW", 1, 2) as launcher:
        # The interval's save of step 2 is under way: the first signal comes in it, then more.
        _until(run_dir / "checkpoints" / "step_2.tmp-*", launcher)
        ranks = _ranks(launcher)
        begin = time.monotonic()
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        launcher.wait(timeout=300)
        seconds = time.monotonic() - begin
    status = json.loads((run_dir / "status.json").read_text())
    print(f"\nsecond SIGTERM while saving: ended after {seconds:.1f} s: {status}")
    assert not _own_lines(folder) and seconds < 30
    assert (status["reason"], status["last_checkpoint"]) == ("preempted", "step_2")
    assert "resumed: step 2" in _resumed(root, "twice")
