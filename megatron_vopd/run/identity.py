"""The identity of a run: what must equal that of the checkpoint that it resumes from.

A checkpoint keeps the resolved configuration, the model's facts and a fingerprint of each teacher.
Keys in `FREE` say where and how a run is executed, or how long, and may change between save and
resume; every other key is part of the experiment, and a change is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_vopd.config import Config
from megatron_vopd.errors import ConfigError, Problem, shown
from megatron_vopd.hf.facts import ModelFacts

# Sections, and keys of sections, that may differ. Teachers are compared by their fingerprints, the
# student by its facts, prompts by their stream's fingerprint; a ladder may change (curriculum.py).
FREE = {
    "run.name",
    "run.dir",
    "student.path",
    "student.recompute",
    "parallel",
    "rollout.engine",
    "rollout.urls",
    "rollout.tp",
    "rollout.memory_fraction",
    "rollout.cpu_threads",
    "rollout.deadline_seconds",
    "curriculum.ladder",
    "data.train",
    "data.evaluation",
    "data.responses",
    "train.steps",
    "train.max_consecutive_skips",
    "optimizer.distributed",
    "optimizer.overlap_grad_reduce",
    "checkpoint",
    "evaluation",
    "logging",
}
_FREE_OF_TEACHERS = ("path", "tp", "pp", "ep", "offload", "cache_dir")


def settings_of(config: Config) -> dict[str, Any]:
    """Return `section.key` -> value of a configuration, as JSON values."""
    flat: dict[str, Any] = {}
    for section, values in config.model_dump(mode="json").items():
        if section == "teachers":
            for name, teacher in values.items():
                flat |= {f"teachers.{name}.{key}": value for key, value in teacher.items()}
        elif values is not None:
            flat |= {f"{section}.{key}": value for key, value in values.items()}
    return flat


def identity(config: Config, facts: ModelFacts, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON values that `require_same` compares.

    Args:
        facts: facts of the student.
        fingerprints: hashes of the teachers' model folders, by key.
    """
    return {
        "config": settings_of(config),
        "model": asdict(facts),
        "teachers": dict(sorted(fingerprints.items())),
    }


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError with a line for every key in which the two differ.

    Args:
        saved, current: what `identity` returned for the checkpoint's run, and for this one.
        where: the checkpoint, for the messages.
    """
    problems: list[Problem] = []
    for key in _different(saved["model"], current["model"]):
        problems.append(
            Problem(
                "student.path",
                f"a model with {key}={shown(current['model'].get(key))}",
                f"{key}={shown(saved['model'].get(key))} of {where}",
                "give back its model, or start a new run under another run.name",
            )
        )
    for key in _different(saved["teachers"], current["teachers"]):
        names = " and ".join(sorted(saved["teachers"])) or "none"
        problems.append(
            Problem(
                f"{key}.path",
                "other weights" if key in saved["teachers"] else "a teacher of that name",
                f"the teacher of {where} ({names})",
                "give it back, or start a new run under another run.name",
            )
        )
    for key in _different(saved["config"], current["config"]):
        if not _is_free(key):
            problems.append(
                Problem(
                    key,
                    shown(current["config"].get(key)),
                    f"{shown(saved['config'].get(key))} of {where}",
                    "set it back, or start a new run under another run.name",
                )
            )
    if problems:
        raise ConfigError(problems)


def _different(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) or (key in saved) != (key in current)
    ]


def _is_free(key: str) -> bool:
    section, _, name = key.partition(".")
    if section in ("teacher", "teachers"):
        return name.rpartition(".")[2] in _FREE_OF_TEACHERS
    return section in FREE or key in FREE
