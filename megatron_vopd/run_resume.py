"""What a start goes on from: `checkpoint.resume` and what lies in the run folder (rule R2).

The newest checkpoint that verifies, byte by byte, is gone on from; `latest` is a hint that is only
compared. A folder in which steps were made and nothing verifies is an error, never a fresh start.
For one rank; the caller tells the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_vopd.run_folder import (
    checkpoints_dir,
    latest_remark,
    newest_valid,
    remove_stale,
    saved_steps,
    step_of,
    verify_checkpoint,
)
from megatron_vopd.types import UserError


class ResumeError(UserError):
    """A run folder that cannot be resumed from, and must not be started over."""


@dataclass(frozen=True)
class Resume:
    """What a start goes on from; `folder` None: from nothing.

    Attributes:
        step: steps made at that point.
        remarks: lines for the reader about what was passed over.
    """

    folder: Path | None
    step: int
    remarks: tuple[str, ...]


def choose(run_dir: Path, resume: str) -> Resume:
    """What `resume` (`auto`, `never`, or a checkpoint folder) means for this run folder.

    A folder of another run starts this one once; later starts go on from this run's own.

    Raises:
        ResumeError: steps were made here and no checkpoint of them verifies, or two runs would mix.
        PublishError: the given folder is no checkpoint that verifies; the file is named.
    """
    remove_stale(run_dir)
    steps, has_metrics = saved_steps(run_dir), _has_step(run_dir / "metrics.jsonl")
    if resume == "never":
        if steps or has_metrics:
            raise ResumeError(
                f"run.name: got {run_dir}, which holds a run already, expected a new folder for "
                "checkpoint.resume=never; choose another run.name, or set checkpoint.resume=auto"
            )
        return Resume(None, 0, ())
    given = None if resume == "auto" else Path(resume)
    if given is not None and given.resolve().parent == checkpoints_dir(run_dir).resolve():
        return _own_checkpoint(given, steps)
    chosen, refused = newest_valid(run_dir)
    remarks = (*refused, *latest_remark(run_dir, chosen))
    if chosen is not None:
        if given is not None:
            remarks = (*remarks, f"checkpoint.resume={given}: {run_dir} has checkpoints of its own")
        return Resume(chosen, step_of(chosen.name) or 0, remarks)
    if steps or has_metrics:
        reasons = "; ".join(refused) or "no checkpoint was saved"
        raise ResumeError(
            f"{run_dir}: steps were made here, but nothing can be resumed from ({reasons}); "
            "restore a checkpoint, choose another run.name, or remove the folder"
        )
    if given is None:
        return Resume(None, 0, remarks)
    return Resume(given, verify_checkpoint(given), remarks)


def _own_checkpoint(given: Path, steps: list[int]) -> Resume:
    """A checkpoint of this very run, asked for by its path."""
    step = verify_checkpoint(given)
    newer = [other for other in steps if other > step]
    if newer:
        raise ResumeError(
            f"checkpoint.resume: got {given}, but step_{newer[0]} beside it is newer; move the "
            "newer ones away, or choose another run.name"
        )
    return Resume(given, step, ())


def _has_step(path: Path) -> bool:
    """Whether a step was recorded; an evaluation before the first one, step 0, is none."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
            if re.match(rb'\{"step": 0[,}]', line):
                line = file.readline()
            return line.endswith(b"\n")
    except FileNotFoundError:
        return False
