"""Worlds of gloo ranks for tests: `spawn` runs a function on every rank, returns all results."""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

COLLECTIVE_SECONDS = 120
WORLD_SECONDS = 300
PR_SET_PDEATHSIG = 1


def _rank_main(rank: int, world_size: int, folder: str) -> None:
    # A rank must not outlive the process that it was forked from, which ends with the test run.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    fn, args, collective_seconds = pickle.loads((Path(folder) / "call").read_bytes())
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=collective_seconds),
    )
    result = fn(*args)
    (Path(folder) / f"result_{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def spawn(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `fn(*args)` on `world_size` gloo ranks with one thread each; returns every rank's result.

    An exception on any rank ends all of them and is raised here with that rank's traceback; so does
    a world that takes longer than WORLD_SECONDS.

    Args:
        fn: a module-level function; `args` and its result must pickle.
    """
    multiprocessing.set_forkserver_preload(["tests.support.preload"])
    return _run_world("forkserver", fn, world_size, args)


def fork(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run as `spawn` does, on ranks forked from this process, with all that it has imported."""
    return _run_world("fork", fn, world_size, args)


def _run_world(
    start_method: str, fn: Callable[..., Any], world_size: int, args: tuple[Any, ...]
) -> list[Any]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        # By file: tensors sent through the process pipe take a file descriptor each.
        (Path(folder) / "call").write_bytes(pickle.dumps((fn, args, COLLECTIVE_SECONDS)))
        world = start_processes(
            _rank_main,
            (world_size, folder),
            nprocs=world_size,
            join=False,
            start_method=start_method,
        )
        assert world is not None
        _join(world)
        return [
            pickle.loads((Path(folder) / f"result_{rank}").read_bytes())
            for rank in range(world_size)
        ]


def _join(world: Any) -> None:
    deadline = time.monotonic() + WORLD_SECONDS
    while not world.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in world.processes:
                process.kill()
            raise TimeoutError(f"{len(world.processes)} ranks still ran after {WORLD_SECONDS} s")
