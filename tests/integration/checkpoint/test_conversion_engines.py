"""H8: the exported folder is the original one for transformers, and agrees with it in vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT
from tests.support.harness import spawn
from tests.support.tiny_models import TinyModel
from tests.support.tools import run

PROMPTS = [[1, 5, 9, 2], [150, 3, 77, 8, 20, 31], [0, 159]]
# vLLM's and transformers' sums differ in order; fp32, four layers.
LOGPROB_TOLERANCE = 1e-5
# vLLM's attention on CPU asks for heads of 32 and more.
_SIZES = (("hidden_size", 128), ("intermediate_size", 192), ("head_dim", 32))
MODELS = [
    TinyModel("qwen3", True, overrides=_SIZES),
    TinyModel("qwen2", False, overrides=_SIZES[:2]),
    TinyModel("llama", False, overrides=_SIZES),
    TinyModel("qwen3_moe", False, overrides=_SIZES),
]


def _round_trip(model_dir: Path, out: Path) -> None:
    for ran in (
        run("convert_hf_to_megatron", model_dir, out / "meg"),
        run("convert_megatron_to_hf", out / "meg", out / "hf", "--max-file-gb", 1e-4),
    ):
        assert ran.status == 0, ran.err


def _logprobs(folder: Path, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Return the log-probs of a response by transformers, token by token."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.model_type)
def test_transformers_computes_the_same(model: TinyModel, tmp_path: Path) -> None:
    original = model.save(tmp_path)
    spawn(_round_trip, 1, original, tmp_path)
    response = list(range(10, 40))
    for prompt in PROMPTS:
        expected = _logprobs(original, prompt, response)
        assert torch.equal(_logprobs(tmp_path / "hf", prompt, response), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.model_type)
def test_vllm_agrees_with_transformers(model: TinyModel, tmp_path: Path) -> None:
    """vLLM samples from the exported folder; transformers scores those tokens on the original."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make engine")
    original = model.save(tmp_path)
    spawn(_round_trip, 1, original, tmp_path)
    script = [sys.executable, "-m", "tests.support.engine_logprobs"]
    done = subprocess.run(
        [*script, str(tmp_path / "hf"), json.dumps(PROMPTS)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    worst = 0.0
    for prompt, found in zip(PROMPTS, json.loads(lines[0][len("RESULT ") :]), strict=True):
        assert len(found["ids"]) == 24
        expected = _logprobs(original, prompt, found["ids"])
        worst = max(worst, float((torch.tensor(found["logprobs"]) - expected).abs().max()))
    print(f"\n{model}: largest log-prob difference {worst:.1e}")
    assert worst <= LOGPROB_TOLERANCE
