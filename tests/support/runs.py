"""Small whole runs for tests: models, data and a configuration in a folder, and how to start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny_models import TinyModel
from tests.support.tiny_tokenizer import IM_END, VOCAB_SIZE, save_tokenizer

# vLLM's attention on CPU takes heads of 32, not of 24.
SIZES = (("max_position_embeddings", 512), ("head_dim", 32))


def save_model(root: Path, name: str, seed: int, tied: bool = False, **sizes: Any) -> Path:
    """Save a model with tokenizer in `root`/`name`."""
    overrides = tuple((dict(SIZES) | sizes).items())
    model = TinyModel("qwen3", tied, VOCAB_SIZE, overrides=overrides)
    model.save(root / f"{name}.raw", seed).rename(root / name)
    (root / name / "generation_config.json").write_text(json.dumps({"eos_token_id": IM_END}))
    return save_tokenizer(root / name)


def save_records(path: Path, number: int = 24, **more: Any) -> Path:
    """Write prompts, with the fields `more` in each."""
    records = [
        {"prompt": f"What is {i} + {i}?", "answer": str(2 * i), **more} for i in range(number)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_run(root: Path) -> Path:
    """Save two models, prompts, responses and `config.yaml` in `root`; return the latter."""
    save_model(root, "student", 0, tied=True)
    save_model(root, "teacher", 1)
    settings = {
        "run": {"name": "tiny", "dir": str(root / "runs")},
        "student": {"path": str(root / "student"), "dtype": "fp32"},
        "teacher": {"path": str(root / "teacher"), "dtype": "fp32"},
        "parallel": {"device": "cpu"},
        "rollout": {"num_prompts": 8, "dtype": "fp32", "deadline_seconds": 300},
        "curriculum": {"kind": "fixed", "ladder": [16]},
        "data": {
            "train": str(save_records(root / "train.jsonl")),
            "max_prompt_tokens": 128,
        },
        "train": {"steps": 3, "max_tokens_per_microbatch": 512},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "evaluation": {"interval": 0},
    }
    save_records(root / "responses.jsonl", response="The sum is even.")
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def without_engine(root: Path) -> list[str]:
    """Return overrides under which a run trains on ready responses and starts no engine."""
    return [
        "objective.prefix=dataset",
        "objective.estimator=exact",
        f"data.responses={root / 'responses.jsonl'}",
    ]


def command(num_ranks: int, *arguments: str, module: str = "megatron_vopd.train") -> list[str]:
    """Return the command that starts torchrun on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(num_ranks), "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Return an environment of one thread a rank, and nothing but loopback."""
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **own}


def descendants(pid: int) -> set[int]:
    """List a process and all processes that descend from it."""
    found, stack = set(), [pid]
    while stack:
        at = stack.pop()
        found.add(at)
        for thread in Path(f"/proc/{at}/task").glob("*/children"):
            stack += [int(child) for child in thread.read_text().split()]
    return found


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """Start a command in the background; its output goes to `out` and `err` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(arguments, stdout=out, stderr=err, env=environment())
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in descendants(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
