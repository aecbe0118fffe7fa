"""`torchrun -m megatron_vopd.train CONFIG`: a run from its configuration to the exported student.

Every rank runs `main`. A mistake of the user is one line and exit status 2; a failure of the run
(an engine, a lost rank, a full disk, too many skipped steps) is one line and exit status 1. The
first rank that notices prints it; the others print nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before the imports: megatron-core and torch report each fallback of a machine without GPU or
    # TransformerEngine, on every rank. Ctrl-C during the seconds that they take just exits. And a
    # broken TransformerEngine must not keep megatron-core from being imported.
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megatron_vopd.megatron.transformer_engine import hide_if_broken

    hide_if_broken()

import torch
import torch.distributed as dist

from megatron_vopd.collectives import StopFlag, all_ranks, speaks_for_all
from megatron_vopd.config import Config, load_config
from megatron_vopd.errors import FAILED, INTERRUPTED, MISTAKE, OK, RunFailure, UserError
from megatron_vopd.megatron.groups import init_world
from megatron_vopd.run.begin import begin
from megatron_vopd.run.dry_run import dry_run
from megatron_vopd.run.environment import prepare_cuda, require_rank
from megatron_vopd.run.loop import ending_noted, train
from megatron_vopd.run.start import longest_wait_seconds, resolved_device

# What gloo, nccl and the store say when a rank does not take part.
LOST_RANK = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe")
LOST_RANK += ("Timed out", "timed out", "Timeout", "timeout")

_EXAMPLES = """\
examples:
  torchrun --nproc-per-node 8 -m megatron_vopd.train config.yaml
  torchrun --nproc-per-node 8 -m megatron_vopd.train config.yaml train.steps=10 run.name=short
  torchrun --nproc-per-node 8 -m megatron_vopd.train config.yaml --dry-run

`vopd check CONFIG` looks at a configuration without starting anything."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as configured; return the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return _status(options)
    except KeyboardInterrupt:  # also while another error was being handled
        return _report(INTERRUPTED, "interrupted; what was recorded is in the run folder")


def _status(options: argparse.Namespace) -> int:
    """Run as asked and return the exit status; errors that a user can meet become one line."""
    try:
        require_rank(os.environ)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)  # by each rank: which is the first is unknown
        return MISTAKE
    try:
        config = load_config(options.config, options.overrides)
        prepare_cuda(config.parallel.tp, config.parallel.cp)
        device = resolved_device(config.parallel.device)
        init_world(device, longest_wait_seconds(config.rollout.deadline_seconds))
        (dry_run if options.dry_run else _train)(config, device)
        return OK
    except UserError as error:
        return _report(MISTAKE, str(error))
    except RunFailure as error:
        return _report(FAILED, f"{type(error).__name__}: {error}")
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _report(FAILED, f"rank {_rank()}: {where}{error.strerror or error}; check the disk")
    except torch.OutOfMemoryError as error:
        remedy = "lower train.max_tokens_per_microbatch, or cut the models into more parts"
        return _report(FAILED, f"rank {_rank()}: {_first_line(error)}; {remedy}")
    except RuntimeError as error:
        if not any(text in str(error) for text in LOST_RANK):
            raise
        seen = f"rank {_rank()}: another rank is gone or hangs ({_first_line(error)})"
        return _report(FAILED, f"{seen}; torchrun names the first that failed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun -m megatron_vopd.train",
        description="Distil a teacher into a student on the student's own samples.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file; see examples/")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        default=[],
        help="settings that replace the file's",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, make two steps on random tokens of the full length, print memory",
    )
    return parser


def _interrupt(*_: Any) -> None:
    """Raise KeyboardInterrupt once: a second signal must not interrupt the closing."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _train(config: Config, device: str) -> None:
    stop = StopFlag(device)
    with ending_noted(Path(config.run.dir) / config.run.name) as ending:
        run = ending.run = begin(config, device, stop)
        try:
            if run.pusher is not None:
                run.say(f"engines: starting (logs: {run.run_dir / 'engines'})")
                run.pusher(run.trainer.policy_version)
            stop.listen()
            ending.reason = train(run)
        finally:
            run.close()
    all_ranks(lambda: None)  # a rank whose engine would not end fails them all


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _first_line(error: Exception) -> str:
    """Return the first sentence, without the place in torch's sources that it may begin with."""
    return re.sub(r"^\[[^]]*\] ?", "", str(error).strip().partition("\n")[0]).split(". ")[0][:200]


def _report(status: int, line: str) -> int:
    """Print `line` once per job and return `status`.

    The first rank that comes here prints; before the ranks have met, the first of each node does.
    """
    meets = dist.is_initialized()
    if speaks_for_all() if meets else os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a broken process group may wait for ever; the engine was closed above.
    os._exit(status)
