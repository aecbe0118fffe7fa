"""H4, H7, X1-X3: bad inputs, bad destinations and hostile folders end in one line, nothing else.

Every case runs the real tool on a copy of a good folder that was damaged in one way. Demanded: exit
status 2, one line on standard error that holds the given words, no output, no temporary folder, and
no trace of foreign code having run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.damaged_folders import (
    CHECKPOINT_CASES,
    HF_CASES,
    MARKER,
    evil_common,
    evil_raw_common,
    object_entry,
    unsigned,
)
from tests.support.harness import spawn
from tests.support.tiny_models import TinyModel, add_tokenizer
from tests.support.tools import Ran, run


def _run_cases(kind: str, good: Path, root: Path) -> dict[str, tuple[Ran, list[str]]]:
    """On a rank: run the tool on every damaged copy; return its words, and what lies beside it."""
    cases = HF_CASES if kind == "hf" else CHECKPOINT_CASES
    tool = "convert_hf_to_megatron" if kind == "hf" else "convert_megatron_to_hf"
    results = {}
    for number, (name, (damage, _)) in enumerate(cases.items()):
        place = root / f"{kind}{number}"
        shutil.copytree(good, place / "in")
        damage(place / "in")
        before = sorted(path.name for path in place.iterdir())
        ran = run(tool, place / "in", place / "out")
        after = sorted(path.name for path in place.rglob("*") if path.name == MARKER)
        after += sorted({path.name for path in place.iterdir()} - set(before))
        results[name] = (ran, after)
    return results


def _good_checkpoint(good: Path, root: Path) -> None:
    assert run("convert_hf_to_megatron", good, root / "good_megatron").status == 0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("faults")
    good = add_tokenizer(TinyModel("qwen3").save(root))
    spawn(_good_checkpoint, 1, good, root)
    return {
        "hf": spawn(_run_cases, 1, "hf", good, root)[0],
        "checkpoint": spawn(_run_cases, 1, "checkpoint", root / "good_megatron", root)[0],
    }


@pytest.mark.parametrize(
    ("kind", "case"),
    [("hf", name) for name in HF_CASES] + [("checkpoint", name) for name in CHECKPOINT_CASES],
)
def test_refused_in_one_line(kind: str, case: str, results: dict[str, dict]) -> None:
    ran, new = results[kind][case]
    words = (HF_CASES if kind == "hf" else CHECKPOINT_CASES)[case][1]
    assert ran.status == 2, ran
    assert new == [], "an output, a temporary folder, or the trace of foreign code"
    assert ran.err.count("\n") == 1 and ran.err.endswith("\n"), ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err, ran.err


def _hub_cache(good: Path, root: Path) -> Ran:
    """Make a hub cache as it lies on disk: snapshots of links to blobs."""
    cache = root / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in good.iterdir():
        shutil.copy(path, cache / "blobs" / f"hash-{path.name}")
        os.symlink(f"../../blobs/hash-{path.name}", snapshot / path.name)
    return run("convert_hf_to_megatron", snapshot, root / "out", "--verify")


def test_links_inside_a_hub_cache_are_followed(tmp_path: Path) -> None:
    good = add_tokenizer(TinyModel("qwen3").save(tmp_path))
    ran = spawn(_hub_cache, 1, good, tmp_path)[0]
    assert ran.status == 0, ran.err
    assert (tmp_path / "out/hf/tokenizer.json").read_bytes() == (
        good / "tokenizer.json"
    ).read_bytes()


def _weights_only(good: Path, root: Path) -> list[Ran]:
    """Set hostile objects of a checkpoint aside on request: not read, so not run."""
    runs = []
    for number, damage in enumerate((object_entry, evil_common, evil_raw_common)):
        shutil.copytree(good, root / f"w{number}")
        unsigned(damage)(root / f"w{number}")
        out = root / f"w{number}.out"
        runs.append(run("convert_megatron_to_hf", root / f"w{number}", out, "--weights-only"))
    return runs


def test_pickled_objects_can_be_left_unread(tmp_path: Path) -> None:
    good = TinyModel("qwen3").save(tmp_path)
    spawn(_good_checkpoint, 1, good, tmp_path)
    for ran in spawn(_weights_only, 1, tmp_path / "good_megatron", tmp_path)[0]:
        assert ran.status == 0, ran.err
    assert not list(tmp_path.rglob(MARKER))


def _mounted(root: Path, name: str, options: str) -> Path | None:
    """Mount a small file system, where this user may."""
    path = root / name
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    return path if mounted else None


def _destinations(good: Path, root: Path) -> dict[str, tuple[Ran, bool] | None]:
    """On a rank: return what was said of each destination, and whether its parent changed."""
    (root / "exists").mkdir()
    (root / "file").write_text("")
    os.symlink("nowhere", root / "dangling")
    os.symlink(good, root / "alias")
    targets: dict[str, Path | None] = {
        "exists": root / "exists",
        "is a file": root / "file",
        "is a dangling link": root / "dangling",
        "equals source": good,
        "equals source by a link": root / "alias",
        "inside source": good / "inside",
        "parent missing": root / "no" / "out",
    }
    mounts = {"read-only": "ro,size=16m", "full": "size=1m"}
    for name, options in mounts.items():
        mount = _mounted(root, name, options)
        targets[name] = mount / "out" if mount else None
    results: dict[str, tuple[Ran, bool] | None] = {}
    for name, out in targets.items():
        if out is None:
            results[name] = None
            continue
        parent = out.parent if out.parent.exists() else root
        before = (parent.stat().st_mtime_ns, sorted(os.listdir(parent)))
        ran = run("convert_hf_to_megatron", good, out)
        results[name] = (ran, before != (parent.stat().st_mtime_ns, sorted(os.listdir(parent))))
    for name in mounts:
        if targets[name] is not None:
            subprocess.run(["umount", str(root / name)], check=True)
    return results


DESTINATIONS = {
    "exists": "exists already",
    "is a file": "exists already",
    "is a dangling link": "exists already",
    "equals source": "is the source",
    "equals source by a link": "is the source",
    "inside source": "inside the source",
    "parent missing": "no such folder",
    "read-only": "cannot be written",
    "full": "bytes free",
}


@pytest.fixture(scope="module")
def destinations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("destinations")
    good = TinyModel("qwen3").save(root)
    return spawn(_destinations, 1, good, root)[0]


@pytest.mark.parametrize("case", DESTINATIONS)
def test_destination_is_refused_before_the_first_write(
    case: str, destinations: dict[str, Any]
) -> None:
    if destinations[case] is None:
        pytest.skip("mounting a file system is not allowed here")
    ran, changed = destinations[case]
    assert ran.status == 2
    assert DESTINATIONS[case] in ran.err and ran.err.count("\n") == 1
    assert not changed


@pytest.mark.parametrize("status", ["read-only", "full"])
def test_file_systems_that_cannot_take_it(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusals are the same where mounting is not allowed and `statvfs` is replaced."""
    from megatron_vopd.files.atomic_file import FileError
    from megatron_vopd.files.atomic_folder import check_destination

    flags = os.ST_RDONLY if status == "read-only" else 0
    blocks = 10**9 if status == "read-only" else 3
    answer = SimpleNamespace(f_flag=flags, f_bavail=blocks, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: answer)
    with pytest.raises(FileError, match=DESTINATIONS[status]):
        check_destination(tmp_path / "out", tmp_path / "source", 2**20)
