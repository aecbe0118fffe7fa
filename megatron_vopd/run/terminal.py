"""Progress of a command as its user sees it: bars on a terminal, lines or nothing in a log.

PhaseBars     conversions: a bar of bytes for each phase
counting_bar  sampling: one bar of responses
StepDisplay   training: the steps of a run, its lines, and a second bar within a step.
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichBars

from megatron_vopd.rollout.engine import Progress
from megatron_vopd.run.tool_options import is_first_rank

# Labels, metrics and formats of a step's line.
_STEP_FIGURES = (
    ("reward", "reward/mean", "{:.4f}"),
    ("kl", "kl/reverse", "{:.4f}"),
    ("entropy", "entropy/student", "{:.3f}"),
    ("length", "rollout/length_mean", "{:.1f}"),
    ("of", "curriculum/max_response_tokens", "{:.0f}"),
    ("tokens/s", "perf/tokens_per_second", "{:.0f}"),
)
# Steps whose mean time says how long the others will take.
_RECENT_STEPS = 20


def say(text: str) -> None:
    """Print a line on standard output, from rank 0 alone."""
    if is_first_rank():
        print(text, flush=True)


def _timed_bars(console: Console, *columns: ProgressColumn, **options: Any) -> RichBars:
    """Make bars with their label on the left, then `columns`, then the time left."""
    label = TextColumn("{task.description}", justify="right")
    return RichBars(label, BarColumn(), *columns, TimeRemainingColumn(), console=console, **options)


def _counter(bars: RichBars, task: TaskID) -> Progress:
    """Make the function that sets a bar to `finished` of `total`."""
    return lambda finished, total: bars.update(task, completed=finished, total=total)


class PhaseBars:
    """One bar per phase with bytes, speed and time left, on rank 0's standard error."""

    def __init__(self) -> None:
        self._bars = _timed_bars(
            Console(stderr=True),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            disable=not (is_first_rank() and sys.stderr.isatty()),
        )

    def __enter__(self) -> PhaseBars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def begin(self, phase: str, total: int) -> Callable[[int], None]:
        """Add a bar of `total` bytes; the returned function counts the bytes done."""
        task = self._bars.add_task(phase, total=max(total, 1))
        return lambda done: self._bars.advance(task, done)


@contextmanager
def counting_bar(label: str, console: Console | None = None) -> Iterator[Progress]:
    """Show one bar: `with counting_bar("responses") as progress: engine.generate(..., progress)`.

    Args:
        console: where to draw; None: standard error.
    """
    console = console or Console(stderr=True)
    columns = (MofNCompleteColumn(), TimeElapsedColumn())
    options = {"transient": True, "disable": not console.is_terminal}
    with _timed_bars(console, *columns, **options) as bars:
        yield _counter(bars, bars.add_task(label, total=None))


def step_line(metrics: Mapping[str, float]) -> str:
    """Format the metrics of a step that a reader follows."""
    parts = [
        f"{label} {shape.format(metrics[key])}"
        for label, key, shape in _STEP_FIGURES
        if key in metrics
    ]
    return "  ".join(parts)


def evaluation_line(metrics: Mapping[str, float]) -> str:
    """Format the evaluation in `metrics`; empty without one."""
    evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
    return "  ".join(f"{key.removeprefix('eval/')} {value:.4g}" for key, value in evaluated.items())


class Eta:
    """Time left, from the mean of the last steps; `clock` gives seconds."""

    def __init__(self, total_steps: int, clock: Any = time.monotonic) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._last = clock()
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)

    def restart(self) -> None:
        """Begin the next step now; the time since the last one is no step's."""
        self._last = self._clock()

    def after(self, step: int) -> str:
        """Return h:mm:ss left after `step`, which ends now."""
        now = self._clock()
        self._seconds.append(now - self._last)
        self._last = now
        mean = math.fsum(self._seconds) / len(self._seconds)
        return str(datetime.timedelta(seconds=round(mean * max(self._total_steps - step, 0))))


class StepDisplay:
    """The steps of a run: a live bar on a terminal, a plain line per step elsewhere."""

    def __init__(self, total_steps: int, last_step: int, out: TextIO) -> None:
        self._total_steps, self._out = total_steps, out
        self._eta = Eta(total_steps)
        self._bars: RichBars | None = None
        if out.isatty():
            figures = TextColumn("{task.description}", markup=False)
            console = Console(file=out, highlight=False, markup=False)
            bar = BarColumn(bar_width=20)
            self._bars = RichBars(bar, MofNCompleteColumn(), figures, console=console)
            done = max(last_step, 0)
            self._task = self._bars.add_task("", total=total_steps, completed=done)
            self._bars.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a completed step."""
        line = f"{step_line(metrics)}  eta {self._eta.after(step)}".strip()
        if self._bars is not None:
            self._bars.update(self._task, completed=step, description=line)
        else:
            self.say(f"step {step}/{self._total_steps}  {line}")
        self.evaluation(step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the evaluation in `metrics`, if any."""
        line = evaluation_line(metrics)
        if line:
            self.say(f"evaluation at step {step}  {line}")
            self._eta.restart()

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress | None]:
        """Show a second bar for something long between two steps, on a terminal only."""
        if self._bars is None:
            yield None
            return
        task = self._bars.add_task(label, total=None)
        try:
            yield _counter(self._bars, task)
        finally:
            self._bars.remove_task(task)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bars is not None:
            self._bars.console.print(text, soft_wrap=True)
        else:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was; a second call changes nothing."""
        if self._bars is not None:
            self._bars.stop()
