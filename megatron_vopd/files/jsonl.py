"""A file of JSON lines that grows by appending: no line is lost, none is torn.

An append is on the disk when it returns. A kill in between leaves a torn last line, which `scan`
leaves out and `JsonLines.cut` removes. One process has the file at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_vopd.errors import refusal
from megatron_vopd.files.atomic_file import FileError, naming, replace, sync_folder, write_all

Line = TypeVar("Line")


def scan(path: Path, parse: Callable[[bytes], Line]) -> Iterator[tuple[Line, int]]:
    """Yield each line as `parse` makes it, and the byte behind it; a torn last line is left out.

    Args:
        parse: raises ValueError for what is no line of the file: got, expected, remedy.

    Raises:
        FileError: a line that is none, and is not the last.
        OSError: the file cannot be read.
    """
    end, fault = 0, ""
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if fault:
                raise FileError(f"{path}:{number - 1}: {fault}")
            if not text.endswith(b"\n"):
                return
            try:
                line = parse(text)
            except ValueError as error:
                fault = str(error)
                continue
            end += len(text)
            yield line, end


class JsonLines:
    """The open file, held against a second writer. A context manager.

    Args:
        path: made when absent.

    Raises:
        UserError: it cannot be opened, or another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._open()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        with naming(self.path, "check the folder"):
            self._fd = os.open(self.path, flags, 0o644)
        try:
            self._lock()
            sync_folder(self.path.parent, "check the folder")
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            got = "a file in use by another process"
            remedy = "let it end, or choose another output"
            raise refusal(self.path, got, "one's own", remedy) from None
        except OSError:
            return  # a file system that knows no locks leaves it to the user

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add one line for each record; they are on the disk when this returns.

        Raises:
            FileError: the disk refuses; what was written is torn, to be cut by the next opening.
        """
        with naming(self.path, "free space on the disk and start again: whole lines stay"):
            write_all(self._fd, text_of(records))
            os.fsync(self._fd)

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        with naming(self.path, "check the disk"):
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)

    def rewrite(self, kept: bytes, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file by the lines `kept` and these: a kill leaves the old or the new."""
        replace(self.path, kept + text_of(records))
        self.close()  # of the old file, which has no name any more
        self._open()

    def close(self) -> None:
        """Give the file back. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def text_of(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return one line of ASCII for each record."""
    lines = [json.dumps(record, default=str) + "\n" for record in records]
    return "".join(lines).encode("ascii")
