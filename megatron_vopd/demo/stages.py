"""A run of the training command as one stage of the demo: started, shown, ended, not made twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from megatron_vopd.files.metrics_file import METRICS_NAME, read_metrics
from megatron_vopd.run.folder import STATUS_NAME, hf_dir, saved_steps, step_of

# One greedy response to each problem of evaluation.jsonl.
ACCURACY = "eval/evaluation/avg@1"
# On a real terminal a step is a bar, elsewhere a line; then every so many of them are shown.
SHOWN_STEPS = 25
# Ranks that are told to stop save first.
_STOP_SECONDS = 60.0
_STEP_LINE = re.compile(r"step (\d+)/(\d+) ")


class StageError(RuntimeError):
    """A stage that did not come to its end; the reason stands above, from the command itself."""


@dataclass(frozen=True)
class Stage:
    """One run of `megatron_vopd.train`.

    Attributes:
        config_path: YAML file.
        overrides: `section.key=value`, beyond those of folder and steps.
        num_ranks: processes on this machine.
        run_dir: folder of the run.
        steps: of the run.
    """

    config_path: Path
    overrides: tuple[str, ...]
    num_ranks: int
    run_dir: Path
    steps: int

    @property
    def export(self) -> Path:
        """The HuggingFace folder of the student after the last step."""
        return hf_dir(self.run_dir, self.steps)

    @property
    def arguments(self) -> list[str]:
        """Of the training command."""
        own = [f"run.dir={self.run_dir.parent}", f"run.name={self.run_dir.name}"]
        own.append(f"train.steps={self.steps}")
        return [str(self.config_path), *own, *self.overrides]

    def is_done(self) -> bool:
        """Whether all steps were made and the export is there."""
        try:
            status = json.loads((self.run_dir / STATUS_NAME).read_text(encoding="ascii"))
            ending = (status["reason"], status["step"])
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return ending == ("done", self.steps) and self.export.is_dir()

    def accuracies(self) -> dict[int, float]:
        """Step -> share of right answers in its evaluation, 0 to 1, by ascending step."""
        lines = read_metrics(self.run_dir / METRICS_NAME).lines
        return {line["step"]: line[ACCURACY] for line in lines if line.get(ACCURACY) is not None}


def configured_steps(config_path: Path) -> int:
    """`train.steps` as the file says."""
    return yaml.safe_load(config_path.read_text(encoding="utf-8"))["train"]["steps"]


def exported_steps(run_dir: Path) -> list[int]:
    """Steps after which the run's student was exported."""
    found = (step_of(folder.name) for folder in (run_dir / "hf").iterdir())
    return [step for step in found if step is not None]


def run_stage(stage: Stage) -> None:
    """Make the run, or go on with it. What an earlier process left without a checkpoint is removed.

    Raises:
        StageError: it ended otherwise than by its last step.
        KeyboardInterrupt: asked to stop; the run has saved its last whole step.
    """
    if not saved_steps(stage.run_dir):
        shutil.rmtree(stage.run_dir, ignore_errors=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(stage.num_ranks), "-m", "megatron_vopd.train"]
    shows_bar = sys.stdout.isatty()
    # A session of its own: Ctrl-C reaches the ranks once, through `_ended_with_us`.
    process = subprocess.Popen(
        [*launcher, *stage.arguments],
        stdin=subprocess.DEVNULL,
        stdout=None if shows_bar else subprocess.PIPE,
        env=_environment(),
        text=True,
        start_new_session=True,
    )
    with _ended_with_us(process):
        if process.stdout is not None:
            for line in thinned(process.stdout):
                print(line, end="", flush=True)
        status = process.wait()
    if status != 0 or not stage.is_done():
        raise StageError(
            f"{stage.run_dir}: the training command ended with status {status} before its last "
            "step; mend what it says above, then start the demo again: it goes on from here"
        )


def _environment() -> dict[str, str]:
    """One thread a rank, and nothing but loopback."""
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **own}


@contextmanager
def _ended_with_us(process: subprocess.Popen[str]) -> Iterator[None]:
    """However the block ends, the launcher and its ranks have ended too."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def thinned(lines: Iterable[str] | IO[str], every: int = SHOWN_STEPS) -> Iterator[str]:
    """All lines but most of those of steps: the first, every so many, and the last stay."""
    for line in lines:
        found = _STEP_LINE.match(line)
        if found is not None:
            step, last = int(found[1]), int(found[2])
            if step not in (1, last) and step % every:
                continue
        yield line
