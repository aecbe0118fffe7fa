"""HuggingFace folder -> megatron-core distributed checkpoint (any layout can load it)."""

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
Convert a HuggingFace model folder (safetensors) to a megatron-core distributed checkpoint, bit by
bit. The checkpoint can be loaded in any parallel layout, and carries config, tokenizer and
generation config. OUT_DIR appears when everything is on the disk, or not at all. No GPU is used."""
EXAMPLES = """\
  python tools/convert_hf_to_megatron.py ./Qwen3-0.6B ./Qwen3-0.6B-megatron --verify
  python tools/convert_hf_to_megatron.py ./Qwen3-0.6B ./out --dtype bf16
  torchrun --nproc-per-node 4 tools/convert_hf_to_megatron.py ./Qwen3-0.6B ./out --tp 2 --pp 2"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = tool_parser(SUMMARY, EXAMPLES)
    parser.add_argument("hf_dir", metavar="HF_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    add_conversion_options(parser)
    for axis, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        parser.add_argument(
            f"--{axis}",
            type=int,
            default=1,
            help=f"{what}-parallel size of the ranks that write (default 1; with torchrun)",
        )
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> int:
    from torch.distributed import get_world_size

    from megatron_vopd.checkpoint.convert.to_megatron import hf_to_megatron
    from megatron_vopd.megatron.groups import student_groups
    from megatron_vopd.types import Layout

    layout = Layout(get_world_size(), tp=options.tp, pp=options.pp, ep=options.ep)
    dtype = DTYPE_NAMES[options.dtype]
    groups = student_groups(layout)
    with PhaseBars() as bars:
        done = hf_to_megatron(
            options.hf_dir, options.out_dir, groups, dtype, options.verify, bars.begin
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
