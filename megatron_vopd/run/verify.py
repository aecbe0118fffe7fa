"""The hashes of a checkpoint, checked by all ranks while rank 0 decides what to resume from.

Ranks take a share of the files each, so that the check of a large checkpoint takes no longer than
its loading. What the files' hashes mean for the run is for rank 0 alone (`run.folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_vopd.collectives import rank_0_helped
from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.atomic_folder import CheckHashes, FileRecord, verify_hashes

T = TypeVar("T")
Question = tuple[Path, Sequence[FileRecord]]
Answer = tuple[int, str] | None
Ask = Callable[[Question], list[Answer]]


def with_all_ranks(action: Callable[[CheckHashes], T]) -> T:
    """Run `action(check)` on rank 0; `check` has all ranks hash a share of the files each.

    Every rank of the world calls it. Two all-gathers for each check, and two at the end: of the
    names of the files, of the first failure of each rank, of the result.

    Raises:
        UserError: on every rank when rank 0 raised one, or an OSError.
    """
    return rank_0_helped(lambda ask: action(partial(_check, ask)), _first_failure)


def _check(ask: Ask, folder: Path, records: Sequence[FileRecord]) -> None:
    """Raise FileError for the first file in the order of the records that is not what it was."""
    failures = [answer for answer in ask((folder, records)) if answer is not None]
    if failures:
        raise FileError(min(failures)[1])


def _first_failure(question: Question) -> Answer:
    """Hash this rank's share, largest files first in turn; return place and text of a failure."""
    folder, records = question
    order = sorted(range(len(records)), key=lambda i: -records[i].size)
    for place in sorted(order[dist.get_rank() :: dist.get_world_size()]):
        try:
            verify_hashes(folder, [records[place]])
        except FileError as error:
            return place, str(error)
        except OSError as error:
            return place, f"{error.filename or folder}: {error.strerror}"
    return None
