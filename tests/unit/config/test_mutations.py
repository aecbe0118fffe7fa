"""Broken configurations by the thousand: each is refused in words, none escapes."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import yaml

from megatron_vopd.config import ConfigError, load_config
from tests.support.config_cases import VALID, refusal, write

SNIPPETS = [
    '!!python/object/apply:os.mkdir ["{marker}"]',
    "&a [*a]",
    "<<: *x",
    "? {a: b}",
    "\t",
    "\x00",
    "\x1b[31m",
    "---\n",
    "...\n",
    "%YAML 9.9\n",
    "9" * 5000,
    "1e999",
    ".nan",
    "-.inf",
    "2026-02-30",
    "0x" + "f" * 300,
    "[" * 60,
    "{a: " * 30,
    "- - - -",
    "!!binary x",
    "!!timestamp 2026",
    "!<tag:yaml.org,2002:python/name:os.system>",
    "'",
    '"\\ud800"',
    '"\\x00"',
    "|\n  text",
    "\u2028",
    "\ufeff",
    "*x",
    "&x",
    "@",
    "`",
    "null",
    "~",
    ": ",
    ", ",
    "#",
]
BAD_VALUES: list[Any] = [
    [[1]],
    {"a": {"b": 1}},
    -(10**30),
    10**30,
    float("nan"),
    [None],
    {"": None},
]


def mutate_text(text: str, chance: random.Random, marker: str) -> bytes:
    """Make one to four edits of characters, lines or bytes in `text`."""
    content = bytearray(text.encode())
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(6)
        if kind == 0:
            content[at:at] = chance.choice(SNIPPETS).replace("{marker}", marker).encode()
        elif kind == 1:
            del content[at : at + chance.randint(1, 12)]
        elif kind == 2:
            highest = chance.choice([127, 127, 127, 256])
            content[at:at] = bytes(chance.randrange(highest) for _ in range(chance.randint(1, 5)))
        elif kind == 3:
            lines = content.split(b"\n")
            lines.insert(chance.randrange(len(lines)), chance.choice(lines))
            content = bytearray(b"\n".join(lines))
        elif kind == 4:
            lines = content.split(b"\n")
            chance.shuffle(lines)
            content = bytearray(b"\n".join(lines))
        else:
            content = content[:at]
    return bytes(content)


def mutate_structure(chance: random.Random) -> tuple[dict[str, Any], str]:
    """Return VALID with one bad key or value, and the key that the message has to name."""
    data = copy.deepcopy(VALID)
    section = chance.choice(list(data))
    key = chance.choice(list(data[section]))
    kind = chance.randrange(4)
    if kind == 0:
        typo = key + chance.choice("abcxyz") if chance.random() < 0.5 else key[:-1] + "_"
        data[section][typo] = data[section].pop(key)
        return data, f"{section}.{typo}:"
    if kind == 1:
        data[section][key] = chance.choice(BAD_VALUES)
        return data, f"{section}.{key}:"
    if kind == 2:
        data[section] = chance.choice([3, "text", [1, 2], True, 1.5])
        return data, f"{section}:"
    data[f"{section}{chance.choice('abc')}"] = data.pop(section)
    return data, f"{section}"


class TestMutations:
    """2,000 broken files, 500 broken overrides: only ConfigError, one line per problem."""

    def test_broken_text_never_escapes(self, tmp_path: Path) -> None:
        chance = random.Random(20)
        marker = tmp_path / "executed"
        text = yaml.safe_dump(VALID, sort_keys=False)
        refused = 0
        for _ in range(1000):
            path = write(tmp_path, mutate_text(text, chance, str(marker)))
            try:
                load_config(path)
            except ConfigError as error:
                refused += 1
                lines = str(error).splitlines()
                assert len(lines) == len(error.problems) > 0
                assert all(": got " in line and "; " in line for line in lines), lines
        assert refused > 700
        assert not marker.exists()

    def test_broken_structure_is_named(self, tmp_path: Path) -> None:
        chance = random.Random(21)
        for _ in range(1000):
            data, key = mutate_structure(chance)
            message = refusal(tmp_path, yaml.safe_dump(data, sort_keys=False))
            assert any(line.startswith(key) for line in message.split("\n")), (key, message)

    def test_broken_overrides_never_escape(self, tmp_path: Path) -> None:
        chance = random.Random(22)
        path = write(tmp_path, yaml.safe_dump(VALID))
        keys = [f"{section}.{key}" for section in VALID for key in VALID[section]]
        refused = 0
        for _ in range(500):
            override = f"{chance.choice(keys)}={chance.choice(SNIPPETS)}"
            at = chance.randrange(len(override))
            override = override[:at] + chance.choice(["", ".", "=", "{", "\t"]) + override[at:]
            try:
                load_config(path, [override])
            except ConfigError as error:
                refused += 1
                assert len(str(error).splitlines()) == len(error.problems) > 0
        assert refused > 400
