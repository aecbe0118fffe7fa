"""A run of the training command as one stage of the demo: shown, not made twice, its results."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from megatron_vopd.files.metrics_file import METRICS_NAME, read_metrics
from megatron_vopd.run.folder import hf_dir, step_of
from megatron_vopd.run.launch import Launch, started, steps_done

# One greedy response to each problem of evaluation.jsonl.
ACCURACY = "eval/evaluation/avg@1"
# On a real terminal a step is a bar, elsewhere a line; then every so many of them are shown.
SHOWN_STEPS = 25
_STEP_LINE = re.compile(r"step (\d+)/(\d+) ")


class StageError(RuntimeError):
    """A stage that did not come to its end; the reason stands above, from the command itself."""


@dataclass(frozen=True)
class Stage:
    """A run of the demo: how it is launched, and how many steps it has."""

    launch: Launch
    steps: int

    @property
    def run_dir(self) -> Path:
        return self.launch.run_dir

    @property
    def export(self) -> Path:
        """The HuggingFace folder of the student after the last step."""
        return hf_dir(self.run_dir, self.steps)

    def is_done(self) -> bool:
        """Return whether all steps were made and the export is there."""
        return steps_done(self.run_dir) == self.steps and self.export.is_dir()

    def accuracies(self) -> dict[int, float]:
        """Return step -> share of right answers in its evaluation, 0 to 1, by ascending step."""
        lines = read_metrics(self.run_dir / METRICS_NAME).lines
        return {line["step"]: line[ACCURACY] for line in lines if line.get(ACCURACY) is not None}


def configured_steps(config_path: Path) -> int:
    """Read `train.steps` of a configuration file."""
    return yaml.safe_load(config_path.read_text(encoding="utf-8"))["train"]["steps"]


def exported_steps(run_dir: Path) -> list[int]:
    """List the steps after which the run's student was exported."""
    found = (step_of(folder.name) for folder in (run_dir / "hf").iterdir())
    return [step for step in found if step is not None]


def run_stage(stage: Stage) -> None:
    """Make the run, or resume it, and show what it prints.

    Raises:
        StageError: it ended otherwise than by its last step.
        KeyboardInterrupt: asked to stop; the run has saved its last whole step.
    """
    shows_bar = sys.stdout.isatty()
    with started(stage.launch, None if shows_bar else subprocess.PIPE) as process:
        if process.stdout is not None:
            for line in thinned(process.stdout):
                print(line, end="", flush=True)
        status = process.wait()
    if status != 0 or not stage.is_done():
        raise StageError(
            f"{stage.run_dir}: the training command ended with status {status} before its last "
            "step; mend what it says above, then start the demo again: it resumes from here"
        )


def thinned(lines: Iterable[str] | IO[str], every: int = SHOWN_STEPS) -> Iterator[str]:
    """Leave out most lines of steps: the first, every so many and the last stay, and all others."""
    for line in lines:
        found = _STEP_LINE.match(line)
        if found is not None:
            step, last = int(found[1]), int(found[2])
            if step not in (1, last) and step % every:
                continue
        yield line
