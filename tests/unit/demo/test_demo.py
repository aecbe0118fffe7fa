"""The demo's data, models, folder, table and verdict; a short demo itself is a slow test."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vopd import cli
from megatron_vopd.config import load_config
from megatron_vopd.data.answers import is_same_text
from megatron_vopd.demo import demo, stages
from megatron_vopd.demo.additions import (
    ALPHABET,
    Addition,
    additions,
    longest_prompt_tokens,
    longest_response_tokens,
    save_data,
)
from megatron_vopd.demo.demo import DemoSettings, run_demo
from megatron_vopd.demo.models import save_model, share_right
from megatron_vopd.demo.report import Results, save_plot, smoothed, table
from megatron_vopd.demo.stages import Stage, StageError, run_stage, thinned
from megatron_vopd.errors import UserError
from megatron_vopd.run import launch
from megatron_vopd.run.folder import hf_dir
from megatron_vopd.run.launch import ONE_MACHINE, Launch


class TestData:
    def test_columns_are_worked_out_and_end_with_the_sum(self) -> None:
        worked = Addition(957, 68 + 100)
        assert worked.prompt == "957+168="
        assert worked.response == "7+8+0=15\n5+6+1=12\n9+1+1=11\n1125"
        assert is_same_text(worked.answer, worked.response)
        assert not is_same_text(worked.answer, worked.response[:-1])

    @pytest.mark.parametrize("digits", [1, 3, 12])
    def test_every_column_adds_up(self, digits: int) -> None:
        for problem in additions(40, digits, seed=3):
            *columns, answer = problem.response.split("\n")
            assert int(answer) == problem.left + problem.right and len(columns) == digits
            carry = 0
            for i, column in enumerate(columns):
                numbers = re.fullmatch(r"(\d)\+(\d)\+([01])=(\d\d)", column)
                assert numbers is not None
                a, b, given, total = map(int, numbers.groups())
                assert (a, b) == (int(str(problem.left)[-1 - i]), int(str(problem.right)[-1 - i]))
                assert given == carry and total == a + b + carry
                carry = total // 10
            assert len(problem.response) + 1 <= longest_response_tokens(digits)
            assert len(problem.prompt) == longest_prompt_tokens(digits)
            assert set(problem.prompt + problem.response) <= set(ALPHABET)
        nines = 10**digits - 1
        assert len(Addition(nines, nines).response) + 1 == longest_response_tokens(digits)

    def test_held_out_problems_are_not_trained_on(self, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            save_data(tmp_path / folder, 4000, 500, digits=2, seed=1)
        save_data(tmp_path / "c", 4000, 500, digits=2, seed=2)
        texts = {
            (folder, name): (tmp_path / folder / name).read_text()
            for folder in ("a", "b", "c")
            for name in ("train.jsonl", "evaluation.jsonl")
        }
        found = {}
        for key, text in texts.items():
            found[key] = {json.loads(line)["prompt"] for line in text.splitlines()}
        train, held_out = found["a", "train.jsonl"], found["a", "evaluation.jsonl"]
        assert len(train) == 4000 and len(held_out) == 500 and not train & held_out
        assert texts["a", "train.jsonl"] == texts["b", "train.jsonl"] != texts["c", "train.jsonl"]
        assert "response" not in json.loads(texts["a", "evaluation.jsonl"].splitlines()[0])

    @pytest.mark.parametrize(("number", "digits"), [(82, 1), (0, 3), (1, 0), (1, 101)])
    def test_what_there_is_not(self, number: int, digits: int) -> None:
        with pytest.raises(UserError, match="digits"):
            additions(number, digits, 0)


def test_models_know_every_character_and_their_end(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    number = save_model(tmp_path / "a", ALPHABET, 0, 32, 2, 64)
    save_model(tmp_path / "b", ALPHABET, 0, 32, 2, 64)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = Addition(357, 468).prompt + Addition(357, 468).response
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert number == sum(p.numel() for p in model.parameters())
    ends = {tokenizer.eos_token_id, model.config.eos_token_id}
    assert ends == {model.generation_config.eos_token_id} and ends.isdisjoint(ids)


def test_share_right_counts_greedy_answers(tmp_path: Path) -> None:
    """A model with random weights has none right; with its own answers as the reference, all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(tmp_path, ALPHABET, 0, 64, 1, 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    problems: list[Any] = list(additions(20, 1, 0))
    assert share_right(tmp_path, problems, 4) == 0
    for i, problem in enumerate(problems[:5]):
        ids = tokenizer(problem.prompt, return_tensors="pt").input_ids
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        text = tokenizer.decode(ids[0, 4:], skip_special_tokens=True)
        problems[i] = SimpleNamespace(prompt=problem.prompt, answer=text.rpartition("\n")[2])
    assert share_right(tmp_path, problems, 4) == 0.25


@pytest.mark.parametrize(
    ("shares", "expected"), [((0.0, 0.2, 0.9), 80), ((0.0, 0.1, 0.1), 120), ((0.5, 0.6, 0.7), 40)]
)
def test_distillation_starts_at_the_first_export_with_a_part_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, ...], expected: int
) -> None:
    settings = DemoSettings(tmp_path, num_training=50, num_evaluation=5)
    stage = Stage(Launch(tmp_path / "start.yaml", (), 1, tmp_path / "start"), 120)
    for step in (40, 80, 120):
        folder = tmp_path / "start" / "hf" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(step))
    left = iter(shares)
    monkeypatch.setattr(demo, "share_right", lambda *_: next(left))
    (tmp_path / "models").mkdir()
    demo._choose_start(settings, stage)
    assert (tmp_path / "models" / "start" / "weights").read_text() == str(expected)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["start"]


