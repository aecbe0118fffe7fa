"""The models of a run: each resolved and read once, hub ids from the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vopd.errors import UserError
from megatron_vopd.hf.models import fetch_weights, read_models
from tests.support.tiny_tokenizer import save_model_folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline cache that holds org/teacher; returns the folder of its snapshots."""
    import huggingface_hub.constants as constants

    cached = tmp_path / "models--org--teacher"
    save_model_folder(cached / "snapshots" / "abc")
    save_model_folder(cached / "snapshots" / "def")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cached


def test_models_come_in_order_and_known_ones_are_not_read_again(hub: Path, tmp_path: Path) -> None:
    student = save_model_folder(tmp_path / "student")
    paths = {"student": str(student), "teacher": "org/teacher"}
    models = read_models(paths)
    assert list(models) == ["student", "teacher"]
    assert models["student"].path == str(student)
    assert models["teacher"].path == str(hub / "snapshots" / "abc")
    (student / "config.json").unlink()
    again = read_models(paths, known=models)
    assert again["student"] is models["student"] and again["teacher"] is models["teacher"]
    with pytest.raises(UserError, match=r"student\.path: .*config\.json"):
        read_models(paths, known={"teacher": models["teacher"]})


def test_what_is_wrong_names_the_setting(hub: Path, tmp_path: Path) -> None:
    broken = save_model_folder(tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    with pytest.raises(UserError, match=r"teachers\.m\.path: .*expected a supported model folder"):
        read_models({"teachers.m": str(broken)})
    with pytest.raises(UserError, match=r"student\.path: .*org/absent"):
        read_models({"student": "org/absent"})


def test_weights_must_be_those_of_the_model_that_was_read(hub: Path) -> None:
    paths = {"teacher": "org/teacher"}
    models = read_models(paths)
    fetch_weights(paths, models)
    (hub / "refs" / "main").write_text("def")
    with pytest.raises(UserError, match=r"teacher\.path: .*changed on the hub"):
        fetch_weights(paths, models)
