"""From a configuration to objective and step; the words of the schema against what they name."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_vopd.config import Config
from megatron_vopd.config.method import ESTIMATORS, WEIGHTS, ObjectiveSection
from megatron_vopd.objectives import IMPORTANCE, OBJECTIVES, ObjectiveSettings, advantages
from megatron_vopd.run.settings import objective_of, step_settings
from megatron_vopd.trainer.settings import StepSettings
from tests.support import settings as given


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
    settings = objective_of(section, 1.0).settings
    found = settings.importance, settings.importance_cap, settings.entropy_gate
    assert (*found, settings.reward_floor) == ("mask", 3.0, 0.8, 0.1)


def test_shares_of_a_step() -> None:
    def shares(samples_per_prompt: int, **fractions: float) -> StepSettings:
        return given.step_settings(
            num_prompts=10, samples_per_prompt=samples_per_prompt, prefix_fractions=fractions
        )

    mixed = shares(2, student=0.7, dataset=0.3)
    assert (mixed.num_asked, mixed.num_given) == (7, 6)
    ready = shares(1, teacher=1.0)
    assert (ready.num_asked, ready.num_given) == (0, 10)
    asked = shares(3, student=1.0)
    assert (asked.num_asked, asked.num_given) == (10, 0)


def choices(key: str) -> set[str]:
    """Return the words that the schema takes for a key of the objective."""
    return set(get_args(ObjectiveSection.model_fields[key].annotation))


def test_the_schema_takes_the_words_that_the_objectives_have() -> None:
    assert choices("estimator") == ESTIMATORS.keys()
    asked = [pair for row in ESTIMATORS.values() for pair in row.objectives.items()]
    assert {direction for direction, _ in asked} == choices("direction")
    assert sorted(name for _, name in asked) == sorted(OBJECTIVES), "each is asked for in one way"
    assert choices("baseline") == advantages.keys()
    assert choices("importance") == IMPORTANCE.keys()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("trait", ["needs_teacher", "has_advantage"])
def test_estimator_and_objectives_have_the_same_traits(estimator: str, trait: str) -> None:
    row = ESTIMATORS[estimator]
    for name in row.objectives.values():
        assert getattr(OBJECTIVES[name], trait) == getattr(row, trait), name


def test_a_weight_is_a_setting_that_one_objective_reads() -> None:
    for key, (estimator, direction) in WEIGHTS.items():
        assert key in ObjectiveSection.model_fields
        assert key in {field.name for field in fields(ObjectiveSettings)}
        assert direction in ESTIMATORS[estimator].objectives


@pytest.mark.parametrize("kind", [ObjectiveSettings, StepSettings])
def test_only_the_configuration_has_defaults(kind: Any) -> None:
    for field in fields(kind):
        assert field.default is MISSING and field.default_factory is MISSING, field.name


def test_every_setting_of_a_step_comes_from_the_configuration() -> None:
    config = Config.model_validate(
        {
            "run": {"seed": 3},
            "student": {"path": "org/student"},
            "objective": {"prefix": "dataset", "task_reward_weight": 0.5, "topk": 7},
            "rollout": {
                "num_prompts": 5,
                "samples_per_prompt": 2,
                "temperature": 0.7,
                "top_p": 0.9,
                "max_staleness": 1,
                "deadline_seconds": 60.0,
            },
            "train": {
                "max_tokens_per_microbatch": 64,
                "spike_factor": 3.0,
                "max_consecutive_skips": 2,
            },
        }
    )
    found = step_settings(config, stop_ids=(9,), replay_dir=Path("skipped"))
    assert (found.objective.temperature, found.objective.topk) == (0.7, 7)
    assert (found.temperature, found.top_p, found.stop_ids) == (0.7, 0.9, (9,))
    assert (found.num_prompts, found.samples_per_prompt, found.max_staleness) == (5, 2, 1)
    assert found.prefix_fractions == {"dataset": 1.0} and found.task_reward_weight == 0.5
    assert (found.max_tokens_per_microbatch, found.deadline_seconds) == (64, 60.0)
    assert (found.spike_factor, found.max_consecutive_skips, found.seed) == (3.0, 2, 3)
    assert found.replay_dir == Path("skipped")
    default = given.step_settings()
    same = [f.name for f in fields(found) if getattr(found, f.name) == getattr(default, f.name)]
    assert same == [], "a setting with its default proves nothing"
