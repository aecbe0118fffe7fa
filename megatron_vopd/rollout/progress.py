"""A progress bar over responses, on a terminal only: logs stay free of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from megatron_vopd.rollout.engine import Progress


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
