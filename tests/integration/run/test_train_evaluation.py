"""Evaluation in a real run: vLLM's greedy answers against those of transformers, files, SIGTERM.

The run is SFT, whose engines are for the evaluation alone.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.data.answers import conclusion, final_answer
from megatron_vopd.data.grading import Grader
from megatron_vopd.types import Prompt
from tests.support.engines import needs_vllm
from tests.support.runs import command, environment, save_run, started
from tests.support.tiny_tokenizer import IM_END

pytestmark = [*needs_vllm, pytest.mark.slow, pytest.mark.timeout(1500)]
QUESTIONS = [f"What is {i} + {i}?" for i in range(7)]
MAX_TOKENS, STEPS = 12, 4


def _greedy(folder: Path) -> list[tuple[str, int]]:
    """Return text and number of tokens of each answer, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer: list[int] = []
        while len(answer) < MAX_TOKENS and IM_END not in answer:
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer])).logits[0, -1]
            answer.append(int(logits.argmax()))
        found.append((tokenizer.decode(answer, skip_special_tokens=True), len(answer)))
    return found


def _expected(folder: Path, references: list[str]) -> dict[str, float]:
    answers = _greedy(folder)
    with Grader() as grader:
        grades = [
            grader.grade(Prompt("", (1,), reference), text)
            for (text, _), reference in zip(answers, references, strict=True)
        ]
    lengths = [length for _, length in answers]
    return {
        "eval/own/avg@1": sum(grades) / len(grades),
        "eval/own/pass@1": sum(grades) / len(grades),
        "eval/own/length": sum(lengths) / len(lengths),
    }


@pytest.fixture(scope="module")
def references(root: Path) -> list[str]:
    """Return the untrained student's answers, given to the first questions as right ones."""
    answers = [final_answer(conclusion(text)) for text, _ in _greedy(root / "student")]
    return [answer.strip() or "7" for answer in answers[:4]] + ["nothing of the kind"] * 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    save_run(root)
    return root


def _arguments(root: Path, references: list[str], name: str, *more: str) -> list[str]:
    records = [
        {"prompt": question, "answer": reference}
        for question, reference in zip(QUESTIONS, references, strict=True)
    ]
    path = root / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = [
        "objective.estimator=hard",
        "objective.prefix=dataset",
        f"data.responses={root / 'responses.jsonl'}",
        f"data.evaluation={{own: {path}}}",
        "evaluation.interval=2",
        "evaluation.samples=1",
        "evaluation.k=1",
        "evaluation.temperature=0",
        f"evaluation.max_tokens={MAX_TOKENS}",
        "checkpoint.interval=1",
        f"train.steps={STEPS}",
        f"run.name={name}",
        *more,
    ]
    return command(2, str(root / "config.yaml"), *settings)


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _evaluated(run_dir: Path) -> dict[int, dict[str, float]]:
    return {
        line["step"]: {key: value for key, value in line.items() if key.startswith("eval/")}
        for line in _lines(run_dir)
        if "eval/own/avg@1" in line
    }


def test_a_run_is_evaluated(root: Path, references: list[str]) -> None:
    run_dir, folder = root / "runs" / "whole", root / "launch_whole"
    with started(folder, *_arguments(root, references, "whole")) as launcher:
        assert launcher.wait(timeout=600) == 0, (folder / "err").read_text()[-2000:]
    assert (folder / "err").read_text() == ""
    found = _evaluated(run_dir)
    assert list(found) == [0, 2, STEPS] and [line["step"] for line in _lines(run_dir)] == [
        *range(5)
    ]
    for step, model in ((0, root / "student"), (STEPS, run_dir / "hf" / f"step_{STEPS}")):
        expected = _expected(model, references)
        print(f"\nstep {step}: {found[step]}, by transformers {expected}")
        assert {key: found[step][key] for key in expected} == pytest.approx(expected)
    assert found[0]["eval/own/avg@1"] > 0, "the references are answers of the untrained student"
    assert "weight_sync/bytes" not in _lines(run_dir)[2], "steps push nothing"
    out = (folder / "out").read_text()
    assert "evaluation: own, 7 problems, 0 left out as too long" in out
    assert out.count("evaluation at step") == 3

    best = json.loads((run_dir / "best.json").read_text())
    values = {step: values["eval/own/avg@1"] for step, values in found.items()}
    assert best["value"] == max(values.values()) == values[best["step"]]
    saved = {path.name for path in (run_dir / "checkpoints").glob("step_*")}
    kept = {f"step_{step}" for step in (3, 4)} | (
        {f"step_{best['step']}"} if best["step"] else set()
    )
    assert saved == kept == {path.name for path in (run_dir / "hf").iterdir()}
    for key in ("checkpoint", "hf"):
        assert best[key] is None if not best["step"] else (run_dir / best[key]).is_dir()


def test_sigterm_in_an_evaluation(root: Path, references: list[str]) -> None:
    """The step before it is saved; the resumed run has the weights of the undisturbed one."""
    run_dir, folder = root / "runs" / "stopped", root / "launch_stopped"
    slow = ["evaluation.samples=500", "evaluation.temperature=1.0", "checkpoint.interval=0"]
    with started(folder, *_arguments(root, references, "stopped", *slow)) as launcher:
        # The line of step 2 is on the disk before its evaluation begins, of 3,500 responses.
        deadline = time.monotonic() + 900
        while not (run_dir / "metrics.jsonl").exists() or len(_lines(run_dir)) < 3:
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
        begin = time.monotonic()
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=120)
        seconds = time.monotonic() - begin
    status = json.loads((run_dir / "status.json").read_text())
    print(f"\nSIGTERM in an evaluation: ended after {seconds:.1f} s: {status}")
    assert seconds < 30 and status["reason"] == "preempted"
    assert status["last_checkpoint"] == "step_2"
    assert "eval/own/length" not in _lines(run_dir)[2], "it was cut short"
    again = subprocess.run(
        _arguments(root, references, "stopped"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert "evaluation: other problems or settings than before" in again.stdout
    whole, found = root / "runs" / "whole", _evaluated(run_dir)
    assert found == {step: _evaluated(whole)[step] for step in (2, STEPS)}
    for name in (f"hf/step_{STEPS}/model.safetensors", f"checkpoints/step_{STEPS}/__0_0.distcp"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
