"""Where a run reports: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal.

Only one rank of a run has a writer. Metric names are those of algorithms.md section 8.
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_vopd.metrics_file import METRICS_NAME, MetricsFile
from megatron_vopd.problems import Problem
from megatron_vopd.rollout.engine import Progress as Report
from megatron_vopd.types import UserError

# What a line shows: label, metric, format.
_SHOWN = (
    ("reward", "reward/mean", "{:.4f}"),
    ("kl", "kl/reverse", "{:.4f}"),
    ("entropy", "entropy/student", "{:.3f}"),
    ("length", "rollout/length_mean", "{:.1f}"),
    ("of", "curriculum/max_response_tokens", "{:.0f}"),
    ("tokens/s", "perf/tokens_per_second", "{:.0f}"),
)
_RECENT_STEPS = 20


def summary(metrics: Mapping[str, float]) -> str:
    """The metrics of a step that a reader follows, in one short line."""
    parts = [
        f"{label} {shape.format(metrics[key])}" for label, key, shape in _SHOWN if key in metrics
    ]
    return "  ".join(parts)


def evaluation_summary(metrics: Mapping[str, float]) -> str:
    """The evaluation in `metrics`, in one line; empty without one."""
    evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
    return "  ".join(f"{key.removeprefix('eval/')} {value:.4g}" for key, value in evaluated.items())


class Eta:
    """Time left, from the mean of the last steps; `clock` gives seconds."""

    def __init__(self, total_steps: int, clock: Any = time.monotonic) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._last = clock()
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)

    def restart(self) -> None:
        """The next step begins now; what came before it was no step."""
        self._last = self._clock()

    def after(self, step: int) -> str:
        """h:mm:ss left after `step`, which ends now."""
        now = self._clock()
        self._seconds.append(now - self._last)
        self._last = now
        mean = math.fsum(self._seconds) / len(self._seconds)
        return str(datetime.timedelta(seconds=round(mean * max(self._total_steps - step, 0))))


class Display:
    """Steps on the terminal: a live bar on a real one, a plain line per step elsewhere."""

    def __init__(self, total_steps: int, last_step: int, out: TextIO) -> None:
        self._total_steps, self._out = total_steps, out
        self._eta = Eta(total_steps)
        self._bar: Progress | None = None
        if out.isatty():
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[at]}", markup=False),
            )
            self._bar = Progress(*columns, console=Console(file=out, highlight=False, markup=False))
            done = max(last_step, 0)
            self._task = self._bar.add_task("", total=total_steps, completed=done, at="")
            self._bar.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a completed step."""
        line = f"{summary(metrics)}  eta {self._eta.after(step)}".strip()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, at=line)
        else:
            self.say(f"step {step}/{self._total_steps}  {line}")
        self.evaluation(step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the evaluation in `metrics`, if any."""
        evaluated = evaluation_summary(metrics)
        if evaluated:
            self.say(f"evaluation at step {step}  {evaluated}")
            self._eta.restart()

    @contextmanager
    def progress(self, what: str) -> Iterator[Report | None]:
        """A second bar for something long between two steps, on a real terminal only."""
        if self._bar is None:
            yield None
            return
        bar, task = self._bar, self._bar.add_task("", total=None, at=what)
        try:
            yield lambda finished, total: bar.update(task, completed=finished, total=total)
        finally:
            bar.remove_task(task)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, soft_wrap=True)
        else:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was. May be called twice."""
        if self._bar is not None:
            self._bar.stop()


class MetricsWriter:
    """All the places where a run's metrics go; a context manager.

    Args:
        run_dir: holds `metrics.jsonl` and `tensorboard/`; made when absent.
        tensorboard: write event files too.
        wandb: log to Weights & Biases too, under the name of the run folder.
        console: show steps on `out`.
        total_steps: of the run.
        last_step: the step that the run goes on after; what was recorded later is dropped. -1:
            everything.
        out: where to show; None: standard output.

    Raises:
        UserError: wandb is asked for and not installed.
        MetricsError: metrics.jsonl is damaged, or cannot be written.
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
        self._display = Display(total_steps, last_step, out or sys.stdout) if console else None

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
    def progress(self, what: str) -> Iterator[Report | None]:
        """A bar for something long between two steps; None where none is shown."""
        if self._display is None:
            yield None
            return
        with self._display.progress(what) as report:
            yield report

    def say(self, text: str) -> None:
        """A line for the reader, which is no metric."""
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
