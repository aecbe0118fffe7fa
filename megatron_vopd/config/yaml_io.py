"""Strict YAML for configurations: one small mapping, YAML 1.2 scalars, nothing executable.

PyYAML's safe loader reads, and each limit holds while it composes, before anything grows: file
size, depth, aliases and the nodes that they stand for. Tags, duplicate keys and keys that are not
words are refused with their line. `1e-6` is a number, `yes` is text, dates are text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import yaml

from megatron_vopd.errors import ConfigError, Problem, refusal, shown

MAX_BYTES = 256 * 1024
MAX_DEPTH = 8
MAX_ALIASES = 32
MAX_NODES = 10_000
MAX_DIGITS = 40

_SAVE_AS_TEXT = "save the file as plain UTF-8 text"

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def plain_scalar(text: str) -> Any:
    """Return what an unquoted scalar means in YAML 1.2 (core schema, numbers of bounded length)."""
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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the limits of a configuration; `place` names a mark in messages."""

    # `plain_scalar` reads every unquoted scalar; PyYAML's own rules are those of YAML 1.1.
    yaml_implicit_resolvers = {None: [("plain", re.compile(""))]}  # noqa: RUF012

    def __init__(self, text: str, place: Callable[[Any], str]) -> None:
        super().__init__(text)
        self.place = place
        self.depth = self.num_nodes = self.num_aliases = 0
        self.complete: dict[str, tuple[Any, int]] = {}
        self.key_lines: dict[tuple[int, str], int] = {}

    def document(self) -> Any:
        """Return the value of the one document; None for an empty text."""
        value = self.get_data()
        if self.check_data():
            raise self.refused("a second document ('---')", "one document", "use one file per run")
        return value

    def refused(self, got: str, expected: str, remedy: str, event: Any = None) -> ConfigError:
        """Return the error for `event`, or for the next one."""
        return refusal(self.place((event or self.peek_event()).start_mark), got, expected, remedy)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Build the next node; raises ConfigError for anything that no configuration holds."""
        event: Any = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        node = self._aliased(event) if is_alias else self._composed(event, parent, index)
        if isinstance(parent, yaml.MappingNode) and index is None:
            self._check_key(self.construct_object(node, deep=True), id(parent), event)
        return node

    def _composed(self, event: Any, parent: Any, index: Any) -> Any:
        if event.tag is not None:
            remedy = "remove the tag; a configuration never builds objects"
            raise self.refused(f"the tag {shown(event.tag)}", "plain values", remedy)
        if self.depth > MAX_DEPTH:
            expected = "sections with keys (section.key: value)"
            remedy = "check indentation and brackets"
            raise self.refused(f"nesting deeper than {MAX_DEPTH} levels", expected, remedy)
        before = self.num_nodes
        self._count(1)
        # PyYAML lets an alias stand inside of its own anchor, and no anchor be written twice.
        anchor, event.anchor = event.anchor, None
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if anchor is not None:
            self.complete[anchor] = node, self.num_nodes - before
        return node

    def _aliased(self, event: Any) -> Any:
        self.num_aliases += 1
        if self.num_aliases > MAX_ALIASES:
            got = f"more than {MAX_ALIASES} aliases"
            raise self.refused(got, "few or none", "write the values out")
        if event.anchor not in self.complete:
            name = shown(event.anchor)[1:-1]
            got = f"the alias *{name} of an anchor that is not complete above"
            remedy = "write the value out, or quote text that begins with '*'"
            raise self.refused(got, "an anchor defined earlier", remedy)
        node, num_nodes = self.complete[event.anchor]
        self._count(num_nodes)
        self.get_event()
        return node

    def _count(self, num_nodes: int) -> None:
        self.num_nodes += num_nodes
        if self.num_nodes > MAX_NODES:
            expected = "a configuration of a few dozen settings"
            remedy = "check that this is the right file"
            raise self.refused(f"more than {MAX_NODES} values", expected, remedy)

    def _check_key(self, key: Any, mapping: int, event: Any) -> None:
        if not isinstance(key, str) or not key.isprintable():
            remedy = "use the name of a setting; quote a name that looks like a number"
            raise self.refused(f"the key {shown(key)}", "a word as key", remedy, event)
        first = self.key_lines.get((mapping, key))
        if first is not None:
            got = f"the key {shown(key)} a second time (first on line {first})"
            remedy = f"remove one of the two {shown(key)}"
            raise self.refused(got, "each key once", remedy, event)
        self.key_lines[mapping, key] = event.start_mark.line + 1


_Loader.add_constructor("plain", lambda _, node: plain_scalar(node.value))


def parse_yaml(text: str, source: str, numbered: bool = True) -> Any:
    """Return the value of one YAML document.

    Args:
        text: the document.
        source: name of the text in messages.
        numbered: True if messages also name the line.

    Raises:
        ConfigError: one problem, in one line.
    """

    def place(mark: Any) -> str:
        return f"{source}:{mark.line + 1}" if numbered and mark else source

    expected, remedy = "a YAML value", "check quotes and brackets"
    if numbered:
        expected = "YAML of the form 'section:' with 'key: value'"
        remedy = "check this line and the one above: colons, quotes, brackets, indentation"
    try:
        return _Loader(text, place).document()
    except yaml.MarkedYAMLError as error:
        why = error.problem or error.context
        got = f"text that is no YAML ({why})" if why else "text that is no YAML"
        if "'\\t'" in got:
            got, remedy = "a tab", "indent with spaces, never with tabs"
        got = got.encode("ascii", "backslashreplace").decode("ascii")
        mark = error.problem_mark or error.context_mark
        raise refusal(place(mark), got, expected, remedy) from None
    except yaml.YAMLError:
        got = "a character that YAML does not allow"
        raise refusal(source, got, expected, _SAVE_AS_TEXT) from None


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the sections of a configuration file; raises ConfigError."""
    name = os.fspath(path)
    source = name if name.isprintable() else shown(name)
    value = parse_yaml(_read_text(name, source), source)
    if not isinstance(value, dict):
        got = "an empty file" if value is None else shown(value)
        remedy = "start with 'student:' and, indented below it, 'path: ...'; see examples/"
        raise refusal(source, got, "sections with keys", remedy)
    return value


