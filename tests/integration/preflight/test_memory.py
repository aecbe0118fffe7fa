"""The memory estimate beside what whole dry runs on the CPU really needed, rank by rank."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.support.runs import command, started
from tests.support.tiny_models import TinyModel
from tests.support.tiny_tokenizer import IM_END, save_tokenizer

LIMIT = 0.15
PROMPT, RESPONSE = 32, 993
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}
# name -> ranks, vocabulary, settings
CASES: dict[str, tuple[int, int, list[str]]] = {
    "tp1": (1, 32000, []),
    "tp2": (2, 32000, ["parallel.tp=2"]),
    "pp2": (2, 32000, ["parallel.pp=2", "teacher.pp=2"]),
    "dp2, distributed optimizer, bf16": (
        2,
        32000,
        ["optimizer.distributed=true", "student.dtype=bf16", "teacher.dtype=bf16"],
    ),
    "recompute, larger vocabulary": (1, 80000, ["student.recompute=full"]),
    "cp2": (2, 32000, ["parallel.cp=2", "train.max_tokens_per_microbatch=1028"]),
    "cp4, recompute": (
        4,
        32000,
        ["parallel.cp=4", "student.recompute=selective", "train.max_tokens_per_microbatch=1032"],
    ),
    "tp2 x pp2, teacher tp4": (4, 32000, ["parallel.tp=2", "parallel.pp=2", "teacher.tp=4"]),
}


def save_model(root: Path, name: str, seed: int, vocab_size: int, **more: int) -> Path:
    overrides = tuple((SIZES | more).items())
    model = TinyModel("qwen3", name == "student", vocab_size, overrides=overrides)
    folder = model.save(root, seed).rename(root / name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": IM_END}))
    return save_tokenizer(folder)


def save_run(root: Path, vocab_size: int) -> Path:
    """Save a run whose rows are all exactly full, as the estimate takes them to be."""
    save_model(root, "student", 0, vocab_size)
    save_model(root, "teacher", 1, vocab_size, hidden_size=640)
    records = [{"prompt": f"{i:02}".ljust(PROMPT, "x")} for i in range(16)]
    (root / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    row = PROMPT + RESPONSE
    settings = {
        "run": {"name": "memory", "dir": str(root / "runs")},
        "student": {"path": str(root / "student"), "dtype": "fp32", "chat_template": "none"},
        "teacher": {"path": str(root / "teacher"), "dtype": "fp32"},
        "parallel": {"device": "cpu"},
        "rollout": {"num_prompts": 2, "dtype": "fp32"},
        "curriculum": {"kind": "fixed", "ladder": [RESPONSE]},
        "data": {"train": str(root / "train.jsonl"), "max_prompt_tokens": PROMPT},
        "train": {"steps": 3, "max_tokens_per_microbatch": row},
        "optimizer": {"distributed": False},
        "evaluation": {"interval": 0},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize(("ranks", "vocab_size", "settings"), CASES.values(), ids=CASES.keys())
def test_the_estimate_is_near_what_was_needed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    vocab_size: int,
    settings: list[str],
) -> None:
    config = save_run(tmp_path, vocab_size)
    # Freed memory goes back at once, so that the process's peak is of memory in use: malloc would
    # keep most of it, as torch's allocator on a GPU does, where the peak is counted without.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    with started(tmp_path, *command(ranks, str(config), "--dry-run", *settings)) as process:
        assert process.wait(timeout=1200) == 0, (tmp_path / "err").read_text()[-3000:]
    printed = (tmp_path / "out").read_text()
    print(f"\n{printed}")
    found = re.findall(r"^ +\d+ +\d+ +\d+ +\d+ +([\d.]+) GiB +([\d.]+) GiB$", printed, re.M)
    assert len(found) == ranks, printed
    for expected, measured in found:
        ratio = float(expected) / float(measured)
        print(f"estimated / measured: {ratio:.3f}")
        assert abs(ratio - 1) <= LIMIT, (expected, measured)
