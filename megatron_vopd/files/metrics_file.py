"""`metrics.jsonl`: one line per completed step, exactly once, over kills and restarts.

A line is on the disk before the step counts as recorded. A kill in between leaves a torn last line,
which opening cuts off; a run that resumes from an earlier step repeats what came after it, so
opening also drops those lines. An evaluation is added to the line of its step; before the first
step it makes a line 0. NaN and infinity, which JSON does not have, are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vopd.errors import shown
from megatron_vopd.files.atomic_file import FileError, naming
from megatron_vopd.files.jsonl import JsonLines, scan

METRICS_NAME = "metrics.jsonl"
_MAX_STEP = 2**53


@dataclass(frozen=True)
class Recorded:
    """The lines of a metrics file, by ascending step.

    Attributes:
        ends: the byte behind each line; begins with 0, for none.
        is_torn: whether a torn line follows them.
    """

    lines: list[dict[str, Any]]
    ends: list[int]
    is_torn: bool


def read_metrics(path: Path) -> Recorded:
    """Read what `path` holds; raises FileError naming the line."""
    lines: list[dict[str, Any]] = []
    ends = [0]
    with naming(path, "give the folder of a run"):
        for line, end in scan(path, _parsed):
            if lines and line["step"] <= lines[-1]["step"]:
                raise FileError(
                    f"{path}:{len(ends)}: got step {line['step']} after step {lines[-1]['step']}, "
                    "expected ascending steps; remove one of the lines"
                )
            lines.append(line)
            ends.append(end)
        return Recorded(lines, ends, path.stat().st_size > ends[-1])


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < _MAX_STEP:
        return line
    got = shown(text.rstrip(b"\n")[:60])
    raise ValueError(f"got {got}, expected a JSON object with a step; remove the line")


def metrics_record(step: int, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the record of one step, as JSON values."""
    return {"step": step, **{key: _json(value) for key, value in metrics.items()}}


def _json(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return None if value is None else int(value)
    value = float(value)
    return value if math.isfinite(value) else None


class MetricsFile:
    """The open file of a run.

    Attributes:
        num_dropped: whole lines after `last_step` that opening removed.

    Args:
        path: made when absent.
        last_step: the step that the run resumes after; -1 for a new one, which keeps no line.

    Raises:
        UserError: the file is damaged in the middle, in use, or cannot be written.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        self._file = JsonLines(path)
        try:
            recorded = read_metrics(path)
            kept = [line["step"] for line in recorded.lines if line["step"] <= last_step]
            self.num_dropped = len(recorded.lines) - len(kept)
            self.last_recorded = kept[-1] if kept else -1
            if recorded.is_torn or self.num_dropped:
                self._file.cut(recorded.ends[len(kept)])
        except BaseException:
            self._file.close()
            raise

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a completed step; it is on the disk when this returns.

        Raises:
            ValueError: a step that is not after the last recorded one.
            FileError: the disk refuses; what was written is cut off at the next opening.
        """
        if step <= self.last_recorded:
            raise ValueError(f"step: expected more than {self.last_recorded}, got {step}")
        self._file.append([metrics_record(step, metrics)])
        self.last_recorded = step

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add to the line of the last step, or record it where it has none yet.

        The file is written beside its place and renamed: a kill leaves the line with or without
        them.

        Raises:
            ValueError: a step before the last recorded one.
            FileError: the disk refuses; the line stays as it was.
        """
        if step != self.last_recorded:
            self.append(step, metrics)
            return
        recorded = read_metrics(self._file.path)
        kept = self._file.path.read_bytes()[: recorded.ends[-2]]
        self._file.rewrite(kept, [recorded.lines[-1] | metrics_record(step, metrics)])

    def close(self) -> None:
        """Give the file back. May be called twice."""
        self._file.close()
