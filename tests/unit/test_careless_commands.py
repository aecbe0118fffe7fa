"""Careless uses of `vopd report` and `vopd check` around a run: one line each, nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.cli import main
from tests.support.check_cases import make_workplace, run_check

MISTAKE = 2


def run_folder(root: Path) -> Path:
    folder = root / "run"
    folder.mkdir()
    lines = [{"step": step, "kl/reverse": 1.0 / (step + 1)} for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _metrics(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "metrics.jsonl").write_text(text)


def _folder(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


REPORTS: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "no such folder": (lambda _: None, "nowhere", ("nowhere/metrics.jsonl", "folder of a run")),
    "a file": (lambda folder: (folder / "x").write_text(""), "run/x", ("folder of a run",)),
    "no metrics": (
        lambda folder: (folder / "metrics.jsonl").unlink(), "run", ("folder of a run",)
    ),
    "nothing recorded": (_metrics(""), "run", ("no recorded step",)),
    "a word": (_metrics('word\n{"step": 1}\n'), "run", ("metrics.jsonl:1", "remove the line")),
    "no step": (_metrics('{"a": 1}\n{"step": 1}\n'), "run", ("metrics.jsonl:1", "step")),
    "a step twice": (
        _metrics('{"step": 1}\n{"step": 1}\n'), "run", ("metrics.jsonl:2", "ascending")
    ),
    "metrics: a folder": (_folder("metrics.jsonl"), "run", ("metrics.jsonl", "directory")),
    "report: a folder": (_folder("report.html"), "run", ("report.html", "directory")),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_report(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, given, says = REPORTS[name]
    edit(run_folder(tmp_path))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.jsonl") if p.is_file()}
    assert main(["report", str(tmp_path / given)]) == MISTAKE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(text in lines[0] for text in says), lines
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.jsonl") if p.is_file()} == before


def test_report_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path)
    _metrics('{"step": 0, "eval/x/avg@8": 0.5}\n')(folder)
    assert main(["report", str(folder)]) == 0
    said = "no step yet, but an evaluation before the first"
    assert capsys.readouterr().out == f"{folder}/report.html: {said}\n"
    page = (folder / "report.html").read_text()
    assert said in page and "eval/x/avg@8" in page


EVALUATIONS = {
    "no answer": ('{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n', "t.jsonl:2 answer"),
    "no prompt": ('{"question": "a", "answer": 1}\n', "t.jsonl:1 prompt"),
    "blank answer": ('{"prompt": "a", "answer": " "}\n', "t.jsonl:1 answer"),
    "nothing": ("", "data.evaluation.t"),
    "torn": ('{"prompt": "a", "answer": 1}\n{"prompt": "b", "ans\n', "t.jsonl:2"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_check_reads_the_evaluation(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = partial(run_check, capsys)
    make_workplace(tmp_path, monkeypatch)
    text, key = EVALUATIONS[name]
    (tmp_path / "t.jsonl").write_text(text)
    settings = ["data.evaluation=./t.jsonl", "evaluation.max_tokens=64"]
    status, _, lines = check(*settings)
    assert status == MISTAKE and len(lines) == 2 and lines[0].startswith(key), lines
    assert check(*settings, "evaluation.interval=0")[0] == 0
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "answer": 1}\n')
    assert check(*settings)[0] == 0
