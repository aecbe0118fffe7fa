"""Strict YAML for configurations: one small mapping, YAML 1.2 scalars, nothing executable.

The text is read as parser events and built here, so that every limit holds before anything grows:
file size, depth, aliases and the nodes that they stand for. Tags, duplicate keys and keys that are
not words are refused with their line. `1e-6` is a number, `yes` is text, dates are text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_vopd.errors import ConfigError, Problem, shown

MAX_BYTES = 256 * 1024
MAX_DEPTH = 8
MAX_ALIASES = 32
MAX_NODES = 10_000
MAX_DIGITS = 40

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def plain_scalar(text: str) -> Any:
    """The value of an unquoted scalar by the YAML 1.2 core schema (numbers of bounded length)."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.lower().replace(".", ""))
    if len(text) > MAX_DIGITS:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


@dataclass
class _Builder:
    """Plain Python values from YAML events; `source` names the text in messages."""

    source: str
    numbered: bool
    num_nodes: int = 0
    num_aliases: int = 0
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)

    def refuse(self, event: yaml.Event, got: str, expected: str, remedy: str) -> ConfigError:
        return ConfigError([Problem(self.at(event.start_mark), got, expected, remedy)])

    def at(self, mark: Any) -> str:
        return f"{self.source}:{mark.line + 1}" if self.numbered and mark else self.source

    def count(self, event: yaml.Event, nodes: int) -> None:
        self.num_nodes += nodes
        if self.num_nodes > MAX_NODES:
            raise self.refuse(
                event,
                f"more than {MAX_NODES} values",
                "a configuration of a few dozen settings",
                "check that this is the right file",
            )

    def build(self, events: Iterator[yaml.Event], event: yaml.Event, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        if getattr(event, "tag", None) is not None:
            raise self.refuse(
                event,
                f"the tag {shown(getattr(event, 'tag', ''))}",
                "plain values",
                "remove the tag; a configuration never builds objects",
            )
        if depth > MAX_DEPTH:
            raise self.refuse(
                event,
                f"nesting deeper than {MAX_DEPTH} levels",
                "sections with keys (section.key: value)",
                "check indentation and brackets",
            )
        before = self.num_nodes
        self.count(event, 1)
        if isinstance(event, yaml.ScalarEvent):
            value = plain_scalar(event.value) if event.implicit[0] else event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self.sequence(events, depth)
        else:
            value = self.mapping(events, depth)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = (value, self.num_nodes - before)
        return value

    def alias(self, event: yaml.AliasEvent) -> Any:
        self.num_aliases += 1
        if self.num_aliases > MAX_ALIASES:
            raise self.refuse(
                event, f"more than {MAX_ALIASES} aliases", "few or none", "write the values out"
            )
        if event.anchor not in self.anchors:
            raise self.refuse(
                event,
                f"the alias *{shown(event.anchor)[1:-1]} of an anchor that is not complete above",
                "an anchor defined earlier",
                "write the value out, or quote text that begins with '*'",
            )
        value, nodes = self.anchors[event.anchor]
        self.count(event, nodes)
        return value

    def sequence(self, events: Iterator[yaml.Event], depth: int) -> list[Any]:
        values: list[Any] = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            values.append(self.build(events, event, depth + 1))
        return values

    def mapping(self, events: Iterator[yaml.Event], depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self.build(events, event, depth + 1)
            if not isinstance(key, str) or not key.isprintable():
                raise self.refuse(
                    event,
                    f"the key {shown(key)}",
                    "a word as key",
                    "use the name of a setting; quote a name that looks like a number",
                )
            if key in values:
                raise self.refuse(
                    event,
                    f"the key {shown(key)} a second time (first on line {lines[key]})",
                    "each key once",
                    f"remove one of the two {shown(key)}",
                )
            lines[key] = event.start_mark.line + 1
            values[key] = self.build(events, next(events), depth + 1)
        return values


def _yaml_mistake(builder: _Builder, error: yaml.YAMLError) -> ConfigError:
    """One line from PyYAML's report, with a remedy for what newcomers meet most."""
    where, got = builder.source, "a character that YAML does not allow"
    expected = "a YAML value"
    remedy = "check quotes and brackets"
    if builder.numbered:
        expected = "YAML of the form 'section:' with 'key: value'"
        remedy = "check this line and the one above: colons, quotes, brackets, indentation"
    if isinstance(error, yaml.MarkedYAMLError):
        where = builder.at(error.problem_mark or error.context_mark)
        got = error.problem or error.context or "text that is no YAML"
    else:
        remedy = "save the file as plain UTF-8 text"
    if "'\\t'" in got:
        got, remedy = "a tab", "indent with spaces, never with tabs"
    got = got.encode("ascii", "backslashreplace").decode("ascii")
    return ConfigError([Problem(where, got, expected, remedy)])


def parse_yaml(text: str, source: str, numbered: bool = True) -> Any:
    """The value of one YAML document; raises ConfigError, naming `source` (and the line)."""
    builder = _Builder(source, numbered)
    value: Any = None
    num_documents = 0
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        for event in events:
            if not isinstance(event, yaml.DocumentStartEvent):
                continue
            num_documents += 1
            if num_documents > 1:
                raise builder.refuse(
                    event, "a second document ('---')", "one document", "use one file per run"
                )
            value = builder.build(events, next(events), 0)
    except yaml.YAMLError as error:
        raise _yaml_mistake(builder, error) from None
    return value


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The sections of a configuration file; raises ConfigError."""
    name = os.fspath(path)
    source = name if name.isprintable() else shown(name)
    text = _read_text(name, source)
    value = parse_yaml(text, source)
    if not isinstance(value, dict):
        got = "an empty file" if value is None else shown(value)
        raise ConfigError(
            [
                Problem(
                    source,
                    got,
                    "sections with keys",
                    "start with 'student:' and, indented below it, 'path: ...'; see examples/",
                )
            ]
        )
    return value


def _read_text(name: str, source: str) -> str:
    def refuse(got: str, expected: str, remedy: str) -> ConfigError:
        return ConfigError([Problem(source, got, expected, remedy)])

    file_wanted = "a YAML file"
    if not os.path.exists(name):
        raise refuse("no such file", file_wanted, "check the path and the current folder")
    if not os.path.isfile(name):
        raise refuse("a folder or device", file_wanted, "give the config.yaml inside it")
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise refuse(f"{error.strerror}", "a readable file", "check its permissions") from None
    if len(content) > MAX_BYTES:
        raise refuse(
            f"more than {MAX_BYTES // 1024} KiB",
            "a small YAML file",
            "check that it is the right one",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(
            f"a byte that is not UTF-8 at offset {error.start}",
            "UTF-8 text",
            "save the file as plain UTF-8 text",
        ) from None


def apply_overrides(
    data: dict[str, Any], overrides: list[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """`data` with each `section.key=value` set, left to right, and what is wrong with the others.

    Values follow the file's YAML rules.
    """
    result = _copied(data)
    problems: list[Problem] = []
    for override in overrides:
        try:
            _apply(result, override)
        except ConfigError as error:
            problems.extend(error.problems)
    return result, problems


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    expected = "section.key=value"
    if not equals or not all(part.isprintable() and part for part in parts):
        raise ConfigError(
            [Problem(shown(override), "no setting", expected, "for example train.steps=100")]
        )
    if len(parts) > MAX_DEPTH:
        raise ConfigError([Problem(dotted[:80], "too many parts", expected, "check the dots")])
    value = parse_yaml(text, dotted, numbered=False)
    target = data
    for depth, part in enumerate(parts[:-1], start=1):
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            above = ".".join(parts[:depth])
            raise ConfigError(
                [
                    Problem(
                        dotted,
                        f"a key below {above}, which is {shown(target)}",
                        "a key of a section",
                        f"set {above} itself to a mapping: {above}={{{parts[depth]}: ...}}",
                    )
                ]
            )
    target[parts[-1]] = value
