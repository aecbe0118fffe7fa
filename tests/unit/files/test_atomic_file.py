"""A file that is replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.files.atomic_file import FileError, replace, replacing


def test_content_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, expected in (
        ("new", b"new"),
        ("\u00e4\ud800", b"\xc3\xa4?"),
        (b"\0\xff", b"\0\xff"),
    ):
        replace(path, content)
        assert path.read_bytes() == expected
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
def test_a_failure_leaves_the_old_content_alone(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    replace(path, "old")

    def failing(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(FileError) as caught:
        patch.setattr(os, operation, failing)
        replace(path, "new")
    assert str(caught.value).startswith(f"{path}: No space left on device; it stays as it was")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    replace(tmp_path / "file", "0123456789")
    assert (tmp_path / "file").read_text() == "0123456789"


def test_a_writer_of_its_own_may_fail(tmp_path: Path) -> None:
    replace(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_nobody_sees_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace(path, "old")
    with replacing(path) as beside:
        beside.write_text("ne")
        assert path.read_text() == "old"
        beside.write_text("new")
    assert path.read_text() == "new"
