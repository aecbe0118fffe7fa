"""A script: what it costs to push a student of 600M parameters to a CPU engine (bf16).

A world of `tp` gloo ranks holds Qwen3-0.6B's shape with random weights. Prints one line of JSON:
bytes, seconds, GB/s, GB/s of a plain copy of the same bytes, and each rank's peak of extra memory
in units of the largest layer group (the embedding).

    python -m tests.support.push_cost FOLDER [TP]
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from megatron_vopd.rollout.push import push
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.types import Layout
from tests.support.engines import settings
from tests.support.harness import spawn
from tests.support.layouts import Case, enter

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
EMBEDDING_BYTES = 151936 * 1024 * 2


class Peak:
    """A sampler of this process's memory, private and shared, while it is open."""

    def __enter__(self) -> Peak:
        self.start = self.highest = _resident_bytes()
        self._running = True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._running = False
        self._thread.join()

    def _sample(self) -> None:
        while self._running:
            self.highest = max(self.highest, _resident_bytes())
            time.sleep(0.002)


def _resident_bytes() -> int:
    """Sum private memory, and all of each memory file that is open or mapped here.

    A file that several ranks hold is charged to each of them, whoever made and filled it.
    """
    total = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            total += int(line.split()[1]) * 1024
    files: dict[int, int] = {}  # inode -> bytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "megatron_vopd_weights" in line:
            span, _, _, _, inode = line.split()[:5]
            start, stop = (int(end, 16) for end in span.split("-"))
            files[int(inode)] = stop - start
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if "megatron_vopd_weights" in str(entry.readlink()):
                found = entry.stat()
                files[found.st_ino] = found.st_blocks * 512
        except OSError:
            continue
    return total + sum(files.values())


def _copy_rate(num_bytes: int) -> float:
    """Return the GB/s of copying as many bytes within this process."""
    source = torch.ones(num_bytes // 8, dtype=torch.int64)
    target = torch.zeros_like(source)
    begin = time.monotonic()
    target.copy_(source)
    return num_bytes / 1e9 / (time.monotonic() - begin)


def _measure(folder: str, log_path: str, tp: int, repeats: int) -> list[dict[str, Any]]:
    from megatron_vopd.hf.tensors import read_config
    from megatron_vopd.megatron.model import ModelOptions, build_model

    groups = enter(Case("tp", Layout(tp, tp=tp)))
    config, facts = read_config(folder)
    student = build_model(config, facts, groups, ModelOptions(dtype=torch.bfloat16))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.uniform_(-0.02, 0.02)
    engine = None
    if groups.is_leader:
        changes = {"dtype": "bfloat16", "push_seconds": 300.0, "start_seconds": 600.0}
        engine = LocalEngine(settings(folder, log_path, block_size=128, **changes))
        engine.start()
    found = []
    try:
        for version in range(1, repeats + 1):
            torch.distributed.barrier()
            with Peak() as peak:
                report = push(student, facts, groups, engine, version, attempts=1)
            extra = (peak.highest - peak.start) / EMBEDDING_BYTES
            found.append({"report": report, "extra": extra})
        rate = _copy_rate(found[-1]["report"].num_bytes) if engine is not None else 0.0
        return [one | {"copy": rate} for one in found]
    finally:
        if engine is not None:
            engine.close()


def measure(folder: Path, tp: int, repeats: int = 3) -> dict[str, float]:
    """Return the fastest of the pushes, and the highest memory of any."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    ranks = spawn(_measure, tp, str(folder), str(folder / "engine.log"), tp, repeats)
    report = min((one["report"] for one in ranks[0]), key=lambda report: report.seconds)
    return {
        "bytes": report.num_bytes,
        "seconds": report.seconds,
        "gigabytes_per_second": report.gigabytes_per_second,
        "copy_gigabytes_per_second": ranks[0][0]["copy"],
        "extra_groups_leader": max(one["extra"] for one in ranks[0]),
        "extra_groups_others": max((one["extra"] for r in ranks[1:] for one in r), default=0.0),
    }


def main() -> None:
    from tests.support import harness

    harness.WORLD_SECONDS = 1200
    tp = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print("RESULT " + json.dumps(measure(Path(sys.argv[1]), tp)))


if __name__ == "__main__":
    main()
