"""Conditions between settings, and between settings and the world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.config import build_config, smallest_world, world_problems
from megatron_vopd.config.notices import notices
from tests.support.config_cases import FINE, VALID, problems_of, with_values

RULES = [
    ({"rollout.temperature": 0.7}, "rollout.temperature", "allow_biased_sampling=true"),
    ({"rollout.top_p": 0.9}, "rollout.top_p", "set rollout.top_p=1"),
    ({"objective.topk": 0}, "objective.topk", "set objective.topk=100"),
    ({"objective.topk": 0, "objective.baseline": "topk_tail"}, "objective.topk", "topk_tail"),
    ({"objective.topk": 1, "objective.estimator": "topk"}, "objective.topk", "2 to 1024"),
    ({"objective.direction": "forward"}, "objective.direction", "objective.estimator=exact"),
    ({"objective.reverse_weight": 0.5}, "objective.reverse_weight", "direction=mixed"),
    ({"objective.reward_floor": 0.2}, "objective.reward_floor", "objective.baseline=none"),
    ({"objective.task_reward_weight": 1.0}, "objective.task_reward_weight", "samples_per_prompt"),
    ({"objective.estimator": "hard"}, "objective.prefix", "set objective.prefix=dataset"),
    (
        {"objective.prefix": "dataset", "curriculum.kind": "fixed"},
        "data.responses",
        "set data.responses",
    ),
    (
        {"objective.prefix": "teacher", "data.responses": "org/data"},
        "curriculum.kind",
        "set curriculum.kind=fixed",
    ),
    ({"data.train": None}, "data.train", "set data.train"),
    ({"teacher": None}, "teacher.path", "set teacher.path"),
    ({"teachers": {"m": {"path": "a/b"}}}, "teacher", "exactly one"),
    ({"teacher": None, "teachers": {"a.b": {"path": "a/b"}}}, "teachers", "letters"),
    (
        {"teacher": None, "teachers": {"m": {"path": "a/b"}, "n": {"path": "a/c"}}},
        "data.teacher_field",
        "m, n",
    ),
    ({"curriculum.ladder": [64, 32]}, "curriculum.ladder", "write [32, 64]"),
    ({"curriculum.ladder": [32, 32]}, "curriculum.ladder", "ascending"),
    (
        {"curriculum.min_entropy": 0.1, "curriculum.min_entropy_fraction": 0.5},
        "curriculum.min_entropy",
        "one of the two",
    ),
    ({"train.max_tokens_per_microbatch": 127}, "train.max_tokens_per_microbatch", ">= 128"),
    (
        {"train.max_tokens_per_microbatch": 131, "parallel.cp": 3},
        "train.max_tokens_per_microbatch",
        "set train.max_tokens_per_microbatch=132",
    ),
    ({"rollout.engine": "server"}, "rollout.urls", "set rollout.urls"),
    ({"rollout.urls": ["http://h:1"]}, "rollout.urls", "rollout.engine=server"),
    ({"rollout.engine": "server", "rollout.urls": ["h:1"]}, "rollout.urls", "http://host:port"),
    (
        {"rollout.engine": "server", "rollout.urls": ["http://127.0.0.1:1", "http://127.0.0.1:1"]},
        "rollout.urls",
        "'http://127.0.0.1:1' twice, expected each server once",
    ),
    (
        {"rollout.engine": "server", "rollout.urls": ["http://h:99999"]},
        "rollout.urls",
        "http://host:port",
    ),
    ({"rollout.max_staleness": 1}, "rollout.max_staleness", "rollout.engine=server"),
    ({"optimizer.warmup_steps": 11}, "optimizer.warmup_steps", "train.steps=10"),
    ({"optimizer.min_learning_rate": 1e-4}, "optimizer.min_learning_rate", "at most"),
    ({"evaluation.k": 9}, "evaluation.k", "evaluation.samples=8"),
    ({"parallel.backend": "te", "parallel.device": "cpu"}, "parallel.backend", "auto"),
    ({"student.path": "./absent"}, "student.path", "existing path"),
    ({"student.path": "/absent/model"}, "student.path", "existing path"),
    ({"student.path": "~/absent-model"}, "student.path", "existing path"),
    ({"student.path": "model"}, "student.path", "write ./model"),
    ({"student.path": "models/foo"}, "student.path", "write ./models/foo"),
    ({"student.path": "a/b/c"}, "student.path", "hub id org/name"),
    ({"teacher.path": "https://x.y/z"}, "teacher.path", "hub id org/name"),
    ({"data.evaluation": {"gsm8k": "./no.jsonl"}}, "data.evaluation.gsm8k", "existing path"),
    ({"student.chat_template": "chatml"}, "student.chat_template", "Jinja"),
    ({"checkpoint.resume": "latest"}, "checkpoint.resume", "auto, never"),
]


class TestRules:
    @pytest.mark.parametrize(("settings", "key", "words"), RULES)
    def test_a_violated_condition_is_one_line(
        self,
        settings: dict[str, Any],
        key: str,
        words: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        problems = problems_of(settings)
        assert len(problems) == 1, problems
        assert problems[0].startswith(f"{key}: got ")
        assert words in problems[0]

    @pytest.mark.parametrize("settings", FINE)
    def test_sound_combinations_pass(self, settings: dict[str, Any]) -> None:
        assert problems_of(settings) == []

    def test_a_forgotten_dot_slash_is_noticed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "qwen" / "small").mkdir(parents=True)
        assert problems_of({"student.path": "./qwen/small"}) == []
        for text in ("qwen/small", "qwen/smal", "qwen"):
            (problem,) = problems_of({"student.path": text})
            assert f"write ./{text}" in problem

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "model").mkdir()
        config = build_config(with_values({"student.path": "~/model"}))
        assert config.student.path == str(tmp_path / "model")

    def test_entropy_threshold_has_one_default(self) -> None:
        curriculum = build_config(VALID).curriculum
        assert (curriculum.min_entropy, curriculum.min_entropy_fraction) == (None, 0.5)
        curriculum = build_config(with_values({"curriculum.min_entropy": 0.3})).curriculum
        assert (curriculum.min_entropy, curriculum.min_entropy_fraction) == (0.3, None)

    def test_an_engine_that_shares_a_gpu_has_that_one(self) -> None:
        """Found at the start of a run only, before; on a CPU an engine may have several workers."""
        for device in ("auto", "cuda"):
            (problem,) = problems_of({"rollout.tp": 2, "parallel.device": device})
            assert problem.startswith("rollout.tp: got 2, expected 1 when an engine shares")
        assert problems_of({"rollout.tp": 2, "parallel.device": "cpu"}) == []
        served = {"rollout.engine": "server", "rollout.urls": ["http://127.0.0.1:8000"]}
        assert problems_of({"rollout.tp": 2, **served}) == []

    @pytest.mark.parametrize(
        ("settings", "world_size", "key", "words"),
        [
            ({"parallel.tp": 3, "teacher.tp": 1}, 4, "parallel.tp", "one of [1, 2, 4]"),
            ({"teacher.tp": 3}, 4, "teacher.tp", "one of [1, 2, 4]"),
            ({"parallel.ep": 3}, 4, "parallel.ep", "one of [1, 2, 4]"),
            ({"teacher.ep": 3, "teacher.tp": 1}, 2, "teacher.ep", "one of [1, 2]"),
            ({"rollout.num_prompts": 6}, 4, "rollout.num_prompts", "set rollout.num_prompts=8"),
            ({}, 0, "world size", "1 to"),
            ({}, 2**21, "world size", "1 to"),
        ],
    )
    def test_world_conditions(
        self, settings: dict[str, Any], world_size: int, key: str, words: str
    ) -> None:
        (problem,) = world_problems(build_config(with_values(settings)), world_size)
        assert str(problem).startswith(f"{key}: got ")
        assert words in str(problem)

    def test_smallest_world_holds_every_layout(self) -> None:
        config = build_config(with_values({"parallel.pp": 3, "teacher.ep": 4}))
        assert smallest_world(config) == 12
        assert not [p for p in world_problems(config, 12) if p.key != "rollout.num_prompts"]

    def test_settings_without_effect_are_noticed(self) -> None:
        settings = {"objective.estimator": "exact", "curriculum.kind": "fixed"}
        config = build_config(with_values(settings))
        assert [n.key for n in notices(config)] == ["objective.baseline", "curriculum.interval"]
        assert notices(build_config(VALID)) == []
