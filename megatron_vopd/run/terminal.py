"""What the conversion tools share: the world, progress bars, one line for a user's mistake."""

from __future__ import annotations

import argparse
import datetime
import logging
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from megatron_vopd.errors import UserError
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.rollout.engine import Progress

OK, DIFFERENT, MISTAKE = 0, 1, 2


def tool_parser(summary: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends with examples."""
    return argparse.ArgumentParser(
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=tuple(CONFIG_DTYPES), help="type of the result (default: as stored)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and compare every bit before it becomes visible",
    )


DTYPE_NAMES = {None: None} | {row.config: row.name for row in CONFIG_DTYPES.values()}


def run_tool(action: Callable[[], int]) -> int:
    """Join the world, run `action`, and turn a user's mistake into one line and status 2."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_vopd.megatron.groups import init_single_process, init_world

    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            init_world("cpu")
        else:
            init_single_process()
        return action()
    except UserError as error:
        if is_first_rank():
            print(str(error).replace("\n", " "), file=sys.stderr, flush=True)
        return MISTAKE


def is_first_rank() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """A line on standard output, from rank 0 alone."""
    if is_first_rank():
        print(text, flush=True)


class ProgressBars:
    """One bar per phase with bytes, speed and time left, on rank 0's standard error."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bars = Bar(
            TextColumn("{task.description}", justify="right"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (is_first_rank() and sys.stderr.isatty()),
        )

    def __enter__(self) -> ProgressBars:
        self._stack.enter_context(self._bars)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def begin(self, phase: str, total: int) -> Callable[[int], None]:
        """A new bar of `total` bytes; the returned function counts the bytes done."""
        task = self._bars.add_task(phase, total=max(total, 1))
        return lambda done: self._bars.advance(task, done)


@contextmanager
def progress_bar(description: str, console: Console | None = None) -> Iterator[Progress]:
    """`with progress_bar("responses") as progress: engine.generate(..., progress)`.

    Args:
        console: where to draw; None: standard error.
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def show(finished: int, total: int) -> None:
            bar.update(task, completed=finished, total=total)

        yield show


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
        self._bar: Bar | None = None
        if out.isatty():
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[at]}", markup=False),
            )
            self._bar = Bar(*columns, console=Console(file=out, highlight=False, markup=False))
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
    def progress(self, what: str) -> Iterator[Progress | None]:
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
