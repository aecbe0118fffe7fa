"""Responses from a real vLLM: killed in the middle, continued, and a run trains on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.support import ROOT
from tests.support.engines import needs_vllm
from tests.support.runs import command, descendants, environment, save_run, started

pytestmark = needs_vllm
TOOL = ROOT / "tools" / "generate_teacher_responses.py"
OPTIONS = ("--samples", "2", "--max-tokens", "24", "--batch", "4", "--dtype", "fp32", "--seed", "3")


def arguments(root: Path, name: str, *more: str) -> list[str]:
    paths = (root / "teacher", root / "train.jsonl", root / name)
    return [sys.executable, str(TOOL), *map(str, paths), *OPTIONS, *more]


def tool_environment() -> dict[str, str]:
    return {**environment(), "PYTHONPATH": str(ROOT)}


def run_tool(root: Path, name: str, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments(root, name, *more), capture_output=True, text=True, env=tool_environment()
    )


def kill_after(root: Path, name: str, num_lines: int) -> int:
    """Start it, kill -9 it and all its processes once that many lines are there; their number."""
    part = root / f"{name}.partial"
    with started(root / "launch", *arguments(root, name)) as process:
        deadline = time.monotonic() + 1200
        while time.monotonic() < deadline and process.poll() is None:
            if part.exists() and part.read_bytes().count(b"\n") >= num_lines:
                break
            time.sleep(0.01)
        assert process.poll() is None, (root / "launch" / "err").read_text()
        for pid in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return part.read_bytes().count(b"\n")


@pytest.mark.timeout(3600)
def test_killed_and_continued_then_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    save_run(tmp_path)
    whole = run_tool(tmp_path, "whole.jsonl")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert whole.stdout.endswith("whole.jsonl: 48 responses\n")
    expected = (tmp_path / "whole.jsonl").read_bytes()
    lines = [json.loads(line) for line in expected.splitlines()]
    assert len(lines) == 48 and len({(x["prompt_id"], x["sample"]) for x in lines}) == 48

    before = kill_after(tmp_path, "again.jsonl", 8)
    part = tmp_path / "again.jsonl.partial"
    assert 8 <= before < 48, "killed in the middle"
    part.write_bytes(part.read_bytes() + expected.splitlines()[before][:9])
    refused = run_tool(tmp_path, "again.jsonl", "--seed", "4")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "seed 4 (before: 3)" in refused.stderr
    again = run_tool(tmp_path, "again.jsonl")
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"going on after {before} of 48 responses" in again.stdout
    assert "a torn last line of 9 bytes was cut off" in again.stdout
    assert (tmp_path / "again.jsonl").read_bytes() == expected
    assert run_tool(tmp_path, "again.jsonl").returncode == 0, "nothing left to do"

    _require_logprobs(tmp_path / "teacher", lines[:6])
    overrides = (
        "objective.prefix=teacher",
        "objective.estimator=exact",
        "objective.direction=forward",
        f"data.responses={tmp_path / 'again.jsonl'}",
        "checkpoint.export_hf=false",
        "curriculum.ladder=[24]",
    )
    trained = subprocess.run(
        command(1, str(tmp_path / "config.yaml"), *overrides),
        capture_output=True,
        text=True,
        env=tool_environment(),
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    steps = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in steps]
    assert len(records) == 3 and all(r["optim/skipped"] == 0 for r in records)
    assert records[-1]["kl/forward"] < records[0]["kl/forward"]


def _require_logprobs(folder: Path, lines: list[dict]) -> None:
    """Assert that the log-probs are those of transformers after the same ids."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst = 0.0
    for line in lines:
        ids, response = line["prompt_ids"], line["response_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1]
        scored = logits.double().log_softmax(-1)[range(len(response)), response]
        worst = max(worst, float((scored - torch.tensor(line["logprobs"])).abs().max()))
    print(f"engine against transformers: {worst:.1e} nats")
    assert worst <= 1e-4
