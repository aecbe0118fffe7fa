"""Functions run on ranks that have TransformerEngine, which the process of the tests has not.

One process per version imports TransformerEngine (over the stand-in) and megatron-core once, and
forks the ranks of every world from itself, as `harness.spawn` has them forked from a fork server.
`python -m tests.support.te.worlds` is that process; it reads calls from its standard input.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import IO, Any

from megatron_vopd.megatron.transformer_engine import NEWEST, OLDEST
from tests.support import ROOT

# Where tools/install_te.py puts it: out of sight of every other process of this environment.
WHEELS = Path(sys.prefix) / "te"
VERSIONS = (OLDEST, NEWEST)
PR_SET_PDEATHSIG = 1


def python_path(version: str) -> list[str]:
    """Return the folders that hold TransformerEngine's Python and what it imports.

    Raises:
        AssertionError: it is not installed for the tests.
    """
    folders = [WHEELS / version, WHEELS / "common"]
    metadata = folders[0] / f"transformer_engine-{version}.dist-info"
    found = PathDistribution(metadata).version if metadata.is_dir() else None
    assert found == version and folders[1].is_dir(), (
        f"{folders[0]}: TransformerEngine {version} is not there for the tests; run: make install"
    )
    return [str(folder) for folder in folders]


def environment(version: str) -> dict[str, str]:
    """Return the environment of a process that can import TransformerEngine `version`."""
    path = [*python_path(version), str(ROOT)]
    # No compiler: what TransformerEngine and megatron-core compile would only be compiled once.
    settings = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(path)}


def _write(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _read(stream: IO[bytes]) -> Any:
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError("the other process is gone")
    return pickle.loads(stream.read(int.from_bytes(size, "little")))


@functools.cache
def _process(version: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        env=environment(version),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(process.wait)
    atexit.register(process.kill)  # the last registered is called first
    return process


def spawn(version: str, fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `fn(*args)` on gloo ranks with TransformerEngine; return every rank's result.

    Args:
        version: one of VERSIONS.
        fn: a module-level function, as for `harness.spawn`.
    """
    process = _process(version)
    assert process.stdin is not None and process.stdout is not None
    _write(process.stdin, (fn, world_size, args))
    is_done, value = _read(process.stdout)
    assert is_done, value
    return value


def main() -> None:
    """Import everything, then answer calls until the standard input closes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a rank prints is no answer

    from tests.support.te import compiled, gpu

    compiled.install()
    import tests.support.preload  # noqa: F401
    from tests.support.harness import fork

    gpu.pretend()
    while True:
        try:
            fn, world_size, args = _read(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _write(answers, (True, fork(fn, world_size, *args)))
        except Exception:
            _write(answers, (False, traceback.format_exc()))


if __name__ == "__main__":
    main()
