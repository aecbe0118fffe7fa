"""What the acceptance scripts train: a world of one rank on a device, small models, whole steps."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vopd.megatron.groups import Groups, init_world, student_groups
from megatron_vopd.trainer.trainer import Trainer
from megatron_vopd.types import LOSS_CHUNK, Layout, Prompt, Rollout
from tests.support.layouts import Case, destroy_groups
from tests.support.steps import RecordingTrainer, Setup, make_rollouts, make_trainer, objective
from tests.support.tiny_models import TinyModel


@dataclass(frozen=True)
class Size:
    """The size of a model and of a step: `full` for a GPU, `small` for any machine."""

    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_rollouts: int
    longest: int
    row: int

    def model(self) -> TinyModel:
        """Return a tied Qwen3 of this size, kept in bf16."""
        overrides = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
        }
        return TinyModel("qwen3", True, self.vocab_size, "bfloat16", tuple(overrides.items()))

    def rollouts(self, seed: int) -> list[Rollout]:
        """Make responses of random lengths."""
        return make_rollouts(self.num_rollouts, self.vocab_size, seed, self.longest)

    def full_rollouts(self, prompt: int, response: int, number: int) -> list[Rollout]:
        """Make responses that are all as long as they may be, with random ids."""
        ids = torch.randint(0, self.vocab_size, (number, prompt + response)).tolist()
        return [
            Rollout(
                Prompt(f"p{i}", tuple(row[:prompt]), None, "teacher"),
                0,
                tuple(row[prompt:]),
                (-9.0,) * response,
                "length",
                0,
            )
            for i, row in enumerate(ids)
        ]


FULL = Size(1024, 3072, 4, 16, 8, 128, 151_936, 6, 300, 1024)
SMALL = Size(64, 96, 2, 4, 2, 16, 509, 4, 20, 64)
# Name -> dtype, recompute, whether the teacher waits in host memory.
CASES: dict[str, tuple[torch.dtype, str, bool]] = {
    "fp32": (torch.float32, "none", False),
    "bf16": (torch.bfloat16, "none", False),
    "bf16-selective": (torch.bfloat16, "selective", False),
    "bf16-full": (torch.bfloat16, "full", False),
    "bf16-offload": (torch.bfloat16, "none", True),
}


def enter(device: str) -> Groups:
    """Join a world of this one process, NCCL on a GPU, gloo on the CPU; return its groups."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    init_world(device)
    return student_groups(Layout(1))


def setup_of(name: str, size: Size, root: Path, device: str) -> Setup:
    """Return the case of CASES, whose models are made below `root` when they are not there."""
    dtype, recompute, offload = CASES[name]
    folders = {}
    for seed, role in enumerate(("student", "teacher")):
        folder = root / role / str(size.model())
        folders[role] = folder if folder.is_dir() else size.model().save(root / role, seed)
    return Setup(
        Case("", Layout(1)),
        str(folders["student"]),
        {"teacher": str(folders["teacher"])},
        dtype=dtype,
        recompute=recompute,
        offload=offload,
        device=device,
    )


def make(
    setup: Setup, steps: Any, row: int, kind: str = "vopd_topk", recording: bool = True
) -> Any:
    """Make a trainer of `setup` that goes through `steps`, in groups of its own.

    Args:
        recording: keep the gradients of the last step, which takes memory of its own.
    """
    destroy_groups()
    student = setup.student(student_groups(Layout(1)))
    known = (student, setup.teachers(student), steps, kind, row)
    trainer = RecordingTrainer if recording else Trainer
    return make_trainer(*known, make=trainer, objective=objective(kind, chunk=LOSS_CHUNK))
