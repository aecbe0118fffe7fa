"""A conversion that ends at each of its file operations in turn, and what is left.

A script, started by test_conversion_crash: it imports everything once and forks one child for each
point. `kill`: SIGKILL just before the operation; `torn`: a write stores half of its bytes first;
`fail`: the operation raises EIO.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "rmdir", "unlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """A count of file operations from the moment it is armed, which strikes at one of them."""

    def __init__(self, mode: str, strike_at: int) -> None:
        self.mode, self.strike_at = mode, strike_at
        self.count = 0
        self.seen: list[str] = []

    def arm(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & WRITING:
                return original(*args, **kwargs)
            self.count += 1
            self.seen.append(name)
            if self.count == self.strike_at:
                if self.mode == "fail":
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if self.mode == "torn" and name == "write":
                    original(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call


def _convert(tool: str, source: Path, out: Path) -> Callable[[Faults, list[str]], int]:
    """Return an action that runs the tool and gives its exit status."""

    def action(faults: Faults, audited: list[str]) -> int:
        from tests.support.tools import load_tool

        main = load_tool(tool).main
        watch(out.parent, audited)
        faults.arm()
        return main([str(source), str(out)])

    return action


def watch(folder: Path, audited: list[str]) -> None:
    """Write down what this process does in the folder, as the interpreter itself sees it."""

    def audit(event: str, args: tuple) -> None:
        inside = bool(args) and str(args[0]).startswith(str(folder))
        # A tree is taken apart by names below open folders.
        inside |= event in ("os.remove", "os.rmdir") and args[1] != -1
        if inside and event == "open" and isinstance(args[2], int) and args[2] & WRITING:
            audited.append("open")
        if inside and event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.truncate"):
            audited.append(event.removeprefix("os."))

    sys.addaudithook(audit)


def _silenced() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def strike(
    action: Callable[[Faults, list[str]], int], traceback_path: Path, mode: str, at: int
) -> dict[str, Any]:
    """Run `action` once in a fork; it arms the faults that it is given.

    Returns:
        how it ended, and after how many operations when it was not struck.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            faults, audited = Faults(mode, at), []
            _silenced()
            status = action(faults, audited)
            found = {"status": status, "count": faults.count, "seen": faults.seen, "audit": audited}
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(found))
        except BaseException:
            traceback_path.write_text(traceback.format_exc())
            os._exit(70)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, code = os.waitpid(pid, 0)
    found = json.loads(text) if text else {}
    return found | {"killed": os.WIFSIGNALED(code), "exit": code}


def state_of(out: Path) -> str:
    """Return absent, complete or partial."""
    from megatron_vopd.files.atomic_folder import verify_manifest

    if not os.path.lexists(out):
        return "absent"
    with contextlib.suppress(ValueError):
        if verify_manifest(out) is not None:
            return "complete"
    return "partial"


def enumerate_points(tool: str, source: Path, root: Path, mode: str) -> dict[str, Any]:
    """Try every operation; return the states found, and what a whole run does."""

    def one(out: Path, at: int) -> dict[str, Any]:
        return strike(_convert(tool, source, out), out.parent / "traceback", mode, at)

    whole = one(root / "whole", 0)
    assert whole.get("status") == 0, whole
    states: dict[str, int] = {}
    problems = []
    for at in range(1, whole["count"] + 1):
        folder = root / f"{mode}{at}"
        folder.mkdir()
        ended = one(folder / "out", at)
        state = state_of(folder / "out")
        states[state] = states.get(state, 0) + 1
        leftovers = [path.name for path in folder.glob("out.tmp-*")]
        renamed = at > whole["seen"].index("rename") + 1
        if mode == "fail" and (
            ended.get("status") != 2 or leftovers or (state == "complete") != renamed
        ):
            problems.append([at, whole["seen"][at - 1], state, ended, leftovers])
        if mode != "fail" and not ended["killed"]:
            problems.append([at, whole["seen"][at - 1], state, ended])
        if at % 10 == 0 and state == "absent":
            again = one(folder / "out", 0)
            if again.get("status") != 0 or list(folder.glob("out.tmp-*")):
                problems.append([at, "second run", again])
        shutil.rmtree(folder)
    audited = sorted(whole["audit"])
    counted = sorted(
        "remove" if name == "unlink" else str(name)
        for name in whole["seen"]
        if name not in ("write", "fsync")
    )
    return {
        "points": whole["count"],
        "states": states,
        "problems": problems,
        "unseen": audited != counted and [audited, counted],
    }


def main() -> None:
    tool, source, root, *modes = sys.argv[1:]
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    import megatron_vopd.checkpoint.convert.to_hf  # noqa: F401
    import tests.support.preload  # noqa: F401

    for mode in modes:
        folder = Path(root) / mode
        folder.mkdir()
        print(json.dumps({mode: enumerate_points(tool, Path(source), folder, mode)}), flush=True)


if __name__ == "__main__":
    main()
