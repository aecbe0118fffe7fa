"""megatron-core distributed checkpoint -> HuggingFace folder (sharded safetensors)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vopd.errors import OK
from megatron_vopd.run.terminal import PhaseBars, say
from megatron_vopd.run.tool_options import (
    DTYPE_NAMES,
    add_conversion_options,
    run_on_ranks,
    tool_parser,
)

SUMMARY = """\
Convert a megatron-core distributed checkpoint, written in any parallel layout, to a HuggingFace
folder: safetensors (with an index when there are several files), config, tokenizer, generation
config. One tensor at a time is in memory. Nothing in the checkpoint is unpickled, and hashes are
checked where it has them. OUT_DIR appears when everything is on the disk, or not at all."""
EXAMPLES = """\
  python tools/convert_megatron_to_hf.py ./Qwen3-0.6B-megatron ./Qwen3-0.6B-again --verify
  python tools/convert_megatron_to_hf.py runs/math/checkpoints/step_100 ./out --max-file-gb 2
  python tools/convert_megatron_to_hf.py ./stock ./out --hf-config ./Qwen3-0.6B --weights-only
  torchrun --nproc-per-node 4 tools/convert_megatron_to_hf.py ./Qwen3-32B-megatron ./out"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = tool_parser(SUMMARY, EXAMPLES)
    parser.add_argument("ckpt_dir", metavar="CKPT_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    add_conversion_options(parser)
    parser.add_argument(
        "--max-file-gb", type=float, default=5.0, help="largest file in 10^9 bytes (default 5)"
    )
    parser.add_argument(
        "--hf-config", type=Path, metavar="DIR", help="config and tokenizer, if CKPT_DIR has none"
    )
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="leave pickled objects of a stock checkpoint unread instead of refusing it",
    )
    options = parser.parse_args(arguments)
    if not 0 < options.max_file_gb < 1e6:
        parser.error(f"--max-file-gb {options.max_file_gb}: expected a number above 0")
    return options


def convert(options: argparse.Namespace) -> int:
    from torch.distributed import get_world_size

    from megatron_vopd.checkpoint.convert.to_hf import megatron_to_hf
    from megatron_vopd.megatron.groups import student_groups
    from megatron_vopd.types import Layout

    groups = student_groups(Layout(get_world_size()))
    with PhaseBars() as bars:
        done = megatron_to_hf(
            options.ckpt_dir,
            options.out_dir,
            groups,
            DTYPE_NAMES[options.dtype],
            options.verify,
            int(options.max_file_gb * 1e9),
            options.hf_config,
            options.weights_only,
            bars.begin,
        )
    say(
        f"{done.out_dir}: {done.num_tensors} tensors, {done.num_bytes:,} bytes, {done.dtype}, "
        f"{done.num_files} files" + (", read back bit-equal" if options.verify else "")
    )
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_on_ranks(lambda: convert(options))


if __name__ == "__main__":
    sys.exit(main())
