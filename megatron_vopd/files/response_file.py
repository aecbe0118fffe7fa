"""A JSONL file that is written over several starts: no line lost, none doubled, none torn.

`OUT.partial` grows by appended lines, each batch flushed to the disk; when it is whole it becomes
`OUT`. `OUT.info.json` says what the lines are made from, and stays. A start that finds a part goes
on behind its last whole line; a last line that was torn by a kill is cut off. Lines come in a fixed
order, so that a file says by itself what is missing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vopd.errors import UserError, refusal, shown
from megatron_vopd.files.atomic_file import sync_folder

Place = tuple[str, int]  # prompt id, sample


class ResponseFileError(UserError):
    """A response file that cannot be gone on with, or not be written."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "correct that and start again: whole lines stay"
        got = f"an error ({error.strerror})"
        raise refusal(path, got, "a file that can be written", remedy) from None


class ResponseFile:
    """One output; a context manager that holds it against a second writer.

    Attributes:
        num_lines: whole lines, in the order of `places`.
        is_complete: `OUT` is there, with all of them.
        repaired: what had to be cut off, for the reader; empty: nothing.

    Args:
        out_path: where the complete file will be.
        identity: JSON values that the lines are made from, by names that mean something to the
            user: a part made from others is refused by these names.
        places: (`prompt_id`, `sample`) of every line of the complete file.
    """

    def __init__(
        self, out_path: Path, identity: Mapping[str, Any], places: Sequence[Place]
    ) -> None:
        self._out, self._places = out_path, places
        self._identity = json.loads(json.dumps(dict(identity)))
        self._part = out_path.with_name(out_path.name + ".partial")
        self._info = out_path.with_name(out_path.name + ".info.json")
        self.num_lines, self.is_complete, self.repaired = 0, False, ""
        self._file: Any = None

    def __enter__(self) -> ResponseFile:
        if not self._out.parent.is_dir():
            raise refusal(self._out.parent, "no such folder", "a folder", "make it first")
        if self._is_done():
            return self
        with _naming(self._part):
            self._file = open(self._part, "a+b")
        try:
            self._lock()
            # Another writer may have finished between the look and the lock.
            if self._is_done():
                return self
            if not self._part.stat().st_size:
                self._write_info()
            self._recover()
        except BaseException:
            self._file.close()
            raise
        return self

    def _is_done(self) -> bool:
        """Whether all is done already; refuses what was made from something else."""
        if self._out.exists() or (self._part.exists() and self._part.stat().st_size):
            self._require_same()
        if self._out.exists():
            self.num_lines, self.is_complete = len(self._places), True
        return self.is_complete

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "let it end, or choose another output"
            got = "a file in use by another process"
            raise refusal(self._part, got, "one's own", remedy) from None

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the next lines, and have them on the disk; the last ones make the file visible."""
        start = self.num_lines
        wanted = list(self._places[start : start + len(records)])
        assert [_place(record) for record in records] == wanted, "lines out of order"
        lines = [json.dumps(record, default=str) + "\n" for record in records]
        with _naming(self._part):
            self._file.write("".join(lines).encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.num_lines += len(records)
        self.finish()

    def finish(self) -> None:
        """Give the file its name once it is whole."""
        if self.num_lines < len(self._places) or self.is_complete:
            return
        with _naming(self._out):
            os.rename(self._part, self._out)
        sync_folder(self._out.absolute().parent)
        self.is_complete = True

    def _write_info(self) -> None:
        temporary = self._info.with_name(self._info.name + ".tmp")
        with _naming(self._info):
            with open(temporary, "w", encoding="ascii") as file:
                file.write(json.dumps(self._identity, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._info)

    def _require_same(self) -> None:
        """Refuse to go on with, or to replace, what was made from something else."""
        there = self._out if self._out.exists() else self._part
        try:
            before = json.loads(self._info.read_text(encoding="ascii"))
            assert isinstance(before, dict)
        except (OSError, ValueError, AssertionError):
            got = f"a file without a readable {self._info.name} beside it"
            remedy = "choose another output, or move this one away"
            raise refusal(there, got, "one that this tool began", remedy) from None
        different = [
            f"{key} {shown(self._identity.get(key))} (before: {shown(before.get(key))})"
            for key in sorted(self._identity.keys() | before.keys())
            if self._identity.get(key) != before.get(key)
        ]
        if different:
            remedy = "give the same again, or choose another output"
            raise refusal(there, ", ".join(different), "what it was begun with", remedy)

    def _recover(self) -> None:
        """Count whole lines, and cut off a torn last one."""
        self._file.seek(0)
        good, torn = 0, ""
        for line in self._file:
            if torn:
                remedy = "move it away and start again"
                raise refusal(
                    f"{self._part}:{self.num_lines + 1}", torn, "the line that was written", remedy
                )
            torn = self._fault(line)
            if not torn:
                good += len(line)
                self.num_lines += 1
        size = self._part.stat().st_size
        if size > good:
            self.repaired = f"{self._part}: a torn last line of {size - good} bytes was cut off"
            with _naming(self._part):
                self._file.truncate(good)
                os.fsync(self._file.fileno())

    def _fault(self, line: bytes) -> str:
        if not line.endswith(b"\n"):
            return "a line without end"
        try:
            place = _place(json.loads(line))
        except (ValueError, KeyError, TypeError):
            return "no record of ours"
        if self.num_lines >= len(self._places) or place != self._places[self.num_lines]:
            return f"sample {place[1]} of {shown(place[0])}, out of order"
        return ""


def _place(record: Mapping[str, Any]) -> Place:
    return record["prompt_id"], record["sample"]
