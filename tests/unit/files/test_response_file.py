"""The file of generated responses over kills and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vopd.files.response_file import ResponseFile
from tests.support.data_cases import refused

PLACES = [(f"p{i // 2}", i % 2) for i in range(6)]
LINES = [{"prompt_id": name, "sample": sample, "text": "x" * 20} for name, sample in PLACES]


def opened(folder: Path, **identity: Any) -> ResponseFile:
    return ResponseFile(folder / "out.jsonl", {"model": "a", "seed": 0} | identity, PLACES)


def whole(folder: Path) -> bytes:
    with opened(folder) as file:
        file.append(LINES[file.num_lines :])
        assert file.is_complete
    return (folder / "out.jsonl").read_bytes()


def test_cut_anywhere_it_is_continued(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    expected = whole(tmp_path / "whole")
    part = tmp_path / "out.jsonl.partial"
    for size in [*range(0, len(expected), 9), len(expected) - 1, len(expected)]:
        with opened(tmp_path) as file:
            file.append(LINES[:1])
        part.write_bytes(expected[:size])
        with opened(tmp_path) as file:
            assert file.num_lines == expected[:size].count(b"\n")
            assert bool(file.repaired) == (size > 0 and expected[size - 1 : size] != b"\n")
            file.append(LINES[file.num_lines :])
        assert (tmp_path / "out.jsonl").read_bytes() == expected and not part.exists()
        (tmp_path / "out.jsonl").unlink()


def test_what_cannot_be_continued_is_refused_by_name(tmp_path: Path) -> None:
    part, out = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl"
    with opened(tmp_path) as file:
        file.append(LINES[:3])
        refused(lambda: opened(tmp_path).__enter__(), "out.jsonl.partial", "in use by another")
    before = part.read_bytes()
    other = opened(tmp_path, model="b", seed=1)
    refused(lambda: other.__enter__(), "model 'b' (before: 'a'), seed 1 (before: 0)")
    swapped = before.splitlines(keepends=True)
    part.write_bytes(swapped[1] + swapped[0])
    refused(lambda: opened(tmp_path).__enter__(), "partial:1: got sample 1 of 'p0', out of order")
    part.write_bytes(b"{}\n" + before)
    refused(lambda: opened(tmp_path).__enter__(), "partial:1: got no record of ours")
    part.write_bytes(before)
    assert whole(tmp_path).startswith(before)
    refused(lambda: opened(tmp_path, seed=1).__enter__(), "out.jsonl: got seed 1 (before: 0)")
    with opened(tmp_path) as file:
        assert file.is_complete and file.num_lines == 6
    (tmp_path / "out.jsonl.info.json").unlink()
    refused(lambda: opened(tmp_path).__enter__(), "without a readable out.jsonl.info.json")
    assert out.exists()
    absent = ResponseFile(tmp_path / "no" / "out.jsonl", {}, PLACES)
    refused(lambda: absent.__enter__(), "no such folder")
