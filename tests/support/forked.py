"""Many short lives in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.harness import PR_SET_PDEATHSIG

JOBS = len(os.sched_getaffinity(0))


def run_forked(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], seconds: float = 300.0
) -> list[Any]:
    """Return `function(*call)` of each call, made in a process of its own, one for each core.

    Args:
        function: of a module; it and its results must pickle.
        seconds: longest time that all of them may take.

    Raises:
        AssertionError: with the traceback of the first call that failed.
    """
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["tests.support.preload"])
    with tempfile.TemporaryDirectory() as folder:
        parent = context.Process(target=_fork_all, args=(function, calls, folder))
        parent.start()
        try:
            parent.join(seconds)
        finally:
            parent.kill()  # the calls end with it
            parent.join()
        failed = Path(folder) / "failed"
        assert not failed.exists(), failed.read_text()
        assert not parent.exitcode, f"ended with {parent.exitcode}; -9: not done after {seconds} s"
        return [pickle.loads((Path(folder) / str(i)).read_bytes()) for i in range(len(calls))]


def _fork_all(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], folder: str) -> None:
    _end_with_parent()
    running: set[int] = set()
    for number, call in enumerate(calls):
        if len(running) == JOBS and not _one_ended(running):
            break
        process = os.fork()
        if process == 0:
            _life(function, call, Path(folder), str(number))
        running.add(process)
    while running and _one_ended(running):
        pass


def _one_ended(running: set[int]) -> bool:
    """Wait for a child; return whether it succeeded."""
    process, status = os.wait()
    running.discard(process)
    return status == 0


def _life(function: Callable[..., Any], call: tuple[Any, ...], folder: Path, name: str) -> None:
    _end_with_parent()
    tempfile.tempdir = str(folder / f"tmp_{name}")
    os.mkdir(tempfile.tempdir)
    try:
        (folder / name).write_bytes(pickle.dumps(function(*call)))
    except BaseException:
        (folder / "failed").write_text(f"call {name}: {traceback.format_exc()}")
        os._exit(1)
    shutil.rmtree(tempfile.tempdir)
    os._exit(0)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
