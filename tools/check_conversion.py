"""Compare a converted model with the HuggingFace folder that it came from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vopd.errors import OK
from megatron_vopd.run.terminal import PhaseBars, say
from megatron_vopd.run.tool_options import DIFFERENT, DTYPE_NAMES, run_on_ranks, tool_parser

SUMMARY = """\
Compare OTHER (a megatron-core checkpoint or a HuggingFace folder) with HF_DIR: every tensor bit by
bit; then the logits and the gradient of a fixed sequence, in fp32, against transformers.
Exit status: 0 the same model, 1 different, 2 a mistake. The second part holds both models in
memory; --tensors-only leaves it out."""
EXAMPLES = """\
  python tools/check_conversion.py ./Qwen3-0.6B ./Qwen3-0.6B-megatron
  python tools/check_conversion.py ./Qwen3-0.6B ./Qwen3-0.6B-again --tensors-only
  python tools/check_conversion.py ./Qwen3-0.6B ./out --dtype bf16     # converted with --dtype"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = tool_parser(SUMMARY, EXAMPLES)
    parser.add_argument("hf_dir", metavar="HF_DIR", type=Path)
    parser.add_argument("other", metavar="OTHER", type=Path)
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="type that OTHER was converted to, if it was"
    )
    parser.add_argument(
        "--tensors-only", action="store_true", help="bits only: needs little memory"
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="leave pickled objects of OTHER unread"
    )
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from torch.distributed import get_world_size

    from megatron_vopd.checkpoint.convert import compare as conversion_check
    from megatron_vopd.errors import LayoutError
    from megatron_vopd.megatron.groups import student_groups
    from megatron_vopd.types import Layout

    if get_world_size() != 1:
        raise LayoutError("check_conversion runs in one process; start it without torchrun")
    groups = student_groups(Layout(1))
    with PhaseBars() as bars:
        rows = conversion_check.check_tensors(
            options.hf_dir,
            options.other,
            groups,
            DTYPE_NAMES[options.dtype],
            options.weights_only,
            bars.begin,
        )
    if not options.tensors_only:
        rows += conversion_check.check_outputs(
            options.hf_dir, options.other, groups, options.weights_only
        )
    table = Table(box=None, pad_edge=False)
    for column in ("check", "result", "expected", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(row.name, row.result, row.expected, "ok" if row.passed else "FAILED")
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    passed = all(row.passed for row in rows)
    say("the same model" if passed else "NOT the same model")
    return OK if passed else DIFFERENT


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_on_ranks(lambda: check(options))


if __name__ == "__main__":
    sys.exit(main())
