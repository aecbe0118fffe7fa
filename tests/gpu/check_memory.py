"""The memory estimate beside the peak that torch's allocator counts on a GPU."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_vopd.config import Config
from megatron_vopd.hf.tensors import read_config
from megatron_vopd.preflight.memory import Machine, estimate
from megatron_vopd.types import Layout, Rollout
from tests.gpu.training import CASES, FULL, SMALL, enter, make, setup_of

LIMIT = 0.05
PROMPT, RESPONSE, NUM_PROMPTS = 64, 1984, 4
NAMES = ("bf16", "bf16-full", "bf16-offload")


def estimated(name: str, setup: Any, device: str) -> float:
    """Return the estimated peak of the case in bytes."""
    dtype, recompute, offload = CASES[name]
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = Config.model_validate(
        {
            "student": {"path": setup.student_dir, "dtype": kind, "recompute": recompute},
            "teacher": {
                "path": setup.teacher_dirs["teacher"],
                "dtype": kind,
                "offload": offload,
            },
            "rollout": {
                "engine": "server",
                "urls": ["http://127.0.0.1:1"],
                "num_prompts": NUM_PROMPTS,
            },
            "curriculum": {"kind": "fixed", "ladder": [RESPONSE]},
            "data": {"train": "unused", "max_prompt_tokens": PROMPT},
            "train": {"max_tokens_per_microbatch": PROMPT + RESPONSE},
            "optimizer": {"distributed": False},
        }
    )
    facts = {
        "student": read_config(setup.student_dir)[1],
        "teacher": read_config(setup.teacher_dirs["teacher"])[1],
    }
    layouts = {"student": Layout(1), "teacher": Layout(1)}
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 80 << 30
    machine = Machine("local", float(memory))
    (rank,) = estimate(config, facts, layouts, machine)
    return rank.peak


def measured(setup: Any, rows: list[Rollout]) -> tuple[float, float]:
    """Run two steps; return the peak of tensors in bytes, and what the process holds beside."""
    # The gradient buffers of the case before lie in cycles (megatron-core's hooks).
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer = make(setup, [rows], PROMPT + RESPONSE, "vopd_full", recording=False)
    for _ in range(2):
        trainer.train_step()
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_allocated() - before, beside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    size = FULL if device == "cuda" else SMALL
    enter(device)
    failed = 0
    rows = size.full_rollouts(PROMPT, RESPONSE, NUM_PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            setup = setup_of(name, size, Path(folder), device)
            expected = estimated(name, setup, device)
            if device == "cpu":
                print(f"{name}: estimated {expected / 2**20:.1f} MiB; nothing to measure here")
                continue
            peak, beside = measured(setup, rows)
            ratio = expected / peak
            failed += abs(ratio - 1) > LIMIT
            print(
                f"{name}: estimated / measured {ratio:.3f} (bar {LIMIT:.0%}), "
                f"measured {peak / 2**30:.2f} GiB, beside tensors {beside / 2**30:.2f} GiB"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
