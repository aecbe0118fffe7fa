"""A synthetic model of about 2 GiB in HF format, and a sampler of memory."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vopd.hf.facts import facts_from_config
from megatron_vopd.hf.writer import header_bytes, plan_files

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 13,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 65537,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LARGEST_TENSOR_BYTES = 65537 * 2048 * 2


def write_big_model(folder: Path, num_layers: int = 13) -> Path:
    """Write random bf16 weights into one file; about 2.0 GiB with 13 layers."""
    folder.mkdir()
    config = CONFIG | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    facts = facts_from_config(config)
    (plan,) = plan_files(facts, 2, 10**12)
    shapes = plan.shapes(facts)
    noise = torch.randn(LARGEST_TENSOR_BYTES // 2).mul_(0.02).bfloat16()
    with open(folder / plan.name, "wb") as file:
        file.write(header_bytes(shapes, torch.bfloat16))
        for number, shape in enumerate(shapes.values()):
            size = torch.Size(shape).numel()
            values = (
                noise.roll(number * 7919)[:size] if size < 10**6 else noise[:size] * (1 + number)
            )
            values.view(torch.uint8).numpy().tofile(file)
    return folder


@dataclass(frozen=True)
class Usage:
    """Seconds of one command, and the peak of its anonymous memory (RssAnon) in MiB."""

    seconds: float
    anonymous_mib: float


def run_measured(command: list[str], interval: float = 0.01) -> Usage:
    """Run a command and sample RssAnon of the process and of its children from /proc."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(_anonymous_mib(pid) for pid in _family(process.pid)))
        time.sleep(interval)
    assert process.returncode == 0, command
    return Usage(time.monotonic() - begin, peak)


def _family(pid: int) -> list[int]:
    """List a process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [child for text in task.read_text().split() for child in _family(int(text))]
        except OSError:
            continue
    return found


def _anonymous_mib(pid: int) -> float:
    """Sum RssAnon; pages that a forked child shares with its parent are counted twice."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0
