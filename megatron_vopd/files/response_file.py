"""A JSONL file that is written over several starts: no line lost, none doubled, none torn.

`OUT.partial` grows by appended lines, each batch flushed to the disk; when it is whole it becomes
`OUT`. `OUT.info.json` says what the lines are made from, and stays. A start that finds a part
continues behind its last whole line; a last line that was torn by a kill is cut off. Lines come in
a fixed order, so that a file says by itself what is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vopd.errors import refusal, shown
from megatron_vopd.files.atomic_file import naming, replace, sync_folder
from megatron_vopd.files.jsonl import JsonLines, scan

Place = tuple[str, int]  # prompt id, sample
_STAYS = "correct that and start again: whole lines stay"


class ResponseFile:
    """One output, held against a second writer. A context manager.

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
        self._file: JsonLines | None = None

    def __enter__(self) -> ResponseFile:
        if not self._out.parent.is_dir():
            raise refusal(self._out.parent, "no such folder", "a folder", "make it first")
        if self._is_done():
            return self
        self._file = JsonLines(self._part)
        try:
            # Another writer may have finished between the look and the lock.
            if not self._is_done():
                if not self._part.stat().st_size:
                    replace(self._info, json.dumps(self._identity, indent=1) + "\n")
                self._recover(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def _is_done(self) -> bool:
        """Return whether all is there already; refuse what was made from something else."""
        if self._out.exists() or (self._part.exists() and self._part.stat().st_size):
            self._require_same()
        if self._out.exists():
            self.num_lines, self.is_complete = len(self._places), True
        return self.is_complete

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the next lines, and have them on the disk; the last ones make the file visible."""
        start = self.num_lines
        wanted = list(self._places[start : start + len(records)])
        assert [_place(record) for record in records] == wanted, "lines out of order"
        assert self._file is not None, "not opened, or complete"
        self._file.append(records)
        self.num_lines += len(records)
        self.finish()

    def finish(self) -> None:
        """Give the file its name once it is whole."""
        if self.num_lines < len(self._places) or self.is_complete:
            return
        with naming(self._out, _STAYS):
            os.rename(self._part, self._out)
        outcome = f"{self._out.name} may not outlive a power failure"
        sync_folder(self._out.absolute().parent, outcome)
        self.is_complete = True

    def _require_same(self) -> None:
        """Refuse to continue, or to replace, what was made from something else."""
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

    def _recover(self, file: JsonLines) -> None:
        """Count whole lines, and cut off a torn last one."""
        end = 0
        with naming(self._part, _STAYS):
            for _, line_end in scan(self._part, self._parsed):
                self.num_lines += 1
                end = line_end
            num_torn = self._part.stat().st_size - end
        if num_torn:
            self.repaired = f"{self._part}: a torn last line of {num_torn} bytes was cut off"
            file.cut(end)

    def _parsed(self, text: bytes) -> Place:
        """Return the place of the next line; raises ValueError for another line."""
        try:
            place = _place(json.loads(text))
        except (ValueError, KeyError, TypeError, RecursionError):
            got = "no record of ours"
        else:
            if [place] == list(self._places[self.num_lines : self.num_lines + 1]):
                return place
            got = f"sample {place[1]} of {shown(place[0])}, out of order"
        remedy = "move it away and start again"
        raise ValueError(f"got {got}, expected the line that was written; {remedy}")


def _place(record: Mapping[str, Any]) -> Place:
    return record["prompt_id"], record["sample"]