def test_every_stage_is_a_configuration_that_holds(tmp_path: Path) -> None:
    settings = DemoSettings(tmp_path, num_training=50, num_evaluation=5, digits=4, compare=True)
    demo._save_inputs(settings)
    made = demo._stages(settings)
    made["teacher"].export.parent.mkdir(parents=True)
    made["teacher"].export.symlink_to(tmp_path / "models" / "teacher")
    (tmp_path / "models" / "start").symlink_to(tmp_path / "models" / "student")
    assert list(made) == ["teacher", "start", "vopd", "opd"]
    configs = {name: load_config(*_split(stage)) for name, stage in made.items()}
    for name, config in configs.items():
        assert config.run.name == name and config.max_response_tokens == 36 + 5 + 1 + 2
        assert config.train.steps == made[name].steps > 100
        assert made[name].launch.environment == ONE_MACHINE, "whatever the shell has"
    short = demo._stages(DemoSettings(tmp_path, teacher_steps=2))["teacher"]
    assert load_config(*_split(short)).train.steps == 2, "no more steps of warm-up than steps"
    vopd, opd = configs["vopd"], configs["opd"]
    assert (vopd.objective.baseline, opd.objective.baseline) == ("full", "none")
    changes = {"run": vopd.run, "objective": vopd.objective}
    assert opd.model_copy(update=changes) == vopd, "the two differ by the baseline alone"


def _split(stage: Stage) -> tuple[str, list[str]]:
    path, *overrides = stage.launch.arguments
    return path, overrides


def test_steps_are_thinned_out_and_nothing_else() -> None:
    steps = [f"step {i}/60  kl 0.1\n" for i in range(1, 61)]
    lines = ["student: loading\n", *steps, "saved: x\n"]
    kept = list(thinned(lines, every=25))
    assert [line for line in kept if line not in steps] == [lines[0], lines[-1]]
    assert [line.split()[1] for line in kept if line in steps] == [
        "1/60",
        "25/60",
        "50/60",
        "60/60",
    ]


