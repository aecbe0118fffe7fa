"""The places where a run reports: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal.

Only one rank of a run has a writer. Metric names are those of method.md section 8.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_vopd.errors import Problem, UserError
from megatron_vopd.files.metrics_file import METRICS_NAME, MetricsFile
from megatron_vopd.rollout.engine import Progress
from megatron_vopd.run.terminal import StepDisplay


class MetricsWriter:
    """Writer to all the places where a run's metrics go; a context manager.

    Args:
        run_dir: holds `metrics.jsonl` and `tensorboard/`; made when absent.
        tensorboard: write event files too.
        wandb: log to Weights & Biases too, under the name of the run folder.
        console: show steps on `out`.
        total_steps: of the run.
        last_step: the step after which the run resumes; what was recorded later is dropped. -1:
            everything.
        out: where to show; None: standard output.

    Raises:
        UserError: wandb is asked for and not installed, or metrics.jsonl is damaged, in use, or
            cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        tensorboard: bool,
        wandb: bool,
        console: bool,
        total_steps: int,
        last_step: int = 0,
        out: TextIO | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._wandb = _start_wandb(run_dir) if wandb else None
        self._file = MetricsFile(run_dir / METRICS_NAME, last_step)
        self._events = _open_events(run_dir / "tensorboard", last_step) if tensorboard else None
        self._display = StepDisplay(total_steps, last_step, out or sys.stdout) if console else None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a completed step: once per step, steps ascending.

        Call it before the step is saved in a checkpoint, so that no saved step lacks its line.
        """
        self._file.append(step, metrics)
        self._log(step, metrics)
        if self._display is not None:
            self._display.step(step, metrics)

    def record_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report the evaluation after the last recorded step, in that step's line; 0: before any.

        Call it before the step is saved in a checkpoint, as `record`.
        """
        self._file.amend(step, metrics)
        self._log(step, metrics)
        if self._display is not None:
            self._display.evaluation(step, metrics)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        if self._events is not None:
            for key, value in finite.items():
                self._events.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress | None]:
        """Show a bar for something long between two steps; None where none is shown."""
        if self._display is None:
            yield None
            return
        with self._display.progress(what) as progress:
            yield progress

    def say(self, text: str) -> None:
        """Show the reader a line that is no metric."""
        if self._display is not None:
            self._display.say(text)

    def close(self) -> None:
        """Flush and close everything. May be called twice."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._display is not None:
            self._display.close()
        self._events = self._wandb = self._display = None


def _open_events(folder: Path, last_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # Readers forget what earlier event files hold from this step on.
    return SummaryWriter(str(folder), purge_step=last_step + 1, flush_secs=10)


def _start_wandb(run_dir: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        remedy = "install wandb, or set logging.wandb=false"
        problem = Problem("logging.wandb", "true", "the wandb package to be installed", remedy)
        raise UserError(str(problem)) from None
    return wandb.init(
        project="megatron_vopd", id=run_dir.name, name=run_dir.name, dir=run_dir, resume="allow"
    )
