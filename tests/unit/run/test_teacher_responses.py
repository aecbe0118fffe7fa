"""Generation of a teacher's responses: killed and continued, faulty engines, users' mistakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.errors import EngineError, UserError
from megatron_vopd.files.response_file import ResponseFile
from megatron_vopd.rollout.engine import Progress, Sampling
from megatron_vopd.run.teacher_responses import Job, Plan, generate, plan
from megatron_vopd.types import Prompt, Rollout
from tests.support.data_cases import write_jsonl
from tests.support.scripted import ScriptedEngine
from tests.support.tiny_tokenizer import IM_END, VOCAB_SIZE, save_model_folder
from tests.support.tools import load_tool


class Dying(ScriptedEngine):
    """An engine that samples until its n-th call, which kills the process as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        super().__init__(VOCAB_SIZE)
        self.update_weights([], 0)
        self._at = at

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        if self.num_generations == self._at:
            raise KeyboardInterrupt
        return super().generate(prompts, sampling, progress)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = save_model_folder(tmp_path / "teacher")
    records = [{"prompt": "word " * (i + 1), "answer": i} for i in range(7)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    return Job(str(folder), prompts, tmp_path / "out.jsonl", samples=2, max_tokens=9, batch=3)


def written(made: Plan, engine: Any) -> list[int]:
    counts: list[int] = []
    with ResponseFile(made.job.out, made.identity(), made.places) as file:
        generate(made, file, engine, counts.append)
    return counts


def test_generation_continues_where_it_was_killed(job: Job, tmp_path: Path) -> None:
    made = plan(job)
    assert written(made, Dying(99))[-1] == 14
    expected = job.out.read_bytes()
    lines = [json.loads(line) for line in expected.splitlines()]
    assert [(line["prompt_id"], line["sample"], line["answer"]) for line in lines] == [
        (f"prompts.jsonl:{i + 1}", sample, i) for i in range(7) for sample in range(2)
    ]
    for line in lines:
        assert len(line["response_ids"]) == len(line["logprobs"]) >= 1
        ended = line["response_ids"][-1] == IM_END
        assert line["finish_reason"] == ("stop" if ended else "length")
        assert line["prompt_ids"] and max(line["logprobs"]) < 0
    # Killed after one batch, with one line of the second on the disk and a torn one behind it.
    again = replace(made, job=replace(job, out=tmp_path / "again.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        written(again, Dying(1))
    part = tmp_path / "again.jsonl.partial"
    assert part.read_bytes() == b"".join(expected.splitlines(keepends=True)[:6])
    part.write_bytes(expected[: sum(map(len, expected.splitlines(keepends=True)[:7])) + 5])
    assert written(again, Dying(99))[0] == 7
    assert (tmp_path / "again.jsonl").read_bytes() == expected


def test_a_failing_engine_is_asked_once_more(job: Job) -> None:
    made = plan(job)
    engine = ScriptedEngine(VOCAB_SIZE, {0: "too_few", 2: "nan", 3: "duplicates"})
    engine.update_weights([], 0)
    with pytest.raises(EngineError, match="duplicate"):
        written(made, engine)
    part = job.out.with_name("out.jsonl.partial")
    assert part.read_bytes().count(b"\n") == 6, "the first batch is there"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens": 512}, ["--max-tokens", "context", "512, together", "give --max-tokens "]),
        ({"max_prompt_tokens": 2}, ["PROMPTS", "7 records, none of at most 2 tokens"]),
        ({"prompt_field": "question"}, ["prompts.jsonl:1 question", "no such field"]),
        ({"prompts": "./absent.jsonl"}, ["PROMPTS", "./absent.jsonl", "existing file"]),
        ({"model": "./absent"}, ["./absent: no config.json; give a Hugging Face model"]),
    ],
)
def test_mistakes_are_refused_before_the_engine_starts(
    changes: dict[str, Any], words: list[str], job: Job
) -> None:
    with pytest.raises(UserError) as caught:
        plan(replace(job, **changes))
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_command_says_a_mistake_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("generate_teacher_responses")
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "teacher")
    for wrong in (["--samples", "0"], ["--top-p", "0"], ["--help"]):
        with pytest.raises(SystemExit) as caught:
            tool.main(["teacher", "prompts.jsonl", "out.jsonl", *wrong])
        assert caught.value.code == (0 if wrong == ["--help"] else 2)
    out, error = capsys.readouterr()
    assert "--samples: got 0, expected an integer >= 1" in error
    assert "--top-p: got 0, expected a number above 0 and at most 1" in error
    assert "log-probs of the distribution sampled" in out
    assert tool.main(["teacher", "prompts.jsonl", "out.jsonl"]) == 2
    _, error = capsys.readouterr()
    assert error.startswith("PROMPTS: got './prompts.jsonl', expected an existing file")
    assert error.count("\n") == 1 and not list(tmp_path.glob("out*"))
