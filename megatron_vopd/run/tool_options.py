"""Options and exit statuses of the scripts in tools/, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from megatron_vopd.errors import MISTAKE, UserError
from megatron_vopd.hf.dtypes import CONFIG_DTYPES

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
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            init_world("cpu")
        else:
            init_single_process()
        return action()

    return run_tool(joined)
