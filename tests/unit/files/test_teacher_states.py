"""The folder of a teacher's states: what is kept comes back; what changed is refused by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.files.teacher_states import StateCache
from megatron_vopd.trainer.teacher_cache import text_digest, text_name
from megatron_vopd.types import Prompt, Rollout
from tests.support.data_cases import refused

GIVEN = [Rollout(Prompt(f"r.jsonl:{i}", (i, 2)), 0, (3, i), None, "stop", -1) for i in range(3)]
TEXTS = {text_name(r): text_digest(r) for r in GIVEN}
STATES = {"a-0": torch.randn(3, 4), "b-0": torch.randn(1, 4)}


def cache(
    folder: Path, teacher: str = "t", size: int = 4, dtype: Any = torch.float32
) -> StateCache:
    return StateCache(folder, {"teacher": teacher}, size, dtype)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    made = cache(tmp_path / "cache")
    made.prepare(TEXTS)
    made.write(STATES)
    return made.folder


def states_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_what_was_written_is_read_bit_by_bit(filled: Path) -> None:
    made = cache(filled)
    made.prepare(TEXTS)
    assert "a-0" not in made
    made.scan()
    for key, states in STATES.items():
        assert key in made and torch.equal(made.read(key), states)
    other = cache(filled)
    other.write({"a-0": torch.zeros(3, 4), "c-0": torch.ones(2, 4)})
    made.scan()
    assert torch.equal(made.read("c-0"), torch.ones(2, 4))
    assert torch.equal(made.read("a-0"), STATES["a-0"]), "the first that was found stays"
    halves = cache(filled.parent / "bf16", dtype=torch.bfloat16)
    halves.prepare({})
    halves.write({"a-0": STATES["a-0"].bfloat16()})
    halves.scan()
    assert torch.equal(halves.read("a-0"), STATES["a-0"].bfloat16())


def test_texts_are_known_by_their_ids(filled: Path) -> None:
    longer = Rollout(Prompt("r.jsonl:9", (9,)), 0, (1,), None, "stop", -1)
    more = TEXTS | {text_name(longer): text_digest(longer)}
    cache(filled).prepare(more)
    cache(filled).prepare(TEXTS)
    changed = dict(more) | {"r.jsonl:9/0": text_digest(GIVEN[0])}
    refused(lambda: cache(filled).prepare(changed), "data.responses", "r.jsonl:9/0", "another text")
    moved = Rollout(Prompt("p", (0, 2, 3)), 0, (0,), None, "stop", -1)
    assert text_digest(moved) != text_digest(GIVEN[0])


def test_another_teacher_is_refused_by_name(filled: Path) -> None:
    refused(lambda: cache(filled, "u").prepare(TEXTS), "teacher.cache_dir", "another teacher ('t')")
    refused(lambda: cache(filled, size=8).prepare(TEXTS), "another hidden size ('4')")
    refused(lambda: cache(filled, dtype=torch.bfloat16).prepare(TEXTS), "type ('float32')")


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


@pytest.mark.parametrize(
    "damage",
    [_cut(0), _cut(0.01), _cut(0.3), _cut(0.9), _cut(0.999), lambda content: content + b"x"],
)
def test_a_torn_file_is_noticed_when_it_is_found(damage: Any, filled: Path) -> None:
    path = states_file(filled)
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: cache(filled).scan(), "teacher.cache_dir", path.name, "torn", "remove it")


def test_changed_content_is_noticed_when_it_is_read(filled: Path) -> None:
    path = states_file(filled)
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    made = cache(filled)
    made.scan()
    outcomes = []
    for key in STATES:
        try:
            made.read(key)
            outcomes.append("read")
        except ValueError as error:
            assert path.name in str(error) and "torn" in str(error)
            outcomes.append("refused")
    assert sorted(outcomes) == ["read", "refused"]
    (filled / "cache.json").write_bytes(b'{"identity": {')
    refused(lambda: cache(filled).prepare(TEXTS), "cache.json", "torn")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refused(lambda: cache(tmp_path).prepare(TEXTS), "'notes.txt'", "give an empty folder")
    refused(lambda: cache(tmp_path / "notes.txt").prepare(TEXTS), "a folder that can be written")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_leftovers_of_killed_writers_go(filled: Path) -> None:
    old, new = filled / "states-1.safetensors.tmp-a", filled / "states-2.safetensors.tmp-b"
    for path in (old, new):
        path.write_bytes(b"half")
    day = time.time() - 2 * 86400
    os.utime(old, (day, day))
    made = cache(filled)
    made.prepare(TEXTS)
    made.scan()
    assert not old.exists() and new.exists()
