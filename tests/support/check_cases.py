"""Model folders without weights, a sound configuration that names them, and a run of the check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.cli import main

SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 16,
    "max_position_embeddings": 4096,
    "eos_token_id": 3,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
VOCABULARY = {"a": 0, "b": 1, "c": 2}

GOOD = """\
student: {path: ./student, dtype: fp32}
teacher: {path: ./teacher, tp: 2}
parallel: {tp: 1}
objective: {baseline: topk, topk: 16}
curriculum: {ladder: [64, 128]}
data: {train: org/prompts}
optimizer: {learning_rate: 1e-6}
"""


def save_model(folder: Path, *, eos: Any = None, tokens: Any = None, **changes: Any) -> None:
    """Save a model folder without weights: SHAPE with `changes` (None removes a key)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**SHAPE, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    vocabulary = VOCABULARY if tokens is None else tokens
    end = {"id": 3, "content": "<end>", "special": True}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": [end]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def make_workplace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` current, with a sound config.yaml and the two models that it names."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    save_model(folder / "student")
    save_model(folder / "teacher", num_hidden_layers=6)
    (folder / "config.yaml").write_text(GOOD)
    return folder


def run_check(
    capsys: pytest.CaptureFixture[str], *arguments: str, config: str = "config.yaml"
) -> tuple[int, str, list[str]]:
    """Run `vopd check config ...`; return status, output, lines of standard error."""
    status = main(["check", config, *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return status, captured.out, captured.err.splitlines()
