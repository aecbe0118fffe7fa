"""One folder written by all ranks: rank 0 makes and publishes it, every rank adds its files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vopd import __version__
from megatron_vopd.collectives import from_all_ranks, rank_0
from megatron_vopd.files.atomic_folder import Staging, check_destination, staging_folder

# What a folder needs beyond its values: index, config, tokenizer, room for the file system.
SLACK_BYTES = 64 * 2**20

# Begins a phase of so many bytes by its name; the returned function counts the bytes done.
PhaseProgress = Callable[[str, int], Callable[[int], None]]


def no_progress(_phase: str, _total: int) -> Callable[[int], None]:
    return lambda _: None


@dataclass(frozen=True)
class Summary:
    """The folder that a conversion wrote, in numbers."""

    out_dir: Path
    num_tensors: int
    num_bytes: int
    num_files: int
    dtype: str


def begin_staging(stack: ExitStack, out_dir: Path, source_dir: Path, num_bytes: int) -> Staging:
    """Check the destination, make the temporary folder on rank 0, attach the others to it."""

    def make() -> str:
        check_destination(out_dir, source_dir, num_bytes + SLACK_BYTES)
        made.append(stack.enter_context(staging_folder(out_dir)))
        return str(made[0].path)

    made: list[Staging] = []
    path = rank_0(make)
    return made[0] if made else Staging(Path(path))


def publish_staging(staging: Staging, out_dir: Path, info: dict[str, Any]) -> int:
    """Gather what all ranks wrote and publish it; returns the number of files."""
    gathered = from_all_ranks(lambda: staging.records)
    records = [record for part in gathered for record in part]
    versions = {"megatron_vopd": __version__, "torch": torch.__version__}
    rank_0(staging.publish, out_dir, records, {**info, "versions": versions})
    return len(records) + 1
