"""The run folder on disk: checkpoints by step, the hint `latest`, `status.json`.

    RUN/checkpoints/step_N/     published whole, never written to again
    RUN/checkpoints/latest      the name of the newest one, a hint; a resume verifies hashes
    RUN/status.json             why the last process ended, for the launch script
    RUN/best.json               the best evaluation so far, and where its weights are

All functions run on one rank; the caller hands their results to the others.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vopd.errors import UserError, shown
from megatron_vopd.files.atomic_file import (
    FileError,
    naming,
    regular_size,
    replace,
    sync_folder,
)
from megatron_vopd.files.atomic_folder import (
    MANIFEST_NAME,
    CheckHashes,
    remove_leftovers,
    verify_manifest,
    verify_sizes,
)
from megatron_vopd.files.metrics_file import METRICS_NAME

KIND = "training run"
LATEST_NAME, STATUS_NAME, BEST_NAME = "latest", "status.json", "best.json"
LOCK_NAME = "lock"
_STEP_NAME = re.compile(r"step_(0|[1-9][0-9]{0,15})")
_MAX_LATEST_BYTES, MAX_STATUS_BYTES = 64, 65536


class RunBusyError(UserError):
    """A run folder in which another process trains; its files must not be touched."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock the folder for this process; the lock is gone when the process ends, however it does.

    Two runs in one folder would remove each other's checkpoints. On a file system without locks
    nothing is checked.

    Raises:
        RunBusyError: another process has it.
    """
    with naming(run_dir / LOCK_NAME, "choose another run.name or run.dir"):
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(run_dir / LOCK_NAME, flags, 0o644)
    try:
        _lock(descriptor, run_dir)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 200).decode("ascii", "backslashreplace").strip()
        raise RunBusyError(
            f"run.name: got {run_dir}, in which a run is going on ({owner or 'just started'}), "
            "expected a folder for this run alone; wait for its end, or choose another run.name"
        ) from None
    except OSError:
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"step_{step}"


def hf_dir(run_dir: Path, step: int) -> Path:
    """Return the folder to which the student after `step` steps is exported."""
    return run_dir / "hf" / f"step_{step}"


def step_of(name: str) -> int | None:
    """Return N of `step_N`; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def saved_steps(run_dir: Path) -> list[int]:
    """Return the steps with a checkpoint folder, newest first, valid or not."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    found = [(step_of(path.name), path) for path in folder.iterdir()]
    return sorted(
        (step for step, path in found if step is not None and path.is_dir()), reverse=True
    )


def verify_checkpoint(folder: Path, check: CheckHashes | None = None) -> int:
    """Verify that every byte of a run's checkpoint is what was written; return its step.

    Args:
        check: checks the hashes, on all ranks (`run.verify`); None: on this one.

    Raises:
        FileError: naming the first file that differs, or why it is no such checkpoint.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise FileError(f"{folder}: not a folder; give a step_N folder of a run's checkpoints")
    try:
        manifest = verify_manifest(folder, check)
    except OSError as error:
        raise FileError(f"{error.filename or folder}: {error.strerror}") from error
    if manifest is None:
        raise FileError(
            f"{folder}: has no manifest.json, so it is no checkpoint, or not a complete one; give "
            "a step_N folder of a run's checkpoints"
        )
    step = manifest.get("step")
    if manifest.get("kind") != KIND or type(step) is not int or step < 0:
        raise FileError(f"{folder}: not a checkpoint of a training run; give a step_N folder")
    return step


def newest_valid(run_dir: Path, check: CheckHashes | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a line about each newer one that does not."""
    refused: list[str] = []
    for step in saved_steps(run_dir):
        folder = step_dir(run_dir, step)
        try:
            if verify_checkpoint(folder, check) == step:
                return folder, refused
            refused.append(f"{folder}: {MANIFEST_NAME} says another step; rename the folder back")
        except FileError as error:
            refused.append(str(error))
    return None, refused


def latest_remark(run_dir: Path, chosen: Path | None) -> list[str]:
    """Return a log line when `latest` does not name the checkpoint that was chosen."""
    path = checkpoints_dir(run_dir) / LATEST_NAME
    if not os.path.lexists(path):
        return [] if chosen is None else [f"{path}: missing; {chosen.name} is the newest"]
    size = regular_size(path)
    if size is None or size > _MAX_LATEST_BYTES:
        return [f"{path}: not a short text file; it is ignored"]
    text = path.read_bytes().decode("ascii", "backslashreplace").strip()
    if chosen is not None and text == chosen.name:
        return []
    name = "nothing" if chosen is None else chosen.name
    return [f"{path}: says {shown(text)}, but {name} is the newest that verifies"]


def write_latest(run_dir: Path, step: int) -> None:
    """Replace `latest` atomically.

    Raises:
        FileError: a folder stands in its place.
    """
    path = checkpoints_dir(run_dir) / LATEST_NAME
    if path.is_dir() and not path.is_symlink():
        raise FileError(f"{path}: is a folder, expected a file; remove it")
    replace(path, f"step_{step}\n")


def make_room(run_dir: Path, step: int, check: CheckHashes | None = None) -> tuple[bool, list[str]]:
    """Make room for a checkpoint: a folder in its place that does not verify is set aside.

    Returns:
        True if the step is saved already, and log lines about what was moved.
    """
    folder = step_dir(run_dir, step)
    if not os.path.lexists(folder):
        return False, []
    try:
        verify_checkpoint(folder, check)
    except FileError as error:
        aside = folder.with_name(f"{folder.name}.damaged-{secrets.token_hex(4)}")
        os.rename(folder, aside)
        sync_folder(folder.parent)
        return False, [f"{error}; moved to {aside.name}, and saved again"]
    return True, []


def remove_old(run_dir: Path, newest: int, keep: int, also: Collection[int] = ()) -> list[int]:
    """Remove what is older than the `keep` newest checkpoints up to step `newest`.

    Only folders whose files have their sizes count; those of later steps, which a resumed run
    passed over, are neither counted nor removed. A folder is renamed before it is taken apart, so
    that none is ever half there under its name.

    Args:
        newest: a step that was just published or verified.
        keep: how many of the newest checkpoints stay.
        also: steps that stay in any case.

    Returns:
        The steps that were removed.
    """
    past = [step for step in saved_steps(run_dir) if step <= newest]
    kept = [step for step in past if step == newest or _looks_whole(step_dir(run_dir, step))][:keep]
    removed = [step for step in past if step < kept[-1] and step not in also]
    if len(kept) < keep:
        return []
    for step in removed:
        folder = step_dir(run_dir, step)
        gone = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(6)}")
        with naming(folder, "it was to be removed; newer ones are whole; check the disk"):
            os.rename(folder, gone)
            shutil.rmtree(gone)
    return removed


def _looks_whole(folder: Path) -> bool:
    try:
        return verify_sizes(folder) is not None
    except (FileError, OSError):
        return False


def remove_stale(run_dir: Path) -> None:
    """Remove what killed processes left: temporary folders, and files beside `latest`."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return
    remove_leftovers(folder / "step_*")
    names = (STATUS_NAME, BEST_NAME, METRICS_NAME)
    beside = [path for name in names for path in run_dir.glob(f"{name}.tmp-*")]
    for path in [*folder.glob(f"{LATEST_NAME}.tmp-*"), *beside]:
        if regular_size(path) is not None:
            path.unlink()
