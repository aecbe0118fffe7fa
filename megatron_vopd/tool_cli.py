"""What the conversion tools share: the world, progress bars, one line for a user's mistake."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_vopd.types import UserError

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
        "--dtype", choices=("fp32", "bf16"), help="type of the result (default: as stored)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and compare every bit before it becomes visible",
    )


DTYPE_NAMES = {None: None, "fp32": "float32", "bf16": "bfloat16"}


def run_tool(action: Callable[[], int]) -> int:
    """Join the world, run `action`, and turn a user's mistake into one line and status 2."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_vopd.parallel import init_single_process, init_world

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
        self._bars = Progress(
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
