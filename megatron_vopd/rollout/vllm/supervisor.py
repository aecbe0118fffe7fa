"""The process that ends an engine with everything it started, also when the trainer cannot.

`python -m megatron_vopd.rollout.vllm.supervisor PARENT_PID COMMAND...` leads a session of its own,
runs COMMAND in it, and watches two things: the command and its own parent. When either is gone it
ends every process of the session and removes the shared memory that only they had mapped. It
imports nothing heavy and holds no lock, so that it still runs when the engine hangs or is stopped.

Processes are found by their session, which no process of vLLM leaves, and which survives the death
of their parents. Linux only (/proc).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.2
SCAN_SECONDS = 5.0
REAP_SECONDS = 10.0
TRACKER_SECONDS = 2.0
SHARED_MEMORY = "/dev/shm/"


def session_pids(session: int) -> list[int]:
    """Return the living processes of a session; zombies do not count."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            state, _, _, its_session = text.rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(entry))
    return found


def mapped_shared_memory(pids: list[int]) -> set[str]:
    """Return the files below /dev/shm that the processes have mapped and that have a name."""
    found = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            path = line.partition(SHARED_MEMORY)[2]
            if path and not path.endswith(" (deleted)"):
                found.add(SHARED_MEMORY + path)
    return found


def reap_session(session: int, known: Iterable[str] = ()) -> bool:
    """Kill every process of a session but this one; remove shared memory nobody else has mapped.

    Args:
        known: shared memory that its processes had mapped before; some may have ended since.

    Returns:
        Whether all were gone within REAP_SECONDS.
    """
    own = os.getpid()
    leftovers = set(known)
    begin = time.monotonic()
    while pids := [pid for pid in session_pids(session) if pid != own]:
        leftovers |= mapped_shared_memory(pids)
        seconds = time.monotonic() - begin
        for pid in pids:
            # Python's trackers of shared memory remove it and end when all its users are gone.
            if seconds > TRACKER_SECONDS or not _is_tracker(pid):
                _kill(pid)
        if seconds > REAP_SECONDS:
            return False
        time.sleep(0.02)
    if leftovers:
        leftovers -= mapped_shared_memory([int(e) for e in os.listdir("/proc") if e.isdigit()])
        for path in leftovers:
            Path(path).unlink(missing_ok=True)
    return True


def _is_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descriptors(arguments: list[str]) -> Iterator[int]:
    """Yield the file descriptors that a command names as fd=NUMBER."""
    for argument in arguments:
        if argument.startswith("fd="):
            yield int(argument.removeprefix("fd="))


def main(arguments: list[str]) -> int:
    parent, command = int(arguments[0]), arguments[1:]
    child = subprocess.Popen(command, pass_fds=list(descriptors(command)))
    for number in descriptors(command):
        os.close(number)
    session, known, scanned = os.getsid(0), set(), 0.0
    while os.getppid() == parent and child.poll() is None:
        if time.monotonic() - scanned > SCAN_SECONDS:
            known |= mapped_shared_memory(session_pids(session))
            scanned = time.monotonic()
        time.sleep(POLL_SECONDS)
    reap_session(session, known)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
