"""JSON lines that grow by appending: one writer, no torn line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_vopd.errors import UserError
from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.jsonl import JsonLines, scan


def numbers(path: Path) -> list[tuple[int, int]]:
    """Return the number and the end of each line."""

    def parse(text: bytes) -> int:
        return json.loads(text)["n"]

    return list(scan(path, parse))


def test_lines_are_appended_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with JsonLines(path) as lines:
        lines.append([{"n": 1}, {"n": 22}])
        lines.append([])
        assert numbers(path) == [(1, 9), (22, 19)]
    for tail in (b'{"n": 3', b'{"n": 3}', b"[", b"\0\0\n"):
        with open(path, "ab") as file:
            file.write(tail)
        assert numbers(path) == [(1, 9), (22, 19)], tail
        with JsonLines(path) as lines:
            lines.cut(19)
            lines.append([{"n": 3}])
        assert [number for number, _ in numbers(path)] == [1, 22, 3]
        os.truncate(path, 19)


def test_a_bad_line_before_another_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"n": 1}\n{"n": 2\n{"n": 3}\n')
    with pytest.raises(FileError, match=r"lines:2: Expecting"):
        numbers(path)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with JsonLines(path) as lines:
        lines.append([{"n": 1}])
        with pytest.raises(UserError, match="lines: got a file in use by another process"):
            JsonLines(path)
        lines.rewrite(b'{"n": 0}\n', [{"n": 5}])
        with pytest.raises(UserError, match="in use"):
            JsonLines(path)
        lines.append([{"n": 6}])
    assert [number for number, _ in numbers(path)] == [0, 5, 6]
    JsonLines(path).close()
    assert os.listdir(tmp_path) == ["lines"]
