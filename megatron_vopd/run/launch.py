"""The training command as a child process on this machine: started, resumed, ended with its parent.

`vopd demo` and tools/run_study.py make their runs here. A run that is started again resumes from
its last checkpoint. The child's environment is, the later over the earlier: `ONE_MACHINE`, what
this process inherited, what the caller asks for.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_vopd.files.metrics_file import METRICS_NAME
from megatron_vopd.run.folder import STATUS_NAME, RunBusyError, locked, saved_steps

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
# One thread a rank, and no traffic but over loopback.
ONE_MACHINE: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}
# Ranks that are asked to stop save first.
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Launch:
    """One run of the training command.

    Attributes:
        config_path: YAML file.
        overrides: `section.key=value`; the run's folder is added to them.
        num_ranks: processes on this machine.
        run_dir: folder of the run.
        environment: variables that are set whatever this process inherited.
    """

    config_path: Path
    overrides: tuple[str, ...]
    num_ranks: int
    run_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The configuration and its overrides, as `load_config` takes them."""
        own = [f"run.dir={self.run_dir.parent}", f"run.name={self.run_dir.name}"]
        return [str(self.config_path), *self.overrides, *own]

    @property
    def command(self) -> list[str]:
        """The whole command line, torchrun first."""
        ranks = ["--nproc-per-node", str(self.num_ranks), "-m", "megatron_vopd.train"]
        return [*TORCHRUN, *ranks, *self.arguments]


def child_environment(asked: Mapping[str, str]) -> dict[str, str]:
    """Merge the environment of a child: defaults, then what is inherited, then what is asked."""
    return {**ONE_MACHINE, **os.environ, **asked}


@contextmanager
def started(
    launch: Launch, stdout: int | IO[str] | None = None, stderr: int | IO[str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start a run or resume it. However the block ends, the launcher and its ranks have ended too.

    Args:
        stdout, stderr: as `subprocess.Popen` takes them; None: those of this process.
    """
    remove_unsaved(launch.run_dir)
    # A session of its own: Ctrl-C reaches the ranks once, through `_end`, and they save.
    process = subprocess.Popen(
        launch.command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=child_environment(launch.environment),
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)
        if process.stdout is not None:
            process.stdout.close()


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the launcher to stop and wait for it; kill it with its ranks when it takes too long."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    if process.poll() is None:
        # torchrun gives each rank a session of its own, which its end alone would not end.
        groups = {process.pid, *_groups_of_children(process.pid)}
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.wait()


def _groups_of_children(pid: int) -> Iterator[int]:
    """Yield the process groups of a process's children."""
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in thread.read_text().split():
            with suppress(ProcessLookupError):
                yield os.getpgid(int(child))


def remove_unsaved(run_dir: Path) -> None:
    """Remove a run that was ended before its first checkpoint: training refuses to resume it.

    What is not of a run stays, and so does a run that another process is making; the training
    command says what is wrong with them.
    """
    if not (run_dir / METRICS_NAME).is_file() or saved_steps(run_dir):
        return
    with suppress(RunBusyError), locked(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)


def steps_done(run_dir: Path) -> int | None:
    """Read how many steps a run made that ended by its last one; None: no run, or not ended so."""
    try:
        status = json.loads((run_dir / STATUS_NAME).read_text(encoding="utf-8"))
        reason, step = status["reason"], status["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return step if reason == "done" else None


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP interrupt this process as Ctrl-C does, so that its children end too.

    A signal that is ignored (nohup) stays so.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
