"""No process and no shared memory outlives the trainer, whatever state they are in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vopd.rollout.vllm.supervisor import reap_session, session_pids

# An engine: it ignores polite signals, has a worker of its own, and shares memory with it.
ENGINE = """
import mmap, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
file = open(sys.argv[1], "w+b"); file.truncate(4096); memory = mmap.mmap(file.fileno(), 4096)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(sys.argv[2], "w").write("up")
if sys.argv[3] == "leave": os._exit(3)
time.sleep(300)
"""
# A trainer: it starts the supervisor as `local` does, and waits to be killed.
TRAINER = """
import os, subprocess, sys, time
module = "megatron_vopd.rollout.vllm.supervisor"
supervisor = [sys.executable, "-m", module, str(os.getpid())]
child = subprocess.Popen([*supervisor, *sys.argv[1:]], start_new_session=True)
print(child.pid, flush=True)
time.sleep(300)
"""


def _wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _start(tmp_path: Path, how: str) -> tuple[subprocess.Popen, int, Path]:
    shared = Path(f"/dev/shm/megatron_vopd_test_{os.getpid()}")
    up = tmp_path / "up"
    engine = [sys.executable, "-c", ENGINE, str(shared), str(up), how]
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, *engine], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    session = int(trainer.stdout.readline())
    _wait_for(up.exists)
    return trainer, session, shared


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_sigkill_of_the_trainer_ends_everything(tmp_path: Path, how: str) -> None:
    trainer, session, shared = _start(tmp_path, "stay")
    pids = session_pids(session)
    assert len(pids) == 3 and shared.exists()
    if how == "stopped":
        for pid in pids[1:]:
            os.kill(pid, signal.SIGSTOP)
    trainer.kill()
    trainer.wait()
    _wait_for(lambda: not session_pids(session))
    assert not shared.exists()


def test_an_engine_that_leaves_takes_its_workers_along(tmp_path: Path) -> None:
    trainer, session, shared = _start(tmp_path, "leave")
    _wait_for(lambda: not session_pids(session))
    trainer.kill()
    trainer.wait()
    assert reap_session(session, [str(shared)])
    assert not shared.exists(), "what an engine had mapped before it left is removed too"


def test_the_trainer_reaps_when_the_supervisor_is_gone(tmp_path: Path) -> None:
    trainer, session, shared = _start(tmp_path, "stay")
    os.kill(session, signal.SIGKILL)
    _wait_for(lambda: session not in session_pids(session))
    assert reap_session(session) and not session_pids(session)
    assert not shared.exists()
    trainer.kill()
    trainer.wait()


def test_memory_that_others_use_stays(tmp_path: Path) -> None:
    trainer, session, shared = _start(tmp_path, "stay")
    import mmap

    with open(shared, "r+b") as file:
        mine = mmap.mmap(file.fileno(), 4096)
        assert reap_session(session)
        assert shared.exists()
        mine.close()
    shared.unlink()
    trainer.kill()
    trainer.wait()