def _read_text(name: str, source: str) -> str:
    wanted = "a YAML file"
    if not os.path.exists(name):
        raise refusal(source, "no such file", wanted, "check the path and the current folder")
    if not os.path.isfile(name):
        raise refusal(source, "a folder or device", wanted, "give the config.yaml inside it")
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        got, remedy = f"{error.strerror}", "check its permissions"
        raise refusal(source, got, "a readable file", remedy) from None
    if len(content) > MAX_BYTES:
        got, remedy = f"more than {MAX_BYTES // 1024} KiB", "check that it is the right one"
        raise refusal(source, got, "a small YAML file", remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got, remedy = f"a byte that is not UTF-8 at offset {error.start}", _SAVE_AS_TEXT
        raise refusal(source, got, "UTF-8 text", remedy) from None


def apply_overrides(
    data: dict[str, Any], overrides: list[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """Set each `section.key=value`, left to right, in a copy of `data`.

    Values follow the file's YAML rules. Return the copy, and a problem for each override that
    cannot be set.
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
    """Copy nested mappings, so that two places that share one by an alias no longer do."""
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    expected = "section.key=value"
    if not equals or not all(part.isprintable() and part for part in parts):
        raise refusal(shown(override), "no setting", expected, "for example train.steps=100")
    if len(parts) > MAX_DEPTH:
        raise refusal(dotted[:80], "too many parts", expected, "check the dots")
    value = parse_yaml(text, dotted, numbered=False)
    target = data
    for depth, part in enumerate(parts[:-1], start=1):
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            above = ".".join(parts[:depth])
            got = f"a key below {above}, which is {shown(target)}"
            remedy = f"set {above} itself to a mapping: {above}={{{parts[depth]}: ...}}"
            raise refusal(dotted, got, "a key of a section", remedy)
    target[parts[-1]] = value
