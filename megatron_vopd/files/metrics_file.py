"""`metrics.jsonl`: one line per completed step, exactly once, over kills and restarts.

A line is one write at the end of the file, and on the disk before the step counts as recorded. A
kill in between leaves a torn last line, which opening cuts off; a run that resumes from an earlier
step repeats what came after it, so opening also drops those lines. An evaluation is added to the
line of its step; before the first step it makes a line 0. NaN and infinity, which JSON does not
have, are null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vopd.errors import UserError, shown

METRICS_NAME = "metrics.jsonl"
_MAX_STEP = 2**53
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


class MetricsError(UserError):
    """A metrics file that is missing, damaged or cannot be written: file, line and remedy."""


@dataclass(frozen=True)
class Recorded:
    """The lines of a metrics file, by ascending step; whether a torn one followed them."""

    lines: list[dict[str, Any]]
    is_torn: bool


def read_metrics(path: Path) -> Recorded:
    """What `path` holds; raises MetricsError naming the line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MetricsError(f"{path}: {error.strerror}; give the folder of a run") from None
    *texts, rest = content.split(b"\n")
    is_torn = bool(rest)
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        line = _parsed(text)
        if line is None and number == len(texts) and not rest:
            is_torn = True
        elif line is None:
            raise MetricsError(
                f"{path}:{number}: got {shown(text[:60])}, expected a JSON object with a step; "
                "remove the line"
            )
        elif lines and line["step"] <= lines[-1]["step"]:
            raise MetricsError(
                f"{path}:{number}: got step {line['step']} after step {lines[-1]['step']}, "
                "expected ascending steps; remove one of the lines"
            )
        else:
            lines.append(line)
    return Recorded(lines, is_torn)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if type(step) is int and 0 <= step < _MAX_STEP else None


def metrics_line(step: int, metrics: Mapping[str, float | None]) -> str:
    """The line of one step, with its end."""
    return json.dumps({"step": step, **{key: _json(v) for key, v in metrics.items()}}) + "\n"


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
        last_step: the step that the run goes on after; -1 for a new one, which keeps nothing.

    Raises:
        MetricsError: the file is damaged in the middle, or cannot be written.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        self._path = path
        recorded = read_metrics(path) if path.exists() else Recorded([], False)
        kept = [line for line in recorded.lines if line["step"] <= last_step]
        self.num_dropped = len(recorded.lines) - len(kept)
        self.last_recorded = kept[-1]["step"] if kept else -1
        try:
            if recorded.is_torn or self.num_dropped:
                self._rewrite(len(kept))
            self._fd = os.open(path, _FLAGS, 0o644)
            _sync_folder(path.parent)
        except OSError as error:
            raise MetricsError(f"{path}: {error.strerror}; check the run folder") from None

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a completed step; it is on the disk when this returns.

        Raises:
            ValueError: a step that is not after the last recorded one.
            MetricsError: the disk refuses; what was written is cut off at the next opening.
        """
        if step <= self.last_recorded:
            raise ValueError(f"step: expected more than {self.last_recorded}, got {step}")
        data = metrics_line(step, metrics).encode()
        try:
            written = os.write(self._fd, data)
            os.fsync(self._fd)
        except OSError as error:
            raise MetricsError(f"{self._path}: {error.strerror}; free space on the disk") from None
        if written < len(data):
            raise MetricsError(
                f"{self._path}: only {written} bytes written; free space on the disk"
            )
        self.last_recorded = step

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add to the line of the last step, or record it where it has none yet.

        The file is written anew beside its place: a kill leaves the line with or without them.

        Raises:
            ValueError: a step before the last recorded one.
            MetricsError: the disk refuses; the line stays as it was.
        """
        if step != self.last_recorded:
            self.append(step, metrics)
            return
        lines = read_metrics(self._path).lines
        last = {key: value for key, value in lines[-1].items() if key != "step"}
        try:
            self._rewrite(len(lines) - 1, metrics_line(step, last | dict(metrics)).encode())
            os.close(self._fd)
            self._fd = os.open(self._path, _FLAGS, 0o644)
        except OSError as error:
            raise MetricsError(f"{self._path}: {error.strerror}; free space on the disk") from None

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _rewrite(self, num_lines: int, last: bytes = b"") -> None:
        """Keep the first lines only, with `last` after them: written beside, then renamed."""
        content = b"".join(self._path.read_bytes().splitlines(keepends=True)[:num_lines])
        beside = self._path.with_name(self._path.name + ".tmp")
        with open(beside, "wb") as file:
            file.write(content + last)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)
        _sync_folder(self._path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
