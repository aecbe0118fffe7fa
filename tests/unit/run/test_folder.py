"""The run folder: what is resumed from, what is refused, what retention removes (C6, C11, C12)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vopd.errors import UserError
from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.atomic_folder import staging_folder
from megatron_vopd.run.folder import (
    KIND,
    checkpoints_dir,
    make_room,
    remove_old,
    saved_steps,
    step_dir,
    write_latest,
)
from megatron_vopd.run.start import Resume, choose
from megatron_vopd.run.status import Status, write_status

FILES = {"common.json": b'{"x": 1}', "__0_0.distcp": bytes(range(256)), ".metadata": b"index"}


def publish(run_dir: Path, step: int, says: int | None = None) -> Path:
    """Publish a folder as `run.checkpoints` does, with other content."""
    folder = step_dir(run_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder) as staging:
        for name, content in FILES.items():
            staging.write(name, content)
        info = {"kind": KIND, "step": step if says is None else says}
        staging.publish(folder, staging.records, info)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (2, 4, 6):
        publish(folder, step)
    write_latest(folder, 6)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1
    path.write_bytes(content)


def test_the_newest_that_verifies(run_dir: Path) -> None:
    assert choose(run_dir, "auto") == Resume(step_dir(run_dir, 6), 6, ())
    assert choose(run_dir / "new", "auto") == Resume(None, 0, ())


CORRUPTIONS = {
    "bit": lambda path: _flip(path, 5),
    "last bit": lambda path: _flip(path, -1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_every_corruption_is_refused_by_name(name: str, kind: str, run_dir: Path) -> None:
    """C6: the newest checkpoint is damaged; the one before it is taken, and the file named.

    A manifest whose last line break is lost still says the same, with hashes that hold.
    """
    path = step_dir(run_dir, 6) / name
    CORRUPTIONS[kind](path)
    if (name, kind) in (("manifest.json", "truncated"), ("manifest.json", "last bit")):
        # The line break at the end: lost, or turned into a letter that JSON does not take.
        assert choose(run_dir, "auto").step == (6 if kind == "truncated" else 4)
        return
    found = choose(run_dir, "auto")
    assert found.step == 4
    assert name in found.remarks[0] and str(step_dir(run_dir, 6)) in found.remarks[0]
    with pytest.raises(FileError, match=name.replace(".", r"\.")):
        choose(run_dir.parent / "other", str(step_dir(run_dir, 6)))


def test_a_renamed_checkpoint_is_not_another_step(run_dir: Path) -> None:
    step_dir(run_dir, 6).rename(step_dir(run_dir, 9))
    found = choose(run_dir, "auto")
    assert found.step == 4 and "says another step" in found.remarks[0]


TRACKERS = {
    "empty": lambda path: path.write_text(""),
    "letters": lambda path: path.write_text("step_six\n"),
    "negative": lambda path: path.write_text("step_-1\n"),
    "huge": lambda path: path.write_text("9" * 5000),
    "of a missing folder": lambda path: path.write_text("step_8\n"),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "missing": lambda path: path.unlink(),
    "older": lambda path: path.write_text("step_2\n"),
}


@pytest.mark.parametrize("kind", TRACKERS)
def test_latest_is_a_hint(kind: str, run_dir: Path) -> None:
    """C11: whatever `latest` says, hashes decide, and a log line says so."""
    path = checkpoints_dir(run_dir) / "latest"
    TRACKERS[kind](path)
    found = choose(run_dir, "auto")
    assert found.step == 6 and len(found.remarks) == 1 and "latest" in found.remarks[0]
    if kind == "folder":
        with pytest.raises(FileError, match="latest: is a folder"):
            write_latest(run_dir, 6)
    else:
        write_latest(run_dir, 6)
        assert choose(run_dir, "auto").remarks == ()


def test_leftovers_go_at_the_start(run_dir: Path) -> None:
    """C11: temporary folders of dead writers, and files beside `latest`."""
    folder = checkpoints_dir(run_dir)
    (folder / "step_8.tmp-0123").mkdir()
    (folder / "step_8.tmp-0123" / "manifest.json").write_text("{}")
    (folder / "latest.tmp-0123").write_text("step_8")
    assert choose(run_dir, "auto") == Resume(step_dir(run_dir, 6), 6, ())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step_2", "step_4", "step_6"]


@pytest.mark.parametrize("resume", ["auto", "elsewhere"])
def test_nothing_valid_is_an_error_and_no_fresh_start(resume: str, run_dir: Path) -> None:
    """C11: steps were made here; neither `auto` nor another run's checkpoint starts over them."""
    other = publish(run_dir.parent / "other", 3)
    for step in saved_steps(run_dir):
        (step_dir(run_dir, step) / "common.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"nothing can be resumed from \(.*step_6/common\.json"):
        choose(run_dir, "auto" if resume == "auto" else str(other))
    assert saved_steps(run_dir) == [6, 4, 2]


def test_steps_without_a_checkpoint_are_not_started_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    assert choose(tmp_path, "auto") == Resume(None, 0, ())  # killed within the first line
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="no checkpoint was saved"):
        choose(tmp_path, "auto")


def test_never_refuses_a_run(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"choose another run\.name"):
        choose(run_dir, "never")
    assert choose(run_dir / "new", "never") == Resume(None, 0, ())


def test_a_given_checkpoint(run_dir: Path) -> None:
    other = run_dir.parent / "other"
    given = step_dir(run_dir, 4)
    assert choose(other, str(given)) == Resume(given, 4, ())
    # Once the new run has its own, those count.
    publish(other, 5)
    write_latest(other, 5)
    found = choose(other, str(given))
    assert found.step == 5 and "checkpoints of its own" in found.remarks[0]
    with pytest.raises(UserError, match="step_6 beside it is newer"):
        choose(run_dir, str(given))
    with pytest.raises(UserError, match="not a folder"):
        choose(other.parent / "third", str(run_dir / "nowhere"))


def test_retention_leaves_the_newest_valid(run_dir: Path) -> None:
    """C12: damaged ones do not count, those that were passed over stay, the best one stays."""
    for step in (8, 10, 12):
        publish(run_dir, step)
    (step_dir(run_dir, 12) / "common.json").unlink()
    (step_dir(run_dir, 8) / "common.json").unlink()
    # A run that resumed from 6 and saved 10 again: 12 is a later, damaged one.
    assert remove_old(run_dir, 10, keep=2, also={2}) == [4]
    assert saved_steps(run_dir) == [12, 10, 8, 6, 2]
    assert choose(run_dir, "auto").step == 10
    assert remove_old(run_dir, 10, keep=9) == []
    assert remove_old(run_dir, 10, keep=2) == [2]
    assert not list(checkpoints_dir(run_dir).glob("*.tmp-*"))


def test_a_step_is_saved_once(run_dir: Path) -> None:
    """C2: what verifies is left alone; what does not is set aside, never written into."""
    assert make_room(run_dir, 6) == (True, [])
    assert make_room(run_dir, 8) == (False, [])
    (step_dir(run_dir, 6) / "common.json").write_bytes(b"{}")
    is_there, remarks = make_room(run_dir, 6)
    assert not is_there and "common.json" in remarks[0]
    aside = list(checkpoints_dir(run_dir).glob("step_6.damaged-*"))
    assert len(aside) == 1 and (aside[0] / "common.json").read_bytes() == b"{}"
    assert saved_steps(run_dir) == [4, 2]


def test_status(tmp_path: Path) -> None:
    write_status(tmp_path, Status("preempted", 7, "step_7", True))
    write_status(tmp_path, Status("done", 9, "step_9", False))
    assert (tmp_path / "status.json").read_text() == (
        '{"reason": "done", "step": 9, "last_checkpoint": "step_9", "requeue": false, '
        '"message": ""}\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
