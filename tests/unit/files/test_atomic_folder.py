"""Folders that appear whole or not at all, and whose files are verified."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import xxhash

from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.atomic_folder import staging_folder, verify_manifest
from tests.support import ROOT

FORMAT_1 = ROOT / "tests" / "fixtures" / "published_format_1"


def _publish(out: Path) -> Path:
    with staging_folder(out) as staging:
        staging.write("a", b"alpha")
        staging.write("deep/er/b", b"x" * 3_000_000)
        staging.publish(out, staging.records, {"kind": "test"})
    return out


def test_published_folder_verifies(tmp_path: Path) -> None:
    out = _publish(tmp_path / "out")
    manifest = verify_manifest(out)
    assert manifest is not None and manifest["kind"] == "test"
    assert [(record.name, record.size) for record in manifest["files"]] == [
        ("a", 5),
        ("deep/er/b", 3_000_000),
    ]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a", b"alphA", "content is not"),
        ("a", b"alph", "4 bytes"),
        ("deep/er/b", None, "missing"),
        ("manifest.json", b"{}", "readable manifest"),
        ("manifest.json", b'{"format": 3, "files": []}', "got format 3, expected 2"),
        (
            "manifest.json",
            b'{"format": 2, "files": [{"name": "a", "size": "5", "xxh3_128": ""}]}',
            "readable manifest",
        ),
        (
            "manifest.json",
            b'{"format": 2, "files": [{"name": "a", "size": 5, "sha256": ""}]}',
            "readable manifest",
        ),
        (
            "manifest.json",
            b'{"format": 1, "files": [{"name": "../a", "size": 1, "sha256": ""}]}',
            "../a",
        ),
    ],
)
def test_changed_files_are_named(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    out = _publish(tmp_path / "out")
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content)
    with pytest.raises(FileError) as caught:
        verify_manifest(out)
    assert name in str(caught.value) and words in str(caught.value)


def test_every_byte_is_in_the_hash(tmp_path: Path) -> None:
    """Pieces small and large, in any order, are written and hashed as they came."""
    sizes = [1, 2**20 - 1, 1, 2**20, 3 * 2**20 + 7, 5, 700_000, 700_000, 0, 2**21]
    pieces = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    with staging_folder(tmp_path / "out") as staging:
        with staging.create("a") as file:
            assert [file.write(piece) for piece in pieces] == sizes
        staging.publish(tmp_path / "out", staging.records, {})
    content = (tmp_path / "out" / "a").read_bytes()
    assert content == b"".join(pieces)
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    digest = xxhash.xxh3_128_hexdigest(content)
    assert written == {
        "format": 2,
        "files": [{"name": "a", "size": len(content), "xxh3_128": digest}],
    }


def test_folders_with_sha256_are_still_verified(tmp_path: Path) -> None:
    """The fixture was published when manifests had format 1."""
    out = tmp_path / "out"
    shutil.copytree(FORMAT_1, out)
    manifest = verify_manifest(out)
    assert manifest is not None and (manifest["format"], manifest["step"]) == (1, 7)
    assert {record.hash_name for record in manifest["files"]} == {"sha256"}
    content = bytearray((out / "deep/er/b").read_bytes())
    content[500] ^= 1
    (out / "deep/er/b").write_bytes(content)
    with pytest.raises(FileError, match="deep/er/b: content is not"):
        verify_manifest(out)


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        staging_folder(tmp_path / "out") as staging,
        staging.create("a") as file,
    ):
        file.write(b"half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = tmp_path / "out.tmp-0123456789ab"
    dead.mkdir()
    (dead / "a").write_text("")
    other = tmp_path / "output.tmp-0123456789ab"
    other.mkdir()
    with staging_folder(tmp_path / "out") as living, staging_folder(tmp_path / "out"):
        assert not dead.exists() and other.exists() and living.path.exists()


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileError, match="appeared meanwhile"), staging_folder(out) as staging:
        out.mkdir()
        staging.publish(out, [], {})
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == []
