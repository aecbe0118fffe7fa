"""A file that is replaced whole or not at all, and what every writer of files here shares."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vopd.errors import UserError


class FileError(UserError):
    """A file or folder that cannot be written or read, or is not what was written."""


@contextlib.contextmanager
def naming(path: Path, outcome: str = "nothing was published") -> Iterator[None]:
    """Turn failures of the file system into one line: the path, the reason, `outcome`."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}; {outcome}") from error


def sync_folder(folder: Path, outcome: str = "nothing was published") -> None:
    """Flush a folder's entries to the disk."""
    with naming(folder, outcome):
        _sync(folder, os.O_DIRECTORY)


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular_size(path: Path) -> int | None:
    """Return the size of a regular file that is no link; None for anything else."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def write_all(descriptor: int, data: Any) -> None:
    """Write every byte of `data`; a disk that is full raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; the file made there takes its place, flushed to the disk.

    A failure removes it, and a kill leaves it as `NAME.tmp-*`; either way `path` is as it was.

    Raises:
        FileError: the file system refuses.
    """
    beside = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
    with naming(path, "it stays as it was; check the disk"):
        try:
            yield beside
            _sync(beside)
            os.rename(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    sync_folder(path.parent, f"{path.name} may not outlive a power failure")


def replace(path: Path, content: str | bytes) -> None:
    """Replace a file whole (text as UTF-8): a reader sees the old content or the new.

    Raises:
        FileError: the file system refuses; the old content stays.
    """
    data = content.encode(errors="replace") if isinstance(content, str) else content
    with replacing(path) as beside:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(beside, flags, 0o644)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)
