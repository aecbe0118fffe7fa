"""Small runs that can be saved and resumed: a scripted engine, real models and optimizers."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vopd.checkpoint.optimizer import whole_tensors
from megatron_vopd.checkpoint.random_states import random_bytes
from megatron_vopd.collectives import StopFlag
from megatron_vopd.curriculum import EntropyGatedLength
from megatron_vopd.data.stream import PromptStream
from megatron_vopd.megatron.groups import Groups, student_groups
from megatron_vopd.megatron.student import Student
from megatron_vopd.megatron.weights import export_tensors
from megatron_vopd.run.checkpoints import RunCheckpoints
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.trainer import Trainer
from megatron_vopd.types import Prompt
from tests.support.layouts import destroy_groups
from tests.support.scripted import ScriptedEngine
from tests.support.settings import step_settings
from tests.support.steps import Setup, objective

VOCAB = 61
# Three of eight per step: an epoch ends inside steps 3, 6 and 8.
PROMPTS = [Prompt(f"p{i}", (i, 2 * i + 1, 60 - i), None, "teacher") for i in range(8)]


@dataclass
class Made:
    """A run on this rank."""

    groups: Groups
    student: Student
    trainer: Trainer
    checkpoints: RunCheckpoints
    said: list[str]


def make(
    setup: Setup,
    run_dir: Path,
    keep: int = 2,
    staleness: int = 0,
    changes: Any = None,
    stop: StopFlag | None = None,
    engine: ScriptedEngine | None = None,
) -> Made:
    """Build a run of `setup.case.layout`; the layout before it is given up.

    Args:
        changes: replaces parts of the identity.
    """
    destroy_groups()
    groups = student_groups(setup.case.layout)
    student = setup.student(groups)
    engine = engine or ScriptedEngine(VOCAB)
    engine.update_weights([], 0)
    own = engine if groups.is_leader else None
    settings = step_settings(
        objective=objective("vopd_full"),
        num_prompts=3,
        samples_per_prompt=2,
        max_tokens_per_microbatch=64,
        max_staleness=staleness,
    )

    def push(policy_version: int) -> None:
        engine.update_weights([], policy_version)

    stream = PromptStream(PROMPTS, seed=3)
    collector = RolloutCollector(
        groups, own, stream, settings, VOCAB, setup.device, push=push, stop=stop
    )
    curriculum = EntropyGatedLength((6, 9, 12), interval=2)
    teachers, held_out = setup.teachers(student), PROMPTS[:2]
    trainer = Trainer(
        student, teachers, collector, curriculum, settings, held_out=held_out, stop=stop
    )
    said: list[str] = []
    known = {"config": {}, "model": asdict(student.facts), "teachers": {"teacher": "x"}}
    checkpoints = RunCheckpoints(
        run_dir,
        Path(setup.student_dir),
        student,
        trainer,
        known | (changes or {}),
        keep,
        said.append,
    )
    return Made(groups, student, trainer, checkpoints, said)


def resume_engine(made: Made) -> None:
    """Push the weights of the version that was loaded into the engines, as a start does."""
    made.trainer.collector.push(made.trainer.policy_version)


def raw_state(made: Made) -> dict[str, str]:
    """Hash everything that this rank holds, as it lies in memory."""
    found = {f"param {n}": digest(p) for n, p in made.student.bare.named_parameters()}
    optimizer = made.student.optimizer
    for number, member in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        groups = member.optimizer.param_groups
        for at, main in enumerate(main for group in groups for main in group["params"]):
            found[f"main {number}.{at}"] = digest(main)
            for key, value in member.optimizer.state[main].items():
                found[f"{key} {number}.{at}"] = digest(value)
    found["random"] = digest(random_bytes())
    found["trainer"] = repr(made.trainer.state_dict())
    return found


def digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()


def whole_state(made: Made) -> dict[str, str]:
    """Hash parameters and moments by HF name, whatever the layout."""
    student = made.student
    shards = {"param": dict[str, torch.Tensor](student.bare.named_parameters())}
    for name, kind, _, whole in whole_tensors(student):
        shards.setdefault(kind, {})[name] = whole
    found = {}
    for kind, of_kind in shards.items():
        spec = student.options.layer_spec
        exported = export_tensors(of_kind, student.facts, student.groups, spec)
        found |= {f"{kind} {name}": digest(tensor) for name, tensor in exported}
    return found
