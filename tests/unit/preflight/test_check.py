"""`vopd check`: what it prints, what it refuses, and how it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.cli import main
from megatron_vopd.data import prompts
from megatron_vopd.preflight.show import MAX_RANKS_SHOWN
from tests.support import ROOT
from tests.support.check_cases import EXPERTS, GOOD, make_workplace, run_check, save_model

EXAMPLES = sorted((ROOT / "examples").glob("*/config.yaml"))

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_workplace(tmp_path, monkeypatch)


@pytest.fixture
def check(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(run_check, capsys)


# name, edit of the file's text, further arguments, key, what a newcomer can act on
CARELESS: list[tuple[str, tuple[str, str], list[str], str, str]] = [
    ("typo", ("baseline:", "basline:"), [], "objective.basline", "did you mean objective.baseline"),
    ("typo in a section", ("optimizer:", "optimiser:"), [], "optimiser", "did you mean optimizer?"),
    ("wrong section", ("dtype:", "topk: 3, dtype:"), [], "student.topk", "objective.topk"),
    ("tab", ("student: {", "student:\n\tpath: {"), [], "config.yaml:2", "spaces, never with tabs"),
    ("duplicate key", ("parallel:", "student:"), [], "config.yaml:3", "remove one of the two"),
    ("open bracket", ("128]}", "128"), [], "config.yaml:6", "quotes, brackets"),
    ("quoted number", ("1e-6", "'1e-6'"), [], "optimizer.learning_rate", "remove the quotes"),
    ("text for a number", ("1e-6", "small"), [], "optimizer.learning_rate", "number > 0"),
    ("number out of range", ("topk: 16", "topk: 5000"), [], "objective.topk", "<= 1024"),
    ("wrong choice", ("fp32", "fp8"), [], "student.dtype", "one of bf16, fp32"),
    ("top-k without k", ("topk: 16", "topk: 0"), [], "objective.topk", "set objective.topk=100"),
    ("temperature", ("", ""), ["rollout.temperature=0.7"], "rollout.temperature", "temperature=1"),
    ("falling ladder", ("[64, 128]", "[128, 64]"), [], "curriculum.ladder", "write [64, 128]"),
    ("two teachers", ("", ""), ["teachers.m.path=org/m"], "teacher", "remove one section"),
    ("no teacher", ("", ""), ["teacher=null"], "teacher.path", "set teacher.path"),
    ("absent path", ("./teacher", "./teachr"), [], "teacher.path", "check the spelling"),
    ("no ./", ("./student", "student"), [], "student.path", "write ./student"),
    ("no ./ in folder", ("./student", "models/foo"), [], "student.path", "write ./models/foo"),
    ("world", ("tp: 1", "tp: 3"), ["--world-size", "4"], "parallel.tp", "one of [1, 2, 4]"),
    ("heads", ("tp: 1", "tp: 3"), ["--world-size", "6"], "parallel.tp", "num_attention_heads=8"),
    ("layers", ("", ""), ["parallel.pp=3"], "parallel.pp", "one of [1, 2, 4]"),
    ("dense experts", ("", ""), ["parallel.ep=2"], "parallel.ep", "use ep=1"),
    (
        "engine",
        ("", ""),
        ["rollout.tp=16", "parallel.device=cpu", "--world-size", "16"],
        "rollout.tp",
        "divisor of the st",
    ),
    ("too long", ("", ""), ["data.max_prompt_tokens=4000"], "curriculum.ladder", "4096"),
    ("no folder", ("", ""), ["run.dir=./config.yaml"], "run.dir", "/config.yaml' is no folder"),
    ("data", ("org/prompts", "./config.yaml"), [], "data.train", "convert it to .jsonl"),
    ("shared GPU", ("", ""), ["rollout.tp=2"], "rollout.tp", "rollout.engine=server"),
    ("warm-up", ("", ""), ["optimizer.warmup_steps=2000"], "optimizer.warmup_steps", "raise train"),
    ("override", ("", ""), ["train.step=4"], "train.step", "did you mean train.steps?"),
    ("no value", ("", ""), ["train.steps"], "'train.steps'", "section.key=value"),
    ("indivisible", ("", ""), ["--world-size", "48"], "rollout.num_prompts", "num_prompts=96"),
    ("no ranks", ("", ""), ["--world-size", "0"], "world size", "1 to"),
]


class TestCareless:
    @pytest.mark.parametrize(
        ("edit", "arguments", "key", "words"),
        [row[1:] for row in CARELESS],
        ids=[r[0] for r in CARELESS],
    )
    def test_one_line_to_act_on(
        self,
        workplace: Path,
        check: Run,
        edit: tuple[str, str],
        arguments: list[str],
        key: str,
        words: str,
    ) -> None:
        (workplace / "config.yaml").write_text(GOOD.replace(*edit, 1))
        status, _, lines = check(*arguments)
        assert status == 2
        about = [line for line in lines if line.startswith(f"{key}: got ")]
        assert any(words in line and "; " in line for line in about), lines
        assert lines[-1].endswith("found")
        assert len(about) == len(lines) - 1, lines

    def test_missing_file(self, check: Run) -> None:
        status, _, lines = check(config="confg.yaml")
        assert status == 2
        assert lines[0].startswith("confg.yaml: got no such file")
        assert "check the path" in lines[0]

    def test_every_problem_is_listed(self, check: Run) -> None:
        settings = ("rollout.tp=3", "parallel.device=cpu", "teacher.pp=4")
        status, out, lines = check(*settings, "--world-size", "8")
        assert status == 2
        assert {line.split(":")[0] for line in lines[:-1]} == {"rollout.tp", "teacher.pp"}
        assert lines[-1] == f"{len(lines) - 1} problems found"
        assert "teacher: tp 2 x pp 4 x dp 1" in out


GOOD_ARGUMENTS: list[tuple[str, ...]] = [
    (),
    ("--world-size", "8"),
    ("optimizer.learning_rate=5e-7", "--world-size", "4", "parallel.tp=2"),
    ("parallel.tp=4", "parallel.pp=2"),
    ("rollout.temperature=0.7", "objective.allow_biased_sampling=true"),
    ("objective.prefix={student: 0.5, dataset: 0.5}", "data.responses=org/responses"),
    ("data.evaluation={math: org/math}", "evaluation.max_tokens=2048"),
]


class TestOutput:
    @pytest.mark.parametrize("arguments", GOOD_ARGUMENTS, ids=" ".join)
    def test_sound_configurations_exit_0(self, check: Run, arguments: tuple[str, ...]) -> None:
        status, out, lines = check(*arguments)
        assert (status, lines) == (0, [])
        assert "no problems found" in out

    def test_overrides_may_follow_options(self, check: Run) -> None:
        _, out, _ = check("train.steps=7", "--world-size", "4", "parallel.tp=4")
        assert "steps=7" in out
        assert "student: tp 4 x pp 1 x dp 1" in out

    def test_rank_map_has_both_layouts(self, check: Run) -> None:
        _, out, _ = check("parallel.pp=2", "teacher.tp=4", "--world-size", "4")
        lines = out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("rank"))
        header = "rank student tp student pp student dp teacher tp teacher pp teacher dp"
        assert " ".join(lines[start].split()) == header
        assert [line.split() for line in lines[start + 1 : start + 5]] == [
            ["0", "0", "0", "0", "0", "0", "0"],
            ["1", "0", "0", "1", "1", "0", "0"],
            ["2", "0", "1", "0", "2", "0", "0"],
            ["3", "0", "1", "1", "3", "0", "0"],
        ]

    def test_gpus_that_do_not_sample_are_counted(self, check: Run) -> None:
        """A local engine is on one GPU of a replica; the others wait while it samples."""
        said = "note: rollout.engine: on GPUs 2 of 8 sample, one for each replica of the student"
        assert said in check("parallel.tp=4", "--world-size", "8")[1]
        served = ("rollout.engine=server", "rollout.urls=[http://127.0.0.1:8000]")
        quiet = [("parallel.device=cpu",), served, ("parallel.tp=1",)]
        for settings in quiet:
            out = check("parallel.tp=4", "--world-size", "8", *settings)[1]
            assert "sample, one" not in out, settings

    def test_servers_get_what_the_run_needs(self, check: Run) -> None:
        served = ("rollout.engine=server", "rollout.urls=[http://127.0.0.1:8000]")
        said = "servers: each needs --max-model-len 1152 and --dtype bfloat16; `vopd server-comm"
        assert said in check(*served)[1]
        assert "servers:" not in check()[1]

    def test_a_run_folder_that_cannot_be_written(
        self, check: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Root may write everywhere, so the answer of the system is a stand-in here."""
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        status, _, lines = check("run.dir=./runs")
        assert status == 2 and len(lines) == 2
        assert lines[0].startswith("run.dir: got './runs/vopd', where '/")
        assert "is not writable, expected a folder that can be written; choose another" in lines[0]

    def test_the_beginning_of_the_prompts_is_read(self, workplace: Path, check: Run) -> None:
        path = workplace / "train.jsonl"
        path.write_text('{"prompt": "a"}\n' * 5)
        assert check("data.train=./train.jsonl")[0] == 0
        status, _, lines = check("data.train=./train.jsonl", "data.prompt_field=question")
        assert status == 2 and lines[0].startswith("train.jsonl:1 question: got"), lines
        path.write_text('{"prompt": "a"}\n' * prompts.FIRST_RECORDS + "torn")
        assert check("data.train=./train.jsonl")[0] == 0, "a data set may have millions"
        path.write_text("torn")
        assert check("data.train=./train.jsonl")[0] == 2

    def test_expert_and_context_axes_appear_when_used(self, workplace: Path, check: Run) -> None:
        save_model(workplace / "teacher", **EXPERTS)
        _, out, _ = check("teacher.ep=2", "parallel.cp=2")
        assert "student cp" in out
        assert "teacher ep" in out
        assert "student ep" not in out

    def test_long_rank_maps_are_cut(self, check: Run) -> None:
        _, out, _ = check("--world-size", "1024", "rollout.num_prompts=1024")
        assert f"... and {1024 - MAX_RANKS_SHOWN} more ranks" in out
        assert len(out.splitlines()) < 120

    def test_world_size_comes_from_option_then_environment_then_layouts(
        self, check: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "2 ranks (the fewest that the layouts need)" in check()[1]
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert "4 ranks (WORLD_SIZE)" in check()[1]
        assert "8 ranks (--world-size)" in check("--world-size", "8")[1]
        monkeypatch.setenv("WORLD_SIZE", "four")
        status, _, lines = check()
        assert status == 2
        assert lines[0].startswith("WORLD_SIZE: got 'four'")

    def test_resolved_values_are_shown_by_section(self, check: Run) -> None:
        _, out, _ = check("train.steps=12")
        (line,) = [line for line in out.splitlines() if line.startswith("train ")]
        assert "steps=12" in line
        assert "spike_factor=10.0" in line

    def test_markup_in_user_text_is_printed_as_it_is(self, check: Run) -> None:
        text = "[red]field[/red] :smile: [/]"
        status, out, _ = check(f"data.prompt_field='{text}'")
        assert status == 0
        assert f'prompt_field="{text}"' in out

    def test_hub_ids_are_listed_as_not_checked(self, check: Run) -> None:
        status, out, _ = check("teacher.path=org/teacher")
        assert status == 0
        assert "note: teacher.path: not checked: hub id org/teacher" in out

    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
    def test_examples_are_clean(self, check: Run, path: Path) -> None:
        for world_size in ([], ["--world-size", "64"]):
            status, out, lines = check(*world_size, config=str(path))
            assert (status, lines) == (0, [])
            assert out.count("note:") == out.count("not checked: hub id")

    def test_there_is_an_example(self) -> None:
        assert EXAMPLES

    def test_wrong_options_show_usage(self, workplace: Path, capsys: Any) -> None:
        for arguments in (["check"], ["check", "config.yaml", "--wrold-size=2"], ["chek"]):
            with pytest.raises(SystemExit) as caught:
                main(arguments)
            assert caught.value.code == 2
            assert "usage: vopd" in capsys.readouterr().err

    def test_help_teaches(self, capsys: Any) -> None:
        assert main([]) == 2
        for arguments in (["--help"], ["check", "--help"]):
            with pytest.raises(SystemExit):
                main(arguments)
        out = capsys.readouterr().out
        assert "vopd check CONFIG" in out
        assert "vopd check config.yaml objective.baseline=topk objective.topk=100" in out

    def test_table_of_settings(self, capsys: Any) -> None:
        assert main(["config-table"]) == 0
        assert "| `rollout.temperature` | number > 0" in capsys.readouterr().out


def run_process(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": str(ROOT), "COLUMNS": "40"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


class TestProcess:
    def test_narrow_pipes_do_not_wrap_problems(self, workplace: Path) -> None:
        run = run_process(
            workplace, "-m", "megatron_vopd.cli", "check", "config.yaml", "train.step=3"
        )
        assert run.returncode == 2
        assert len(run.stderr.splitlines()) == 2
        assert run.stderr.startswith("train.step: got an unknown key")

    def test_ascii_terminals_get_any_text(self, workplace: Path) -> None:
        run = run_process(
            workplace,
            *("-m", "megatron_vopd.cli", "check", "config.yaml", "data.prompt_field=\u00e9\u4e2d"),
            PYTHONIOENCODING="ascii",
        )
        assert run.returncode == 0, run.stderr
        assert "no problems found" in run.stdout

    def test_checking_imports_nothing_heavy(self, workplace: Path) -> None:
        heavy = "{'torch', 'megatron', 'vllm', 'transformers', 'numpy'}"
        code = (
            "import sys; from megatron_vopd.cli import main; "
            f"status = main(['check', 'config.yaml']); assert not {heavy} & set(sys.modules); "
            "sys.exit(status)"
        )
        run = run_process(workplace, "-c", code)
        assert run.returncode == 0, run.stderr
