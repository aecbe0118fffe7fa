"""Objectives and settings of a step for tests: the configuration's defaults, and what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_vopd.config import Config
from megatron_vopd.objectives import Objective, ObjectiveSettings
from megatron_vopd.run import settings
from megatron_vopd.trainer.settings import StepSettings

_DEFAULTS = settings.step_settings(
    Config.model_validate({"student": {"path": "org/student"}}), stop_ids=(), replay_dir=None
)


def objective_settings(**changes: Any) -> ObjectiveSettings:
    """Return the settings of the default configuration with `changes`."""
    return replace(_DEFAULTS.objective.settings, **changes)


def objective_named(name: str, topk: int = 0, **changes: Any) -> Objective:
    """Return a row of OBJECTIVES at temperature 1; `changes` are to its settings."""
    return Objective(name, objective_settings(**changes), topk, temperature=1.0)


def step_settings(**changes: Any) -> StepSettings:
    """Return the settings of the default configuration with `changes`."""
    return replace(_DEFAULTS, **changes)
