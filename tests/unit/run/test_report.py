"""report.html: what the curves show, one self-contained page, one line for what is wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_vopd.cli import main
from megatron_vopd.run.report import curves, number, thinned, ticks

HOSTILE = "eval/<script>alert(1)</script>&\"'/avg@8"


def run_folder(tmp_path: Path, lines: list[dict[str, float | None]] | None = None) -> Path:
    folder = tmp_path / "run <b>"
    folder.mkdir()
    if lines is None:
        lines = [
            {
                "step": step,
                "kl/reverse": 2.0 / step,
                "kl/forward": None if step == 3 else 1.0,
                "entropy/student": 1.0,
                "variance/advantage_over_reward": 0.25,
                "rollout/length_mean": 100.0 * step,
                "optim/grad_norm": 0.5,
                "time/total_seconds": 3.25,
                "own/number": -1.0,
                **({HOSTILE: 0.5} if step == 4 else {}),
            }
            for step in range(1, 6)
        ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text("run: {name: '</pre><script>alert(2)</script>'}\n")
    return folder


def test_one_page_with_every_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html: 5 recorded steps, 1 to 5\n"
    page = (folder / "report.html").read_text()
    root = ElementTree.fromstring(page.split("\n", 1)[1])
    captions = ["".join(caption.itertext()) for caption in root.iter("figcaption")]
    for title in ("Accuracy", "KL", "Entropy", "Variance", "Response length", "Gradient", "Time"):
        assert any(title in caption for caption in captions), title
    assert any("own/number" in caption for caption in captions), "unknown metrics are shown too"
    lines = {figure[0].text: figure[1].findall("polyline") for figure in root.iter("figure")}
    kl = lines["KL to the teacher "]
    assert [len(str(line.get("points")).split()) for line in kl] == [4, 5], "nulls are left out"
    legends = ["".join(item.itertext()) for item in root.iter("li")]
    assert "kl/reverse 0.4" in legends and f"{HOSTILE} 0.5" in legends
    assert {element.tag for element in root.iter()} & {"script", "img", "link", "iframe"} == set()
    assert not re.search(r"https?:|url\(|@import|src=", page), "nothing comes from elsewhere"
    assert "5 recorded steps, 1 to 5" in "".join(root.itertext())
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ]


def test_the_curve_is_where_its_values_are(tmp_path: Path) -> None:
    lines = [{"step": 0, "kl/reverse": 0.0}, {"step": 5, "kl/reverse": 1.0}]
    folder = run_folder(tmp_path, [*lines, {"step": 10, "kl/reverse": 0.25}])
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    points = re.findall(r'points="([^"]+)"', page)[0].split()
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in points)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert (y0 - y2) / (y0 - y1) == pytest.approx(0.25, abs=0.01) and y1 < y2 < y0, "up is more"


def test_one_step_and_constant_values(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [{"step": 7, "kl/reverse": 0.0, "optim/lr": 1e-6}])
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert len(re.findall(r'<circle class="alone"', page)) == 2
    assert not re.search(r'="[^"]*(nan|inf)', page)


def test_a_torn_line_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    before = path.read_bytes()
    assert main(["report", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "4 recorded steps" in captured.out
    assert captured.err.count("\n") == 1 and "torn" in captured.err
    assert "torn" in (folder / "report.html").read_text()
    assert path.read_bytes() == before, "the run may still be writing"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "no recorded step"),
        (b'{"step": 1', "no recorded step"),
        (b'x\n{"step": 1}\n', "metrics.jsonl:1"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "report.html").exists()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["report"], ["report", "a", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "one RUN_DIR" in capsys.readouterr().err


def test_thinning_keeps_extremes_and_order() -> None:
    points = [(float(x), math.sin(x) + (50 if x == 777 else 0)) for x in range(10_000)]
    kept = thinned(points, 400)
    assert len(kept) <= 400 and kept == sorted(kept) and (777.0, math.sin(777) + 50) in kept
    assert min(kept, key=lambda p: p[1]) == min(points, key=lambda p: p[1])
    assert thinned(points[:400], 400) == points[:400]


SPANS = [(0, 1), (0.12, 0.13), (-3, 5e6), (2, 2), (0, 0), (1e-9, 3e-9), (-1, -0.5)]
SPANS += [(0, 5e-324), (1, 1 + 2e-16), (1e-320, 1e-320), (-1e299, 1e299), (1e299, 1e299)]


@pytest.mark.parametrize(("low", "high"), SPANS)
def test_ticks_cover_the_values_in_round_steps(low: float, high: float) -> None:
    marks = ticks(low, high)
    slack = 1e-12 * max(abs(low), abs(high))
    assert marks[0] <= low + slack and marks[-1] >= high - slack and 2 <= len(marks) <= 8
    assert len(set(marks)) == len(marks)
    step = (marks[-1] - marks[0]) / (len(marks) - 1)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - round_one) for round_one in (1, 2, 2.5, 5, 10)) < 1e-6


def test_any_values_make_a_page(tmp_path: Path) -> None:
    values = [0, 5e-324, -1e308, 1e308, 10**400, 1e-12, 1.0, True, None, "x", [1], {"a": 1}]
    lines: list[Any] = [{"step": i, "a/b": v, "\ud800/x": v} for i, v in enumerate(values)]
    folder = run_folder(tmp_path, lines)
    assert main(["report", str(folder)]) == 0
    ElementTree.fromstring((folder / "report.html").read_text().split("\n", 1)[1])


def test_numbers() -> None:
    assert [number(x) for x in (0.123456, 12345.6, 5, 1e-6, 3e12)] == [
        "0.1235",
        "12,346",
        "5",
        "1e-06",
        "3e+12",
    ]


def test_values_that_are_no_numbers_are_no_points() -> None:
    lines = [{"step": 1, "a/b": True}, {"step": 2, "a/b": "x"}, {"step": 3, "a/b": 2}]
    assert [(curve.name, curve.points) for curve in curves(lines)] == [("a/b", ((3, 2),))]
    assert curves([{"step": 1, "a/b": None}]) == []
