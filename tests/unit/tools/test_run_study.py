"""The study tool: its figures, what it runs and does not run again, mistakes in study files."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.tools import load_tool, run

study_tool = load_tool("run_study")

STUDY = """\
title: A study
about: What is compared.
config: config.yaml
overrides: [train.steps=2]
seeds: [0, 1]
variants:
  one: [objective.baseline=none]
  two: [objective.baseline=full]
measures:
  "right, %": {metric: eval/x/avg@1, scale: 100, digits: 1}
  seconds: {metric: time/total_seconds, take: sum}
"""


def save_study(tmp_path: Path, text: str = STUDY) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def save_run(out: Path, name: str, accuracy: float, reason: str = "done") -> None:
    folder = out / name
    folder.mkdir(parents=True)
    lines = [
        {"step": 0, "eval/x/avg@1": 0.25},
        {"step": 1, "time/total_seconds": 1.5},
        {"step": 2, "time/total_seconds": 2.0, "eval/x/avg@1": accuracy},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"reason": reason, "step": 2}))


@pytest.mark.parametrize("degrees", range(1, 10))
def test_interval_points_are_students_t(degrees: int) -> None:
    """The point that the tool uses holds 95 % of the density between its two signs."""
    values = [1.0] + [0.0] * degrees
    mean, half = study_tool.mean_and_interval(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / degrees)
    point = half / (deviation / math.sqrt(degrees + 1))
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(log_scale) / math.sqrt(degrees * math.pi)
    num = 20_000
    width = 2 * point / num
    middles = (-point + (i + 0.5) * width for i in range(num))
    mass = sum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in middles) * width
    assert mass == pytest.approx(0.95, abs=5e-5)


def test_summary_of_runs_that_are_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, accuracy in (("one-seed0", 0.5), ("one-seed1", 0.7), ("two-seed0", 0.9)):
        save_run(out, name, accuracy)
    save_run(out, "two-seed1", 0.1, reason="preempted")
    done = run("run_study", save_study(tmp_path), out, "--summary-only")
    assert done.status == 0, done.err
    text = (out / "summary.md").read_text()
    assert text == done.out
    half = 12.706 * math.sqrt(0.02 / 2) * 100
    assert f"| one | 2 | 60.0 \u00b1 {half:.1f} | 3.50 \u00b1 0.00 |" in text
    assert "| two | 1 | 90.0 | 3.50 |" in text, "one run has no interval; the other is not done"
    assert (out / "curves.png").stat().st_size > 1000
    assert json.loads((out / "summary.json").read_text())["one"]["right, %"] == [50.0, 70.0]


def test_runs_what_is_missing_and_says_what_failed(tmp_path: Path) -> None:
    """The real command fails on a configuration that is not there: three runs fail, one is left."""
    out = tmp_path / "out"
    save_run(out, "one-seed0", 0.5)
    done = run("run_study", save_study(tmp_path), out, "--seeds", 0)
    assert done.status == 1
    assert "A study: 2 runs, 1 done already" in done.out
    assert done.err.strip() == f"two-seed0: failed; see {out / 'two-seed0'}.log"
    log = (out / "two-seed0.log").read_text()
    assert "config.yaml" in log and not (out / "one-seed0.log").exists()


# Over a launcher whose runs take for ever, and note that they began and that they could save.
INTERRUPTED = """
import sys
from megatron_vopd.run import launch
from tests.support.tools import load_tool

run = '''
import pathlib, signal, sys, time
name = sys.argv[-1].removeprefix("run.name=")
def save(*_):
    pathlib.Path(name + ".saved").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
pathlib.Path(name + ".began").touch()
time.sleep(60)
'''
launch.TORCHRUN = (sys.executable, "-c", run)
sys.exit(load_tool("run_study").main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_interrupted_ends_its_runs_and_begins_no_other(
    tmp_path: Path, number: signal.Signals
) -> None:
    # A job in the background ignores SIGINT, one under nohup SIGHUP, and both hand that down.
    before = signal.signal(number, signal.default_int_handler)
    try:
        study = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, save_study(tmp_path), "out", "--jobs", "2"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(number, before)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.began"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    study.send_signal(number)
    out, err = study.communicate(timeout=60)
    assert study.returncode == 130 and err == "interrupted; the same command resumes from here\n"
    assert out == "A study: 4 runs, 0 done already\n", "neither done nor failed"
    for ending in ("began", "saved"):
        names = {path.stem for path in tmp_path.glob(f"*.{ending}")}
        assert names == {"one-seed0", "two-seed0"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STUDY.replace("seeds: [0, 1]", "seeds: []"), "seeds"),
        (STUDY.replace("title", "titel"), "title"),
        (STUDY.replace("take: sum", "take: most"), "measures.seconds.take"),
        (STUDY + "  broken: [", "valid YAML"),
        ("- not a mapping\n", "study.yaml"),
    ],
)
def test_mistake_in_a_study_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    done = run("run_study", save_study(tmp_path, text), tmp_path / "out")
    assert done.status == 2
    assert done.err.count("\n") == 1 and expected in done.err
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"title: \xff\n")
    done = run("run_study", path, tmp_path / "out")
    assert done.status == 2 and done.err.count("\n") == 1
    assert str(path) in done.err and "UTF-8" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--summary-only",)])
def test_an_output_that_is_no_folder_is_one_line(tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    out.write_text("kept")
    done = run("run_study", save_study(tmp_path), out, *options)
    assert done.status == 2 and done.err.count("\n") == 1, done.err
    assert f"{out}: File exists, expected a folder to write into" in done.err
    assert out.read_text() == "kept"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--jobs", 0, "an integer >= 1"), ("--seeds", -1, "an integer 0 to 4294967295")],
)
def test_a_number_out_of_range(tmp_path: Path, option: str, value: int, expected: str) -> None:
    done = run("run_study", save_study(tmp_path), tmp_path / "out", f"{option}={value}")
    assert done.status == 2 and not (tmp_path / "out").exists()
    assert done.err.endswith(f"argument {option}: got '{value}', expected {expected}\n")


def test_braces_of_an_override_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping in YAML's notation is an override like another; only {seed} is filled in."""
    mapping = "objective.prefix={student: 0.5, dataset: 0.5}"
    text = STUDY.replace("[train.steps=2]", f"['{mapping}', 'run.name=s{{seed}}']")
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(study_tool, "_train", lambda launch, *_: given.append(launch.overrides))
    run("run_study", save_study(tmp_path, text), tmp_path / "out", "--seeds", 7)
    assert len(given) == 2 and all(mapping in one and "run.name=s7" in one for one in given)


def test_missing_study_is_one_line(tmp_path: Path) -> None:
    done = run("run_study", tmp_path / "none.yaml", tmp_path / "out")
    assert done.status == 2 and "No such file" in done.err
