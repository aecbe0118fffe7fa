"""Options and exit statuses of the scripts in tools/, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_vopd.errors import MISTAKE, UserError, shown
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.run.environment import require_rank

# A comparison that was made, and found that two models differ.
DIFFERENT = 1
# --dtype -> name of the data type; None: as stored.
DTYPE_NAMES = {None: None} | {row.config: row.name for row in CONFIG_DTYPES.values()}


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only one."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def tool_parser(summary: str, examples: str) -> argparse.ArgumentParser:
    """Make a parser whose help ends with examples."""
    return argparse.ArgumentParser(
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def whole_number(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """Return what parses an option's integer from `least` to `most`; an error says what it got."""
    expected = "" if least is None else f" >= {least}" if most is None else f" {least} to {most}"

    def parsed(text: str) -> int:
        if re.fullmatch(r"-?[0-9]{1,18}", text.strip()):
            value = int(text)
            if (least is None or least <= value) and (most is None or value <= most):
                return value
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected an integer{expected}")

    return parsed


def positive_number(text: str) -> float:
    """Parse an option's finite number above 0; raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected a number above 0")
    return value


def make_folder(folder: Path) -> None:
    """Make the folder of a tool's output and those above it; raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{error.strerror}, expected a folder to write into"
        raise UserError(f"{folder}: {what}; choose another") from None


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both directions of a conversion take."""
    parser.add_argument(
        "--dtype", choices=tuple(CONFIG_DTYPES), help="type of the result (default: as stored)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and compare every bit before it becomes visible",
    )


def run_tool(action: Callable[[], int]) -> int:
    """Run `action`, which returns the exit status; a user's mistake is one line and status 2."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        return action()
    except UserError as error:
        if is_first_rank():
            print(str(error).replace("\n", " "), file=sys.stderr, flush=True)
        return MISTAKE


def run_on_ranks(action: Callable[[], int]) -> int:
    """Run `action` as `run_tool` does, on every rank of torchrun's world, or in a world of one."""

    def joined() -> int:
        from megatron_vopd.megatron.groups import init_single_process, init_world
        from megatron_vopd.megatron.transformer_engine import hide_if_broken

        hide_if_broken()  # before megatron-core, which it would keep from being imported
        if os.environ.get("WORLD_SIZE", "1") != "1":
            require_rank(
                os.environ, "start it with torchrun --nproc-per-node N, or unset WORLD_SIZE"
            )
            init_world("cpu")
        else:
            init_single_process()
        return action()

    return run_tool(joined)
