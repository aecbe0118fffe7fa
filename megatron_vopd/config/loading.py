"""The loader: YAML file and overrides in, a Config or every mistake in them out.

Each mistake becomes one line that says what to change. All are reported together, except those
that depend on an invalid value.
"""

from __future__ import annotations

import difflib
import os
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_vopd.config.rules import problems as rule_problems
from megatron_vopd.config.schema import Config, TeacherSection, section_models
from megatron_vopd.config.table import default_text, expected_text
from megatron_vopd.config.yaml_io import apply_overrides, plain_scalar, read_mapping
from megatron_vopd.errors import ConfigError, Problem, shown, without_failed

_STAND_IN = "org/name"


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Read the configuration at `path` and set `overrides` in it.

    Args:
        path: YAML file.
        overrides: `section.key=value` each, set left to right.

    Raises:
        ConfigError: `problems` holds every mistake.
    """
    data, problems = apply_overrides(read_mapping(path), overrides or [])
    config, more = _checked(data)
    if config is None or problems or more:
        raise ConfigError([*problems, *more])
    return config


def build_config(data: dict[str, Any]) -> Config:
    """Build a configuration from nested plain values; raises ConfigError as load_config does."""
    config, problems = _checked(data)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _checked(data: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Validate `data`: return a Config unless a value is invalid, and every problem."""
    data = _with_sections(data)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
    else:
        return config, rule_problems(config)
    problems = [_value_problem(detail) for detail in details]
    failed = [problem.key for problem in problems]
    try:
        rest = Config.model_validate(_repaired(data, details))
    except ValidationError:
        return None, problems
    return None, problems + without_failed(rule_problems(rest), failed)


def _with_sections(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` with a mapping for each empty section (`train:` with nothing below it)."""
    optional = {"teacher", "teachers"}
    sections = [name for name in section_models() if name not in optional]
    result = {"student": {}, **data}
    result.update({name: {} for name in sections if result.get(name, {}) is None})
    if result.get("teachers", {}) is None:
        del result["teachers"]
    return result


def _repaired(data: dict[str, Any], details: list[ErrorDetails]) -> dict[str, Any]:
    """Return `data` without its invalid values, so that the remaining ones can be checked."""
    result = {
        name: dict(section) if isinstance(section, dict) else section
        for name, section in data.items()
    }
    for detail in details:
        *parents, key = _setting(detail["loc"])
        target: Any = result
        for parent in parents:
            if isinstance(target.get(parent), dict):
                target[parent] = dict(target[parent])
            target = target.get(parent, {})
        if key == "path":
            target[key] = _STAND_IN
        elif [*parents, key] in (["student"], ["teacher"]) or parents == ["teachers"]:
            target[key] = {"path": _STAND_IN}
        else:
            target.pop(key, None)
    return result


def _setting(location: tuple[int | str, ...]) -> list[str]:
    """Return the names that lead to a setting, without positions inside lists."""
    return [str(part) for part in location if isinstance(part, str)]


def _model_at(parts: list[str]) -> type[BaseModel] | None:
    """Return the section model that `parts` lead to; None for `teachers` and for non-sections."""
    models = section_models()
    if not parts:
        return Config
    if parts[0] == "teachers":
        return TeacherSection if len(parts) == 2 else None
    return models.get(parts[0]) if len(parts) == 1 else None


def _value_problem(detail: ErrorDetails) -> Problem:
    """Turn one of pydantic's errors into a problem."""
    parts = _setting(detail["loc"])
    key = ".".join(parts)
    model = _model_at(parts[:-1])
    field = model.model_fields.get(parts[-1]) if model is not None else None
    if detail["type"] == "extra_forbidden" and model is not None:
        return _unknown_key(parts, model)
    if field is None or (model is Config and parts[-1] != "teachers") or key == "teachers":
        return _not_a_section(key, detail["input"])
    if detail["type"] == "missing":
        remedy = f"add it: {field.description}"
        return Problem(key, "nothing", expected_text(field), remedy)
    context = detail.get("ctx", {})
    expected = str(context.get("expected", "")) if detail["type"] == "explained" else ""
    if detail["type"] == "less_than_equal" and "<=" not in expected_text(field):
        expected = f"at most {context.get('le')}"
    remedy = context.get("remedy") or _remedy(field, detail["input"])
    return Problem(key, shown(detail["input"]), expected or expected_text(field), str(remedy))


def _not_a_section(key: str, got: Any) -> Problem:
    remedy = f"write the keys indented below '{key.split('.')[-1]}:'"
    return Problem(key, shown(got), "a section with keys", remedy)


def _remedy(field: FieldInfo, got: Any) -> str:
    if isinstance(got, str) and _is_number(got):
        return "remove the quotes"
    if field.is_required():
        return "change it"
    return f"change it, or remove it for the default {default_text(field)}"


def _is_number(text: str) -> bool:
    return isinstance(plain_scalar(text), int | float)


def _unknown_key(parts: list[str], model: type[BaseModel]) -> Problem:
    """Report an unknown key with the nearest known one, in its section or in another."""
    name = parts[-1]
    prefix = "".join(f"{part}." for part in parts[:-1])
    known = list(model.model_fields)
    near = [f"{prefix}{key}" for key in difflib.get_close_matches(name, known, n=1)]
    elsewhere = [
        f"{section}.{key}"
        for section, other in section_models().items()
        for key in other.model_fields
        if key == name
    ]
    if not near and not elsewhere:
        every = [key for other in section_models().values() for key in other.model_fields]
        close = difflib.get_close_matches(name, every, n=1)
        elsewhere = [
            f"{section}.{key}"
            for section, other in section_models().items()
            for key in other.model_fields
            if key in close
        ]
    suggestions = near or elsewhere[:3]
    remedy = f"did you mean {' or '.join(suggestions)}?" if suggestions else "remove it"
    key = f"{prefix}{name if len(name) <= 80 else shown(name)}"
    return Problem(key, "an unknown key", f"one of {', '.join(known)}", remedy)
