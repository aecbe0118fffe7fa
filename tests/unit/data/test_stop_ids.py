"""Which ids end a response: the contract, and where each model says its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vopd.data.stop_ids import agreed_stop_ids, stop_ids
from megatron_vopd.hf.models import read_models
from tests.support.data_cases import config_of, refused
from tests.support.tiny_tokenizer import ENDOFTEXT, IM_END, save_model_folder


@pytest.mark.parametrize(
    ("contract", "student", "teachers", "ids"),
    [
        (None, {3}, [{3}], (3,)),
        (None, {3}, [], (3,)),
        ("student", {3}, [{5, 4}], (3,)),
        ("teacher", {3}, [{5, 4}], (4, 5)),
        ("teacher", {3}, [{5, 4}, {4, 5}], (4, 5)),
        ("union", {3}, [{5, 4}, {6}], (3, 4, 5, 6)),
        ("union", set(), [{4}], (4,)),
        ("teacher", {3}, [], (3,)),
    ],
)
def test_stop_ids(
    contract: str | None, student: set[int], teachers: list[set[int]], ids: tuple[int, ...]
) -> None:
    named = {f"teachers.{i}": frozenset(t) for i, t in enumerate(teachers)}
    assert agreed_stop_ids(contract, frozenset(student), named) == ids


@pytest.mark.parametrize(
    ("contract", "student", "teachers", "words"),
    [
        (None, {3}, [{3, 4}], ["[3] (student)", "[3, 4] (teachers.0)", "eos_contract=teacher"]),
        ("teacher", {3}, [{3}, {4}], ["eos_contract=union"]),
        ("student", set(), [{4}], ["no EOS id", "generation_config.json"]),
        ("teacher", {3}, [set()], ["no EOS id"]),
    ],
)
def test_stop_ids_that_nobody_settles(
    contract: str | None, student: set[int], teachers: list[set[int]], words: list[str]
) -> None:
    named = {f"teachers.{i}": frozenset(t) for i, t in enumerate(teachers)}
    refused(
        lambda: agreed_stop_ids(contract, frozenset(student), named), "data.eos_contract", *words
    )


def test_stop_ids_of_model_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """generation_config.json has them, else config.json, else the tokenizer; also by hub id."""
    import huggingface_hub.constants as constants

    student = save_model_folder(tmp_path / "student", eos=None)
    cached = tmp_path / "models--org--teacher"
    save_model_folder(cached / "snapshots" / "abc", eos=[IM_END, ENDOFTEXT])
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def ids(contract: str | None) -> tuple[int, ...]:
        settings = {"student__path": str(student), "data__eos_contract": contract}
        config = config_of(**settings, teacher__path="org/teacher")
        return stop_ids(contract, read_models(config.model_paths))

    assert ids("student") == (IM_END,), "the tokenizer's own"
    assert ids("teacher") == (ENDOFTEXT, IM_END)
    refused(lambda: ids(None), "data.eos_contract", "[258] (student)", "[256, 258] (teacher)")
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDOFTEXT}))
    assert ids("student") == (ENDOFTEXT,)
    config = config_of(student__path="org/absent")
    refused(lambda: read_models(config.model_paths), "student.path", "org/absent", "./path")
