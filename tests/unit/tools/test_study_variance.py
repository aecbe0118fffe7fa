"""The variance study: its figures from gradients whose moments are known, and a tiny study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.support import ROOT
from tests.support.tools import load_tool, run

NAMES = ["none", "full", "topk_reverse 5 (biased)", "exact"]
BATCHES, SIZE = 64, 40
# One process, which is a world of its own, makes a study and then the same one again.
TWICE = """
import sys
from tests.support.tools import run
for _ in range(2):
    made = run("study_variance", *sys.argv[1:])
    print(made.out, made.err)
    assert made.status == 0
"""


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_tool("study_variance")


@pytest.fixture(scope="module")
def gradients() -> np.ndarray:
    """Make [names, batches, size]: exact, and estimates with noise of 2, of 1, and 0.7 of it."""
    draw = np.random.default_rng(0)
    exact = draw.normal(size=SIZE) + 0.3 * draw.normal(size=(BATCHES, SIZE))
    plain = exact + 2 * draw.normal(size=exact.shape)
    return np.stack([plain, exact + draw.normal(size=exact.shape), 0.7 * exact, exact])


def test_figures_are_those_of_the_definition(study: ModuleType, gradients: np.ndarray) -> None:
    flat = gradients.reshape(-1, SIZE)
    found = study.summarise(flat @ flat.T, NAMES, BATCHES, seed=0)

    def trace(values: np.ndarray) -> float:
        return float(np.trace(np.cov(values.T)))

    plain, exact = gradients[0], gradients[-1]
    for name, values in zip(NAMES, gradients, strict=True):
        assert found[name]["variance_ratio"][0] == pytest.approx(trace(values) / trace(plain))
        noise = trace(values - exact) / trace(plain - exact)
        assert found[name]["noise_ratio"][0] == pytest.approx(noise, abs=1e-12)
        along, squares = [], []
        for i in range(BATCHES):
            others = np.delete(exact, i, 0).mean(0)
            along.append((values[i] - exact[i]) @ others)
            squares.append(exact[i] @ others)
        bias = np.mean(along) / np.mean(squares)
        assert found[name]["bias"][0] == pytest.approx(bias, abs=1e-12)


def test_intervals_hold_what_is_true(study: ModuleType, gradients: np.ndarray) -> None:
    flat = gradients.reshape(-1, SIZE)
    found = study.summarise(flat @ flat.T, NAMES, BATCHES, seed=0)
    expected = {"none": (1.0, 0.0), "full": (0.25, 0.0), NAMES[2]: (None, -0.3)}
    for name, (noise, bias) in expected.items():
        _, low, high = found[name]["bias"]
        assert low <= bias + 1e-12 and bias - 1e-12 <= high, name
        assert high - low < 0.5, f"{name}: an interval that would hold anything"
        if noise is not None:
            _, low, high = found[name]["noise_ratio"]
            assert low <= noise <= high, name
    assert found[NAMES[2]]["bias"][2] < -0.2, "a bias is seen"


def test_a_tiny_study_made_twice_measures_once(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    options = ["--batches", "3", "--prompts-per-batch", "2", "--max-tokens", "4"]
    words = [str(out), "--work", str(work), *options, "--train-steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", TWICE, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for stage in ("start", "later"):
        lines = [line.split(",")[0] for line in done.stdout.splitlines() if f"{stage}: b" in line]
        assert lines == [f"{stage}: batch {n} of 3" for n in (1, 2, 3)], "the second has them"
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == " ".join(["python tools/study_variance.py", *words])
    for found in results["stages"].values():
        assert found["none"]["variance_ratio"][0] == found["none"]["noise_ratio"][0] == 1
        assert found["full"]["variance_ratio"][0] < 1 and found["exact"]["noise_ratio"][0] < 1e-9
    assert results["stages"]["start"] != results["stages"]["later"], "weights that were trained"
    summary = (out / "summary.md").read_text()
    assert summary.count("| full | ") == 2 and done.stdout.count(summary) == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "results.json",
        "summary.md",
        "variance.png",
    ], "nothing else beside the results"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--student", "./student"), "--student: expected together with --teacher"),
        (("--student", "./a", "--teacher", "./b"), "--prompts: expected with --student"),
    ],
)
def test_options_that_do_not_go_together(words: tuple[str, ...], expected: str) -> None:
    made = run("study_variance", *words)
    assert made.status == 2 and expected in made.err


def test_without_a_folder_results_go_where_they_are_published(study: ModuleType) -> None:
    options = study.parse([])
    assert (ROOT / options.out / "summary.md").is_file() and options.work.parts[0] == "runs"


@pytest.mark.parametrize(
    ("tool", "option", "value", "expected"),
    [
        ("study_variance", "--batches", "2", "an integer >= 3"),
        ("study_variance", "--prompts-per-batch", "0", "an integer >= 1"),
        ("study_variance", "--max-tokens", "-1", "an integer >= 1"),
        ("study_variance", "--train-steps", "0", "an integer >= 1"),
        ("study_variance", "--learning-rate", "0", "a number above 0"),
        ("study_variance", "--learning-rate", "nan", "a number above 0"),
        ("benchmark_ops", "--tokens", "-1", "an integer >= 1"),
        ("benchmark_ops", "--vocab", "0", "an integer >= 1"),
        ("benchmark_ops", "--repeats", "0", "an integer >= 1"),
    ],
)
def test_a_number_out_of_range_is_refused(
    tool: str, option: str, value: str, expected: str
) -> None:
    done = run(tool, f"{option}={value}")
    assert done.status == 2
    assert done.err.endswith(f"argument {option}: got '{value}', expected {expected}\n"), done.err
