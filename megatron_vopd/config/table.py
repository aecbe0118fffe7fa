"""Settings as text: what a key accepts, the table of the guide, the resolved file of a run."""

from __future__ import annotations

import json
import types
import typing
from typing import Any, Literal

from pydantic.fields import FieldInfo

from megatron_vopd.config.schema import Config, section_models
from megatron_vopd.config.types import UNBOUNDED

_NAMES: dict[Any, str] = {int: "integer", float: "number", bool: "true or false", str: "text"}


def expected_text(field: FieldInfo) -> str:
    """Describe what `field` accepts: `integer >= 1 and <= 1024`, `one of a, b`, `number > 0`."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "values" in extra:
        return str(extra["values"])
    return _type_text(field.annotation, field.metadata)


def _type_text(annotation: Any, metadata: typing.Iterable[Any]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(arguments[0], [*arguments[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in arguments if option is not type(None)]
        return f"{_type_text(inner[0], metadata)} or null"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        kind = "non-empty list" if any(getattr(m, "min_length", 0) for m in metadata) else "list"
        return f"{kind}, each {_type_text(arguments[0], [])}"
    return _NAMES.get(annotation, "a mapping of keys") + _range_text(metadata)


def _range_text(metadata: typing.Iterable[Any]) -> str:
    bounds: dict[str, float] = {}
    pending = list(metadata)
    while pending:
        item = pending.pop()
        pending += getattr(item, "metadata", [])
        for name in ("ge", "gt", "le", "lt"):
            bound = getattr(item, name, None)
            if bound is not None and bound != UNBOUNDED:
                bounds[name] = bound
    low = [
        f"{sign} {bounds[name]:.10g}"
        for name, sign in (("ge", ">="), ("gt", ">"))
        if name in bounds
    ]
    high = [
        f"{sign} {bounds[name]:.10g}"
        for name, sign in (("le", "<="), ("lt", "<"))
        if name in bounds
    ]
    return " " + " and ".join(low + high) if low or high else ""


def default_text(field: FieldInfo) -> str:
    """Return the default of `field` as it would be written in the file, or `required`."""
    if field.is_required():
        return "required"
    return as_yaml(field.get_default(call_default_factory=False))


def as_yaml(value: Any) -> str:
    """Write a plain value on one line that the configuration's parser reads back."""
    return json.dumps(value, ensure_ascii=False)


def config_table_markdown() -> str:
    """Return all settings as one Markdown table (docs/guide/configuration.md holds it)."""
    rows = ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
    for section, model in section_models().items():
        for key, field in model.model_fields.items():
            default = default_text(field)
            if (section, key) == ("curriculum", "min_entropy_fraction"):
                default = "0.5, or null with `min_entropy`"
            cells = (f"`{section}.{key}`", expected_text(field), default, field.description or "")
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    meaning = "Several teachers by name instead of `teacher`; each has the keys of `teacher`."
    rows.append(f"| `teachers.<name>` | a mapping of keys | {{}} | {meaning} |")
    return "\n".join(rows) + "\n"


def resolved_yaml(config: Config) -> str:
    """Return `config` as YAML with every key; load_config reads it back to an equal Config."""
    lines: list[str] = []
    for section, values in config.model_dump(mode="json").items():
        if not isinstance(values, dict) or section == "teachers":
            lines.append(f"{section}: {as_yaml(values)}")
            continue
        lines.append(f"{section}:")
        lines += [f"  {key}: {as_yaml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"
