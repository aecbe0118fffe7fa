"""Configuration files: strict reading, ranges, and mistakes that explain themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vopd.config import (
    Config,
    ConfigError,
    build_config,
    config_table_markdown,
    load_config,
    resolved_yaml,
)
from megatron_vopd.config.schema import section_models
from megatron_vopd.config.yaml_io import (
    MAX_ALIASES,
    MAX_BYTES,
    MAX_DEPTH,
    apply_overrides,
    parse_yaml,
    plain_scalar,
    read_mapping,
)
from tests.support import ROOT
from tests.support.config_cases import FINE, VALID, problems_of, refusal, with_values, write

EXAMPLES = ROOT / "examples"


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-6", 1e-6),
            ("1E+3", 1000.0),
            ("-.5", -0.5),
            ("2.", 2.0),
            ("0x10", 16),
            ("0o17", 15),
            ("0777", 777),
            ("-12", -12),
            ("true", True),
            ("False", False),
            ("yes", "yes"),
            ("on", "on"),
            ("~", None),
            ("", None),
            ("2026-01-01", "2026-01-01"),
            ("12:30:45", "12:30:45"),
            ("1_000", "1_000"),
            ("<<", "<<"),
            (".inf", float("inf")),
            ("9" * 5000, "9" * 5000),
        ],
    )
    def test_plain_scalars_follow_yaml_1_2(self, text: str, value: object) -> None:
        parsed = plain_scalar(text)
        assert parsed == value
        assert type(parsed) is type(value)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("student:\n  path: a/b\n  path: c/d\n", [":3", "'path' a second time", "line 2"]),
            ("a: 1\nb: 2\na: 3\n", [":3", "'a' a second time"]),
            ("student:\n\tpath: a/b\n", [":2", "a tab", "spaces"]),
            ("student: !!python/object/apply:os.getcwd []\n", [":1", "tag", "remove the tag"]),
            ("student: !local {path: a/b}\n", [":1", "tag"]),
            ("a: &x {b: *x}\n", ["alias *x", "write the value out"]),
            ("a: *missing\n", ["alias *missing"]),
            ("a: &x 1\nb:\n  *x : 2\n", [":3", "the key 1"]),
            ("b: &x a\na: 1\n*x : 2\n", [":3", "'a' a second time", "line 2"]),
            ("a: 1\na: 2\nb: [\n", [":2", "'a' a second time"]),
            ("1: x\n", [":1", "the key 1", "a word as key"]),
            ("? [a, b]\n: x\n", ["a word as key"]),
            ("null: x\n", ["the key None"]),
            ("a: {b: [1, 2\n", ["quotes, brackets"]),
            ("a: b: c\n", [":1", "mapping values are not allowed"]),
            ("a: 1\n---\nb: 2\n", [":2", "second document"]),
            ("a: \x00\n", ["does not allow", "UTF-8"]),
            (b"\xff\xfe\x00binary", ["not UTF-8 at offset 0"]),
            ("", ["an empty file", "student:"]),
            ("# only a comment\n", ["an empty file"]),
            ("- a\n- b\n", ["['a', 'b']", "sections with keys"]),
            ("just text\n", ["'just text'", "sections with keys"]),
            ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), ["nesting deeper than 8"]),
            ("a: " + "[" * 50_000, ["nesting deeper than 8"]),
            ("a: &x 1\nb: [" + "*x, " * (MAX_ALIASES + 1) + "]", ["more than 32 aliases"]),
            ("a: [" + "1, " * 10_001 + "]", ["more than 10000 values"]),
            ("#" * (MAX_BYTES + 1), ["more than 256 KiB"]),
        ],
    )
    def test_what_is_refused_says_where_and_why(
        self, tmp_path: Path, text: str | bytes, words: list[str]
    ) -> None:
        message = refusal(tmp_path, text)
        assert "\n" not in message
        assert all(word in message for word in words), message

    def test_aliases_cannot_multiply(self, tmp_path: Path) -> None:
        lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 7)}]" for i in range(1, 5)]
        assert "more than 10000 values" in refusal(tmp_path, "\n".join(lines))

    def test_few_aliases_are_fine(self) -> None:
        assert parse_yaml("a: &x [1, 2]\nb: *x\n", "f") == {"a": [1, 2], "b": [1, 2]}
        assert parse_yaml("a: &x 1\nb: &x [*x]\nc: *x\n", "f") == {"a": 1, "b": [1], "c": [1]}

    def test_an_override_changes_one_of_two_aliased_sections(self, tmp_path: Path) -> None:
        path = write(tmp_path, "student: {path: a/s}\nteachers: {m: &t {path: a/t}, n: *t}\n")
        data, problems = apply_overrides(read_mapping(path), ["teachers.n.path=a/u"])
        assert problems == []
        assert data["teachers"] == {"m": {"path": "a/t"}, "n": {"path": "a/u"}}

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        for path, words in [
            (tmp_path / "absent.yaml", "no such file"),
            (tmp_path, "a folder"),
            (tmp_path / ("x" * 5000), "no such file"),
            (tmp_path / "nul\0", "no such file"),
        ]:
            with pytest.raises(ConfigError, match=words):
                load_config(path)


class TestValues:
    @pytest.mark.parametrize(
        ("settings", "key", "words"),
        [
            ({"train.steps": "10"}, "train.steps", "expected integer >= 1; remove the quotes"),
            ({"train.steps": 1.5}, "train.steps", "got 1.5, expected integer >= 1"),
            ({"train.steps": True}, "train.steps", "got True, expected integer"),
            ({"train.steps": 0}, "train.steps", "for the default 1000"),
            ({"train.steps": 2**40}, "train.steps", "expected at most 2147483647"),
            ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate", "got nan"),
            ({"optimizer.learning_rate": float("inf")}, "optimizer.learning_rate", "got inf"),
            ({"optimizer.learning_rate": -1e-6}, "optimizer.learning_rate", "number > 0"),
            ({"optimizer.distributed": "yes"}, "optimizer.distributed", "true or false"),
            ({"objective.topk": 1025}, "objective.topk", "<= 1024"),
            ({"objective.baseline": "best"}, "objective.baseline", "one of none, full, topk"),
            ({"objective.baseline": "\u00e9\u4e2d"}, "objective.baseline", r"got '\xe9\u4e2d',"),
            ({"objective.reward_floor": -2.0}, "objective.reward_floor", "number > 0 and < 1"),
            ({"rollout.top_p": 0.0}, "rollout.top_p", "> 0 and <= 1"),
            ({"rollout.max_staleness": 2}, "rollout.max_staleness", "<= 1"),
            ({"curriculum.ladder": []}, "curriculum.ladder", "non-empty list"),
            ({"curriculum.ladder": [32, "64"]}, "curriculum.ladder", "got '64'"),
            ({"curriculum.ladder": 64}, "curriculum.ladder", "list, each integer"),
            ({"checkpoint.keep": 1}, "checkpoint.keep", ">= 2"),
            ({"run.name": "a/b"}, "run.name", "run.dir"),
            ({"run.name": ""}, "run.name", "not blank"),
            ({"student.path": "a\x1b[31m/b"}, "student.path", "printable"),
            ({"student.path": None}, "student.path", "got None, expected text"),
            ({"student": {}}, "student.path", "got nothing, expected text; add it"),
            ({"student": 3}, "student", "expected a section with keys"),
            ({"teachers": [1], "teacher": None}, "teachers", "a section with keys"),
            ({"teacher": None, "teachers": {"m": 3}}, "teachers.m", "a section with keys"),
            ({"objective.prefix": "web"}, "objective.prefix", "student, teacher, dataset"),
            ({"objective.prefix": {"web": 1.0}}, "objective.prefix", "for example {student"),
            ({"objective.prefix": {"student": 0.5}}, "objective.prefix", "sum to 1, not 0.5"),
            ({"objective.prefix": {"student": "1"}}, "objective.prefix", "above 0 and at most 1"),
            ({"objective.prefix": []}, "objective.prefix", "a mapping"),
            ({"data.evaluation": 3}, "data.evaluation", "a mapping of task names"),
        ],
    )
    def test_one_line_with_key_expectation_and_remedy(
        self, settings: dict[str, Any], key: str, words: str
    ) -> None:
        problems = problems_of(settings)
        assert len(problems) == 1, problems
        assert problems[0].startswith(f"{key}: got ")
        assert words in problems[0]
        assert "; " in problems[0]
        assert "\n" not in problems[0]

    @pytest.mark.parametrize(
        ("key", "suggestion"),
        [
            ("optimizer.learnig_rate", "optimizer.learning_rate"),
            ("optimiser", "optimizer"),
            ("learning_rate", "optimizer.learning_rate"),
            ("train.temperature", "rollout.temperature or evaluation.temperature"),
            ("student.tp", "teacher.tp or parallel.tp or rollout.tp"),
            ("teacher.dtyp", "teacher.dtype"),
            ("seeed", "run.seed"),
        ],
    )
    def test_unknown_keys_get_a_suggestion(self, key: str, suggestion: str) -> None:
        (problem,) = problems_of({key: 1})
        assert problem.startswith(f"{key}: got an unknown key")
        assert f"did you mean {suggestion}?" in problem

    def test_all_problems_are_reported_and_none_that_follow_from_another(self) -> None:
        problems = problems_of(
            {
                "train.steps": "x",
                "optimizer.warmup_steps": 5000,
                "objective.topk": 4096,
                "rollout.temperature": 0.7,
                "curriculum.ladder": [64, 32],
                "nonsense.qqqqqqqq": 1,
            }
        )
        keys = [problem.split(":")[0] for problem in problems]
        assert sorted(keys) == [
            "curriculum.ladder",
            "nonsense",
            "objective.topk",
            "rollout.temperature",
            "train.steps",
        ]

    def test_a_built_config_cannot_be_changed(self) -> None:
        config = build_config(VALID)
        with pytest.raises(ValueError, match="frozen"):
            setattr(config.train, "steps", 3)  # noqa: B010 - a plain assignment is a type error


class TestOverrides:
    def test_values_follow_the_rules_of_the_file(self, tmp_path: Path) -> None:
        config = load_config(
            write(tmp_path, yaml.safe_dump(VALID)),
            [
                "optimizer.learning_rate=1e-6",
                "curriculum.ladder=[8, 16]",
                "objective.prefix={student: 0.5, dataset: 0.5}",
                "data.responses=org/data",
                "teacher=null",
                "teachers.math.path=org/math",
                "teachers.math.tp=4",
                "logging.wandb=true",
                "run.name='7'",
                "train.steps=3",
                "train.steps=4",
            ],
        )
        assert config.optimizer.learning_rate == 1e-6
        assert config.curriculum.ladder == (8, 16)
        assert config.objective.prefix_fractions == {"student": 0.5, "dataset": 0.5}
        assert config.named_teachers["teachers.math"].tp == 4
        assert config.logging.wandb is True
        assert config.run.name == "7"
        assert config.train.steps == 4

    def test_a_section_without_keys_takes_overrides(self, tmp_path: Path) -> None:
        path = write(tmp_path, yaml.safe_dump(VALID) + "parallel:\n")
        assert load_config(path).parallel.tp == 1
        assert load_config(path, ["parallel.tp=2"]).parallel.tp == 2

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("train.step=3", "train.step: got an unknown key, expected one of steps"),
            ("train.step=3", "did you mean train.steps?"),
            ("learning_rate=3", "did you mean optimizer.learning_rate?"),
            ("train.steps", "'train.steps': got no setting, expected section.key=value"),
            ("=3", "expected section.key=value"),
            ("train..steps=3", "expected section.key=value"),
            ("train.steps=", "train.steps: got None, expected integer"),
            ("train.steps=[1", "train.steps: got "),
            ("run.name=*x", "run.name: got the alias *x"),
            ("run.name=!!python/name:os.system", "run.name: got the tag"),
            ("run.name.first=x", "run.name.first: got a key below run.name"),
            ("a.b.c.d.e.f.g.h.i=1", "too many parts"),
            ("train.steps=1\n---\n2", "a second document"),
        ],
    )
    def test_mistakes_name_the_override(self, tmp_path: Path, override: str, words: str) -> None:
        message = refusal(tmp_path, yaml.safe_dump(VALID), override)
        assert words in message
        assert "\n" not in message

    def test_every_bad_override_is_reported(self, tmp_path: Path) -> None:
        message = refusal(tmp_path, yaml.safe_dump(VALID), "x", "train.steps=[", "train.steps=0")
        assert [line.split(":")[0] for line in message.split("\n")] == [
            "'x'",
            "train.steps",
            "train.steps",
        ]


class TestText:
    def test_resolved_file_reads_back_equal(self, tmp_path: Path) -> None:
        awkward = {"run.name": "1e-6", "data.prompt_field": 'null: "\u00e9 # \U0001f600'}
        for settings in ({}, awkward, *FINE):
            config = build_config(with_values(settings))
            text = resolved_yaml(config)
            assert load_config(write(tmp_path, text)) == config

    def test_table_has_every_setting_once_with_a_meaning(self) -> None:
        rows = config_table_markdown().splitlines()[2:]
        names = [f"`{s}.{k}`" for s, m in section_models().items() for k in m.model_fields]
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows[:-1]] == names
        for row in rows:
            cells = row.strip("| ").split(" | ")
            assert len(cells) == 4 and all(cell.strip() for cell in cells), row

    def test_sections_are_those_of_the_design(self) -> None:
        assert " ".join(Config.model_fields) == (
            "run student teacher teachers parallel objective rollout curriculum data train "
            "optimizer checkpoint evaluation logging"
        )

    @pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/config.yaml")), ids=str)
    def test_examples_load(self, path: Path) -> None:
        assert load_config(path).train.steps > 0
