"""A sound configuration, ways to change it, and what is said about the result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.config import ConfigError, build_config, load_config

VALID: dict[str, Any] = {
    "run": {"name": "trial", "seed": 7},
    "student": {"path": "org/student"},
    "teacher": {"path": "org/teacher", "tp": 2},
    "objective": {"baseline": "topk", "topk": 16},
    "rollout": {"num_prompts": 8, "temperature": 1.0},
    "curriculum": {"ladder": [32, 64], "interval": 5},
    "data": {"train": "org/prompts", "max_prompt_tokens": 64},
    "train": {"steps": 10},
    "optimizer": {"learning_rate": 1e-5, "warmup_steps": 2},
}


def with_values(settings: dict[str, Any]) -> dict[str, Any]:
    """Return VALID with dotted `settings` replaced."""
    data = copy.deepcopy(VALID)
    for dotted, value in settings.items():
        *parents, key = dotted.split(".")
        target = data
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = value
    return data


def problems_of(settings: dict[str, Any]) -> list[str]:
    try:
        build_config(with_values(settings))
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), list(overrides))
    return str(caught.value)


# Changes that leave VALID sound.
FINE = [
    {"rollout.temperature": 0.7, "objective.allow_biased_sampling": True},
    {"rollout.temperature": 0.7, "objective.estimator": "exact"},
    {
        "rollout.temperature": 0.7,
        "objective.prefix": "dataset",
        "data.responses": "org/data",
        "curriculum.kind": "fixed",
    },
    {"objective.estimator": "exact", "objective.direction": "mixed", "objective.reverse_weight": 1},
    {"objective.baseline": "none", "objective.reward_floor": 0.2},
    {"parallel.cp": 2, "parallel.device": "cpu", "parallel.backend": "local"},
    {"parallel.cp": 3, "train.max_tokens_per_microbatch": 132},
    {"objective.task_reward_weight": 1.0, "rollout.samples_per_prompt": 4},
    {
        "objective.estimator": "hard",
        "objective.prefix": {"teacher": 0.25, "dataset": 0.75},
        "data.responses": "org/data",
        "teacher": None,
        "data.train": None,
        "curriculum.kind": "linear",
    },
    {"objective.prefix": {"student": 0.5, "dataset": 0.5}, "data.responses": "org/data"},
    {
        "teacher": None,
        "teachers": {"m": {"path": "a/b"}, "n": {"path": "a/c", "tp": 4}},
        "data.teacher_field": "domain",
    },
    {
        "rollout.engine": "server",
        "rollout.urls": ["http://h:1"],
        "rollout.allow_remote": True,
        "rollout.max_staleness": 1,
    },
    {"parallel.device": "cpu", "rollout.max_staleness": 1},
    {"curriculum.min_entropy": 0.3},
    {"optimizer.learning_rate": 1},
    {"data.evaluation": "org/problems"},
    {"rollout": None, "run": None, "teachers": None},
]
