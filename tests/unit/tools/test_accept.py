"""The acceptance run of a GPU machine: its steps, their limits, its table, and failures.

`test_every_step_that_needs_no_gpu_passes` runs the real scripts on the CPU; the other tests put a
stand-in in Python's place, since they are about the script that calls them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.gpu.check_trainer import compare
from tests.support import ROOT

ACCEPT = ROOT / "tests/gpu/accept.sh"


def accept(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}
    command = [str(ACCEPT), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=850, check=False
    )


def listed() -> dict[str, tuple[int, str]]:
    """Return step -> its limit in seconds, and where it runs."""
    lines = [line.split("|") for line in accept("--list").stdout.splitlines()]
    return {name.strip(): (int(limit), where.strip()) for name, limit, where, _ in lines}


def results(folder: Path) -> dict[str, str]:
    """Return step -> its verdict, from the table."""
    lines = (folder / "table.txt").read_text().splitlines()[1:-1]
    return {line[:13].strip(): line[14:23].strip() for line in lines}


def stand_in(folder: Path, body: str) -> str:
    """Write a program that is called like Python."""
    path = folder / "python"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_all_steps_together_fit_into_ten_minutes() -> None:
    steps = listed()
    assert sum(limit for limit, _ in steps.values()) <= 590
    assert {where for _, where in steps.values()} == {"gpu", "both"}


@pytest.mark.timeout(900)
def test_every_step_that_needs_no_gpu_passes(tmp_path: Path) -> None:
    run = accept("--dry", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    verdicts = {"both": "passed", "gpu": "not run"}
    assert results(tmp_path) == {name: verdicts[where] for name, (_, where) in listed().items()}
    with tarfile.open(tmp_path / "steps.tar.gz") as archive:
        names = {Path(name).stem for name in archive.getnames()}
    assert names >= {name for name, (_, where) in listed().items() if where == "both"}
    assert not (tmp_path / "models").exists()


def test_a_failed_step_stops_nothing_but_success(tmp_path: Path) -> None:
    body = 'case "$*" in *check_kernels*) echo "row 7 is wrong"; exit 1 ;; esac'
    run = accept("--dry", str(tmp_path), python=stand_in(tmp_path, body))
    assert run.returncode == 1
    verdicts = results(tmp_path)
    assert [name for name, verdict in verdicts.items() if verdict == "failed"] == ["kernels"]
    assert verdicts["trace"] == "passed"
    assert "row 7 is wrong" in run.stdout
    assert (tmp_path / "steps/kernels.txt").read_text() == "row 7 is wrong\n"
    assert re.search(r"^1 failed, ", run.stdout, re.M)


def test_without_a_gpu_it_says_what_would_run(tmp_path: Path) -> None:
    run = accept(str(tmp_path), python=stand_in(tmp_path, "exit 1"))
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "--dry" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dri"], "--dri"),
        (["--dry", "--only", "kernels,kernel", "FOLDER"], "got 'kernel', expected some of device,"),
        (["--dry", "FOLDER", "--only"], "--only: got nothing"),
        (["--dry", "FOLDER", "another"], "another, expected one"),
        (["--dry", "FOLDER/file/below"], "expected one to write into"),
    ],
    ids=["option", "step", "no step", "two folders", "no folder"],
)
def test_a_mistake_is_refused(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "file").touch()
    run = accept(*(argument.replace("FOLDER", str(tmp_path)) for argument in arguments))
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stdout + run.stderr
    assert says in run.stderr and not (tmp_path / "table.txt").exists()


def test_a_python_or_wheels_that_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = accept("--dry", str(tmp_path), python="/nowhere/python")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "PYTHON: got /nowhere/python" in run.stderr
    monkeypatch.setenv("CARRY", "/nowhere")
    run = accept("--dry", str(tmp_path))
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "CARRY: got /nowhere" in run.stderr and not (tmp_path / "steps").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a", "b", "c"]], ids=" ".join)
def test_carry_says_how_it_is_called(arguments: list[str]) -> None:
    command = [str(ROOT / "tests/gpu/carry.sh"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "usage: carry.sh FOLDER [PYTHON_VERSION]\n"


@pytest.mark.parametrize(
    ("name", "what", "by", "is_refused"),
    [
        ("fp32", "weight head", 1e-4, True),
        ("fp32", "weight head", 1e-7, False),
        ("fp32", "gradient head", 1e-3, True),
        ("bf16-full", "gradient head", 1e-3, False),
        ("bf16-full", "gradient head", 0.2, True),
        ("bf16", "weight head", float("nan"), True),
        ("fp32", "loss/mean", 1e-4, True),
        ("bf16", "optim/grad_norm", 1e-3, False),
    ],
)
def test_the_comparison_of_two_devices(
    tmp_path: Path, name: str, what: str, by: float, is_refused: bool
) -> None:
    base = name.partition("-")[0]
    for folder, case, change in (("cpu", base, 0.0), ("cuda", name, by)):
        (tmp_path / folder).mkdir()
        tensors = {f"{kind} head": torch.ones(4) for kind in ("gradient", "weight")}
        numbers = {"loss/mean": 0.5, "optim/grad_norm": 1.0}
        if what in numbers:
            numbers[what] *= 1 + change
        else:
            tensors[what] += change
        save_file(tensors, tmp_path / folder / f"{case}.safetensors")
        (tmp_path / folder / f"{case}.json").write_text(json.dumps([numbers]))
    assert bool(list(compare(tmp_path / "cpu", tmp_path / "cuda"))) == is_refused
