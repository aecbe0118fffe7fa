"""The examples of the cells are sound configurations, each of the cell that its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_vopd.config import load_config
from megatron_vopd.run.settings import objective_of
from tests.support import ROOT

CELLS = ROOT / "examples" / "arithmetic" / "cells"
# Name -> where responses come from, objective.
EXPECTED = {
    "student_forward": ("student", "forward"),
    "student_reverse": ("student", "reverse"),
    "teacher_forward": ("teacher", "forward"),
    "teacher_reverse": ("teacher", "reverse"),
    "mixed": ("student", "mixed"),
    "curriculum": ("student", "sampled"),
}
_STEPS = yaml.safe_load((CELLS.parent / "teacher.yaml").read_text())["train"]["steps"]
# What the demo makes.
MADE = ("models/start", f"teacher/hf/step_{_STEPS}")
FILES = ("data/train.jsonl", "data/evaluation.jsonl", "teacher_responses.jsonl")


def test_there_is_one_of_each() -> None:
    assert {path.stem for path in CELLS.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_it_is_a_sound_configuration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "runs" / ("five_digits" if name == "curriculum" else "demo")
    for folder in (*MADE, "teacher/hf/step_400"):
        (demo / folder).mkdir(parents=True)
    for file in FILES:
        path = demo / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    config = load_config(CELLS / f"{name}.yaml", [])
    objective = objective_of(config.objective, 1.0)
    assert (config.objective.prefix, objective.name) == EXPECTED[name]
    assert config.run.name == name
    if name == "mixed":
        assert objective.settings.reverse_weight == 0.2
    assert (config.curriculum.kind == "entropy_gated") == (name == "curriculum")