class TestStage:
    """A stage over a stand-in for the launcher; what the launcher starts is tested elsewhere."""

    def _stage(self, tmp_path: Path) -> Stage:
        return Stage(Launch(tmp_path / "x.yaml", (), 1, tmp_path / "run"), 3)

    def _launch(self, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
        monkeypatch.setattr(launch, "TORCHRUN", (sys.executable, "-c", code))

    def test_status_0_without_a_result_is_no_success(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._launch(monkeypatch, "print('hello')")
        with pytest.raises(StageError, match="status 0 before its last step"):
            run_stage(self._stage(tmp_path))

    @pytest.mark.parametrize(
        ("status", "is_done"),
        [
            ({"reason": "done", "step": 3}, True),
            ({"reason": "done", "step": 2}, False),
            ({"reason": "preempted", "step": 3}, False),
            ("torn", False),
        ],
    )
    def test_done(self, tmp_path: Path, status: Any, is_done: bool) -> None:
        stage = self._stage(tmp_path)
        stage.run_dir.mkdir()
        (stage.run_dir / "status.json").write_text(json.dumps(status))
        assert not stage.is_done(), "there is no export"
        stage.export.mkdir(parents=True)
        assert stage.is_done() == is_done

    def test_interrupted_ends_the_launcher(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self._launch(monkeypatch, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
        lines = iter([])

        def interrupted(out: Any) -> Any:
            nonlocal lines
            lines = iter([out.readline()])
            os.kill(os.getpid(), signal.SIGINT)
            return lines

        monkeypatch.setattr(stages, "thinned", interrupted)
        # A job in the background of a shell ignores SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_stage(self._stage(tmp_path))
        finally:
            signal.signal(signal.SIGINT, before)
        with pytest.raises(ProcessLookupError):
            os.kill(int(next(lines)), 0)


class TestFolder:
    def _status(self, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
        assert cli.main(["demo", "--out", str(out), *options]) == demo.MISTAKE
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and str(out) in message
        return message

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "_require_packages", lambda: None)

    def test_another_demo_is_kept(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / demo.SETTINGS_NAME).write_text(json.dumps(DemoSettings(tmp_path).identity()))
        message = self._status(tmp_path, capsys, "--seed", "1", "--digits", "4")
        assert "got a demo with seed=0, digits=3, expected seed=1, digits=4" in message

    @pytest.mark.parametrize("options", [(), ("--fresh",)])
    def test_what_is_no_demo_is_kept(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
    ) -> None:
        (tmp_path / "thesis.tex").write_text("my life's work")
        assert "not of a demo" in self._status(tmp_path, capsys, *options)
        assert (tmp_path / "thesis.tex").read_text() == "my life's work"

    def test_not_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        assert "choose another --out" in self._status(tmp_path / "file" / "demo", capsys)


@pytest.mark.parametrize("digits", [1, 2, 101])
def test_a_demo_without_enough_problems_is_not_begun(
    digits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_require_packages", lambda: None)
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), "--digits", str(digits)]) == demo.MISTAKE
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "digits: got " in message and not out.exists()


def test_models_only_are_the_models_of_a_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is distilled; a demo in the same folder takes what is there."""
    made: list[str] = []

    def run(stage: Stage) -> None:
        made.append(stage.run_dir.name)
        hf_dir(stage.run_dir, stage.steps).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(demo, "_require_packages", lambda: None)
    monkeypatch.setattr(demo, "run_stage", run)
    monkeypatch.setattr(demo, "share_right", lambda *_: 0.5)
    monkeypatch.setattr(demo, "_fresh", lambda *_: made.append("check"))
    arguments = ["demo", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--models-only"]) == demo.OK
    assert made == ["teacher", "start"] and (tmp_path / "models" / "start").is_dir()
    assert capsys.readouterr().out.endswith(f"start:   {tmp_path / 'models' / 'start'}\n")
    assert cli.main(arguments) == demo.MISTAKE, "the stand-ins leave no metrics"
    assert made[2:] == ["teacher", "start", "vopd", "check"]


def test_without_vllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "vllm" else object())
    assert run_demo(DemoSettings(Path("never/made"))) == demo.MISTAKE
    assert "make engine" in capsys.readouterr().err and not Path("never").exists()


def _results(before: float, after: float, teacher: float, fresh: float) -> Results:
    accuracies = {"vopd": {0: before, 25: 1.0, 50: after}, "opd": {0: before, 50: 0.5}}
    sizes = {"teacher": 789760, "student": 198400}
    return Results(0, sizes, teacher, accuracies, fresh)


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ((0.30, 0.96, 0.98, 0.96), [True, True, True, True]),
        ((0.30, 0.96, 0.94, 0.964), [False, True, True, True]),
        ((0.57, 0.96, 0.98, 0.956), [True, False, True, True]),
        ((0.30, 0.89, 0.98, 0.90), [True, True, False, False]),
    ],
)
def test_bars(figures: tuple[float, float, float, float], met: list[bool]) -> None:
    before, after, teacher, fresh = figures
    assert [bar.is_met for bar in demo._bars(_results(before, after, teacher, fresh), 500)] == met


def test_table_shows_the_last_evaluation() -> None:
    rows = table(_results(0.302, 0.964, 0.98, 0.964)).splitlines()
    assert [row.split() for row in rows[1:]] == [
        ["teacher", "789,760", "98.0%"],
        ["student,", "start", "198,400", "30.2%"],
        ["student,", "vOPD", "198,400", "96.4%", "+66.2"],
        ["student,", "OPD", "198,400", "50.0%", "+19.8"],
    ]


def test_plot(tmp_path: Path) -> None:
    assert smoothed([0.0, 3.0, 6.0, 9.0], window=3) == [1.5, 3.0, 6.0, 7.5]
    keys = ("kl/reverse", "variance/advantage_over_reward", "rollout/length_mean")
    records = [{"step": i, **dict.fromkeys(keys, 1.0 / i)} for i in range(1, 9)]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    save_plot({"vopd": tmp_path}, {"vopd": {0: 0.1, 8: 0.9}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
