"""A file that is replaced whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from megatron_vopd.errors import UserError


class PublishError(UserError):
    """A destination that cannot be written, or a published folder that is not what was written."""


@contextlib.contextmanager
def naming(path: Path, outcome: str = "nothing was published") -> Iterator[None]:
    """Failures of the file system as one line that names the path."""
    try:
        yield
    except OSError as error:
        raise PublishError(f"{path}: {error.strerror}; {outcome}") from error


def sync_folder(folder: Path, outcome: str = "nothing was published") -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder, outcome):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular_size(path: Path) -> int | None:
    """Size of a regular file that is no link; None for anything else."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def replace_text(path: Path, text: str) -> None:
    """Written beside, flushed, then renamed: a reader sees the old text or the new one."""
    beside = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with naming(path, "it stays as it was; check the disk"):
        descriptor = os.open(beside, flags, 0o644)
        try:
            os.write(descriptor, text.encode("ascii"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(beside, path)
    sync_folder(path.parent, f"{path.name} may not outlive a power failure")
