"""Estimator, direction and baseline of a configuration -> the objective that is run."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest

from megatron_vopd.config.method import ObjectiveSection
from megatron_vopd.objectives import OBJECTIVES
from megatron_vopd.run.settings import objective_of
from megatron_vopd.trainer import trainer
from megatron_vopd.trainer.settings import StepSettings


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"baseline": "none"}, "sampled"),
        ({"baseline": "full", "task_reward_weight": 0.5}, "sampled"),
        ({"baseline": "topk", "topk": 100}, "sampled"),
        ({"estimator": "exact"}, "reverse"),
        ({"estimator": "exact", "direction": "forward"}, "forward"),
        ({"estimator": "exact", "direction": "mixed", "reverse_weight": 0.6}, "mixed"),
        ({"estimator": "topk", "topk": 20}, "topk_reverse"),
        ({"estimator": "hard", "prefix": "dataset"}, "hard"),
    ],
)
def test_objective_of_a_configuration(section: dict[str, Any], name: str) -> None:
    objective = objective_of(ObjectiveSection(**section), temperature=0.7)
    assert objective.name == name and name in OBJECTIVES
    assert objective.temperature == 0.7
    assert objective.topk == section.get("topk", 0)
    assert objective.settings.baseline == section.get("baseline", "full")
    assert objective.settings.reverse_weight == section.get("reverse_weight", 0.2)


def test_importance_gate_and_floor_are_handed_on() -> None:
    section = ObjectiveSection(
        baseline="none", importance="mask", importance_cap=3.0, entropy_gate=0.8, reward_floor=0.1
    )
    settings = objective_of(section).settings
    found = settings.importance, settings.importance_cap, settings.entropy_gate
    assert (*found, settings.reward_floor) == ("mask", 3.0, 0.8, 0.1)


def test_shares_of_a_step() -> None:
    objective = objective_of(ObjectiveSection())
    mixed = StepSettings(objective, 10, 2, {"student": 0.7, "dataset": 0.3})
    assert (mixed.num_asked, mixed.num_given) == (7, 6)
    given = StepSettings(objective, 10, 1, {"teacher": 1.0})
    assert (given.num_asked, given.num_given) == (0, 10)
    asked = StepSettings(objective, 10, 3)
    assert (asked.num_asked, asked.num_given) == (10, 0)


def test_the_step_reads_like_the_paper() -> None:
    """At most 20 statements, the docstring not counted; the file at most 350 lines."""
    source = textwrap.dedent(inspect.getsource(trainer.Trainer.train_step))
    function = ast.parse(source).body[0]
    statements = [n for n in ast.walk(function) if isinstance(n, ast.stmt)][2:]
    assert len(statements) <= 20
    assert len(inspect.getsource(trainer).splitlines()) <= 350
