"""A model folder's JSON is read bounded and strict, whichever file it is and whoever reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_vopd.hf.facts import ModelError
from megatron_vopd.hf.folder import read_json, read_model_folder
from tests.support.check_cases import save_model


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_key_that_occurs_twice_is_refused(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, eos=3)
    read_model_folder(str(tmp_path))
    text = (tmp_path / name).read_text()
    key = next(iter(json.loads(text)))
    (tmp_path / name).write_text(f'{{"{key}": 1, {text[1:]}')
    with pytest.raises(ModelError, match=f"{name}: holds '{key}' twice"):
        read_model_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "holds 'b' twice"),
        ('{"a": 1', "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("\udcff", "no valid JSON"),
        ("[1]", "no JSON object"),
        ("", "no valid JSON"),
    ],
)
def test_what_is_no_object_is_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {words}") and "\n" not in str(caught.value)


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.json"
    path.write_text("{}")
    os.truncate(path, 256 * 2**20 + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    with pytest.raises(ModelError, match="more than 256 MiB"):
        read_json(path)
