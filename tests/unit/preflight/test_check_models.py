"""`vopd check` on models: layouts, context, vocabularies, end-of-sequence ids, damaged folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.hf.facts import ModelError
from megatron_vopd.hf.folder import read_model_folder
from tests.support.check_cases import EXPERTS, VOCABULARY, make_workplace, run_check, save_model

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_workplace(tmp_path, monkeypatch)


@pytest.fixture
def check(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(run_check, capsys)


# name, changes of the student, changes of the teacher, arguments, key, words
MODELS: list[tuple[str, dict[str, Any], dict[str, Any], list[str], str, str]] = [
    ("eos", {}, {"eos": [3, 2]}, [], "data.eos_contract", "set data.eos_contract=teacher"),
    ("eos in config", {"eos_token_id": 2}, {}, [], "data.eos_contract", "[2] (student), [3]"),
    ("no eos", {"eos_token_id": None}, {"eos_token_id": None}, [], "student.path", "eos_token_id"),
    ("architecture", {"model_type": "gpt2"}, {}, [], "student.path", "use one of ['llama'"),
    ("no size", {"hidden_size": None}, {}, [], "student.path", "hidden_size=None"),
    ("odd size", {}, {"num_attention_heads": "8"}, [], "teacher.path", "positive integer"),
    ("quantized", {}, {"quantization_config": {"bits": 4}}, [], "teacher.path", "quantization"),
    ("token ids", {}, {"tokens": {**VOCABULARY, "c": 5}}, [], "teacher.path", "'c' (student 2"),
    ("more tokens", {}, {"tokens": {**VOCABULARY, "d": 4}}, [], "teacher.path", "1 tokens that"),
    ("small table", {"vocab_size": 3}, {}, [], "student.path", "token id 3"),
    ("context", {}, {"max_position_embeddings": 1100}, [], "curriculum.ladder", "teacher, 1100"),
    ("kv heads", {"num_key_value_heads": 4}, {"num_attention_heads": 12, "num_key_value_heads": 4},
     ["teacher.tp=6", "rollout.num_prompts=60"], "teacher.tp", "num_key_value_heads=4"),
    ("experts", {}, EXPERTS, ["teacher.ep=4"], "teacher.ep", "num_experts=6"),
    ("heads", {"num_attention_heads": 3, "num_key_value_heads": 2}, {}, [], "student.path",
     "no multiple of num_key_value_heads=2"),
    ("rope", {"rope_scaling": "yarn"}, {}, [], "student.path", "rope_scaling='yarn'; expected nul"),
    ("rope type", {}, {"rope_parameters": {"rope_type": "spiral"}}, [], "teacher.path",
     "a rope_type of default, linear, dynamic, llama3"),
    ("yarn", {}, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, [], "teacher.path",
     "scales attention"),
    ("moe student", EXPERTS, {}, ["parallel.tp=2"], "parallel.tp", "sequence_parallel: true"),
    ("evaluation", {}, {}, ["data.evaluation=org/x"], "evaluation.max_tokens", "of student"),
]  # fmt: skip


class TestModels:
    @pytest.mark.parametrize(
        ("student", "teacher", "arguments", "key", "words"),
        [row[1:] for row in MODELS],
        ids=[row[0] for row in MODELS],
    )
    def test_models_that_do_not_fit(
        self,
        workplace: Path,
        check: Run,
        student: dict[str, Any],
        teacher: dict[str, Any],
        arguments: list[str],
        key: str,
        words: str,
    ) -> None:
        save_model(workplace / "student", **student)
        save_model(workplace / "teacher", **teacher)
        status, _, lines = check(*arguments)
        assert status == 2
        assert len(lines) == 2, lines
        assert lines[0].startswith(f"{key}: got ")
        assert words in lines[0]

    @pytest.mark.parametrize(
        ("student", "teacher", "arguments"),
        [
            ({}, {"eos": [3, 2]}, ["data.eos_contract=teacher"]),
            ({}, {"eos": [3]}, []),
            ({"eos": 2, "eos_token_id": 3}, {"eos_token_id": 2}, []),
            (
                EXPERTS,
                EXPERTS,
                ["parallel.tp=2", "parallel.sequence_parallel=true", "teacher.ep=2"],
            ),
            ({}, {"vocab_size": 40}, []),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1}}, {}, []),
            ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {}}, {}, []),
            ({}, {"num_attention_heads": 16, "num_key_value_heads": 2}, ["teacher.tp=8"]),
            ({"model_type": "llama"}, {"model_type": "qwen2"}, []),
            (
                {},
                {
                    "max_position_embeddings": 1024,
                    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 1024},
                },
                [],
            ),
        ],
    )
    def test_models_that_fit(
        self,
        workplace: Path,
        check: Run,
        student: dict[str, Any],
        teacher: dict[str, Any],
        arguments: list[str],
    ) -> None:
        save_model(workplace / "student", **student)
        save_model(workplace / "teacher", **teacher)
        status, out, lines = check(*arguments)
        assert (status, lines) == (0, [])
        assert "no problems found" in out

    def test_several_teachers_must_agree_on_the_end(self, workplace: Path, check: Run) -> None:
        save_model(workplace / "code", eos=2)
        arguments = [
            "teacher=null",
            "teachers={math: {path: ./teacher}, code: {path: ./code}}",
            "data.teacher_field=domain",
        ]
        status, _, lines = check(*arguments, "data.eos_contract=teacher")
        assert status == 2
        assert "set data.eos_contract=union" in lines[0]
        assert check(*arguments, "data.eos_contract=union")[0] == 0

    def test_special_tokens_that_differ_are_named(self, workplace: Path, check: Run) -> None:
        assert "special" not in check()[1]
        path = workplace / "teacher" / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["added_tokens"][0]["special"] = False
        path.write_text(json.dumps(tokenizer))
        status, out, _ = check()
        assert status == 0
        assert "teacher.path: special in one of student and teacher only: ['<end>']" in out

    @pytest.mark.parametrize("eos_token", ["<end>", {"content": "<end>"}])
    def test_the_tokenizer_names_the_end_when_no_config_does(
        self, workplace: Path, eos_token: Any
    ) -> None:
        save_model(workplace / "student", eos_token_id=None)
        assert read_model_folder(str(workplace / "student")).eos_ids == frozenset()
        path = workplace / "student" / "tokenizer_config.json"
        path.write_text(json.dumps({"eos_token": eos_token}))
        assert read_model_folder(str(workplace / "student")).eos_ids == {3}
        path.write_text(json.dumps({"eos_token": ["<end>"]}))
        assert read_model_folder(str(workplace / "student")).eos_ids == frozenset()

    def test_missing_weights_and_tokenizers_are_noted(self, workplace: Path, check: Run) -> None:
        """No mistake: a folder of facts is enough for a check. A run needs more, and refuses it."""
        words = "not in the folder, and needed by a run"
        assert f"student.path: {words}: 'model.safetensors'\n" in check()[1]
        for key in ("student", "teacher"):
            (workplace / key / "model.safetensors").touch()
        status, out, _ = check()
        assert status == 0 and words not in out
        weights = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
        index = workplace / "student" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weights}))
        (workplace / "student" / weights["a"]).touch()
        (workplace / "student" / "tokenizer.json").unlink()
        expected = f"student.path: {words}: '{weights['b']}', 'tokenizer.json'\n"
        assert expected in check()[1]
        index.write_text("no JSON")
        status, _, lines = check()
        assert status == 2 and len(lines) == 2 and "index.json: no valid JSON" in lines[0]

    def test_code_in_a_model_folder_is_named_and_not_run(self, workplace: Path, check: Run) -> None:
        save_model(workplace / "teacher", auto_map={"AutoModel": "modeling_x.X"})
        (workplace / "teacher" / "modeling_x.py").write_text("open('ran', 'w')")
        status, out, _ = check()
        assert status == 0
        assert "carries code (auto_map, modeling_x.py); it is never executed" in out
        assert not (workplace / "ran").exists()

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("config.json", b""),
            ("config.json", b"[1]"),
            ("config.json", b"[" * 100_000),
            ("config.json", b"\xff\xfe"),
            ("config.json", b'{"model_type": ["qwen3"]}'),
            ("config.json", b'{"model_type": "qwen3", "vocab_size": ' + b"9" * 5000 + b"}"),
            ("generation_config.json", b'{"eos_token_id": "x"}'),
            ("generation_config.json", b'{"eos_token_id": [true]}'),
            ("tokenizer.json", b"{}"),
            ("tokenizer.json", b'{"model": {"vocab": {"a": "0"}}}'),
            (
                "tokenizer.json",
                b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}',
            ),
            ("tokenizer_config.json", b"nonsense"),
        ],
    )
    def test_damaged_files_are_named(
        self, workplace: Path, check: Run, name: str, content: bytes
    ) -> None:
        (workplace / "student" / name).write_bytes(content)
        status, _, lines = check()
        assert status == 2
        assert len(lines) == 2, lines
        assert lines[0].startswith("student.path: got ")
        assert name in lines[0]

    def test_unigram_vocabularies_are_numbered_by_position(self, workplace: Path) -> None:
        tokenizer = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
        (workplace / "student" / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert read_model_folder("student").vocabulary == {"a": 0, "b": 1}

    def test_a_folder_without_a_model(self, workplace: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            read_model_folder(str(workplace))
