"""metrics.jsonl: every completed step once and no torn line, wherever the writer stopped (T8)."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.metrics_file import MetricsFile, read_metrics


def steps_of(path: Path) -> list[int]:
    recorded = read_metrics(path)
    assert not recorded.is_torn
    return [line["step"] for line in recorded.lines]


def recorded_run(path: Path, steps: range, last_step: int = 0) -> None:
    file = MetricsFile(path, last_step)
    for step in steps:
        file.append(step, {"loss/mean": step / 3, "eval/x/avg@8": 0.5})
    file.close()


def test_values_survive_and_json_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append(1, {"a/x": 1 / 3, "a/n": 7, "a/nan": math.nan, "a/inf": -math.inf})
    file.close()
    file.close()
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text and text.endswith("\n")
    line = {"step": 1, "a/x": 1 / 3, "a/n": 7, "a/nan": None, "a/inf": None}
    assert json.loads(text) == line and read_metrics(path).lines == [line]


def test_a_line_cut_at_every_byte_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    recorded_run(path, range(1, 4))
    whole = path.read_bytes()
    first = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for size in range(first, len(whole) + 1):
        path.write_bytes(whole[:size])
        assert read_metrics(path).is_torn == (size not in (first, len(whole))), size
        done = 3 if size == len(whole) else 2
        recorded_run(path, range(done + 1, 5), last_step=done)
        assert steps_of(path) == [1, 2, 3, 4], size
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("last_step", range(6))
def test_a_resumed_run_records_repeated_steps_once(last_step: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    recorded_run(path, range(6))  # an evaluation before training is step 0
    file = MetricsFile(path, last_step)
    assert file.num_dropped == 5 - last_step
    file.append(last_step + 1, {"again/yes": 1})
    file.close()
    assert steps_of(path) == [*range(last_step + 2)]
    assert read_metrics(path).lines[-1] == {"step": last_step + 1, "again/yes": 1}


WRITER = """
import sys
from pathlib import Path
from megatron_vopd.files.metrics_file import MetricsFile
file = MetricsFile(Path(sys.argv[1]), int(sys.argv[2]))
print("open", flush=True)
step = int(sys.argv[2])
while True:
    step += 1
    file.append(step, {f"metric/{i}": i / 7 for i in range(200)})
    print(step, flush=True)
"""


def test_kill_9_loses_no_completed_step(tmp_path: Path) -> None:
    path, last = tmp_path / "metrics.jsonl", 0
    for pause in (0.02, 0.05, 0.0):
        command = [sys.executable, "-c", WRITER, str(path), str(last)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "open\n"
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        acknowledged = writer.stdout.read().splitlines()
        writer.wait()
        writer.stdout.close()
        last = int(acknowledged[-1]) if acknowledged else last
        MetricsFile(path, last).close()
        assert steps_of(path) == list(range(1, last + 1))
    assert last > 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"step": 1}\nnot json\n{"step": 3}\n', ["metrics.jsonl:2", "not json"]),
        (b'{"step": 1}\n{"no": 2}\n{"step": 3}\n', ["metrics.jsonl:2", "with a step"]),
        (b'{"step": 1}\n[2]\n{"step": 3}\n', ["metrics.jsonl:2"]),
        (b'{"step": 1}\n{"step": "2"}\n{"step": 3}\n', ["metrics.jsonl:2"]),
        (b'{"step": 1}\n{"step": 1' + b"0" * 30 + b'}\n{"step": 3}\n', ["metrics.jsonl:2"]),
        (b'{"step": 2}\n{"step": 2}\n', ["metrics.jsonl:2", "step 2 after step 2"]),
        (b"[" * 100_000 + b'\n{"step": 2}\n', ["metrics.jsonl:1"]),
        (b'\xff\xfe\n{"step": 2}\n', ["metrics.jsonl:1"]),
    ],
)
def test_damage_in_the_middle_is_named(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    for action in (read_metrics, MetricsFile):
        with pytest.raises(FileError) as caught:
            action(path)
        message = str(caught.value)
        assert all(word in message for word in words) and "\n" not in message
    assert path.read_bytes() == content


def test_a_step_is_recorded_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(2, {})
    for step in (2, 1):
        with pytest.raises(ValueError, match="expected more than 2"):
            file.append(step, {})
    file.close()


@pytest.mark.parametrize("room", [0, 5])
def test_a_full_disk_is_said_and_repaired(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append(1, {"a/x": 1.0})
    write, left = os.write, [room, 0]

    def full(descriptor: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: left.pop(0)])

    with monkeypatch.context() as patch, pytest.raises(FileError, match="space on the disk"):
        patch.setattr(os, "write", full)
        file.append(2, {"a/x": 2.0})
    file.close()
    recorded_run(path, range(2, 4), last_step=1)
    assert steps_of(path) == [1, 2, 3]


@pytest.mark.parametrize("operation", ["open", "fsync", "ftruncate"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_repair_that_fails_leaves_the_old_file_or_the_new_one(
    operation: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    recorded_run(path, range(1, 6))
    before = path.read_bytes()
    original, calls = getattr(os, operation), iter(range(100))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == count:
            raise OSError(5, "Input/output error")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing)
        try:
            MetricsFile(path, 3).close()
        except FileError as error:
            assert str(error).startswith(str(tmp_path)) and ": Input/output error; " in str(error)
    assert path.read_bytes() in (before, b"".join(before.splitlines(keepends=True)[:3]))
    recorded_run(path, range(4, 6), last_step=3)
    assert path.read_bytes() == before


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none/metrics\.jsonl: No such file"):
        read_metrics(tmp_path / "none" / "metrics.jsonl")
    with pytest.raises(FileError, match="No such file"):
        MetricsFile(tmp_path / "none" / "metrics.jsonl")


def test_an_evaluation_joins_the_line_of_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, -1)
    file.amend(0, {"eval/x/avg@8": 0.25})
    file.append(1, {"a/x": 1 / 3, "a/nan": math.nan, "a/n": 7})
    file.amend(1, {"eval/x/avg@8": 0.5})
    file.append(2, {"a/x": 2.0})
    file.close()
    first = {"step": 1, "a/x": 1 / 3, "a/nan": None, "a/n": 7, "eval/x/avg@8": 0.5}
    expected = [{"step": 0, "eval/x/avg@8": 0.25}, first, {"step": 2, "a/x": 2.0}]
    assert read_metrics(path).lines == expected
    # A resumed run makes the evaluation that a stop had cut short; a line that is gone is made.
    file = MetricsFile(path, 2)
    file.amend(2, {"eval/x/avg@8": 0.75})
    file.close()
    assert read_metrics(path).lines == [*expected[:2], {**expected[2], "eval/x/avg@8": 0.75}]
    path.unlink()
    file = MetricsFile(path, 2)
    file.amend(2, {"eval/x/avg@8": 0.75})
    with pytest.raises(ValueError, match="expected more than 2"):
        file.amend(1, {})
    file.close()
    assert read_metrics(path).lines == [{"step": 2, "eval/x/avg@8": 0.75}]
    # A new run forgets the evaluation of one that made no step.
    MetricsFile(path, -1).close()
    assert read_metrics(path).lines == [] and os.listdir(tmp_path) == ["metrics.jsonl"]
