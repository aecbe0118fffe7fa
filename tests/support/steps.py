"""Trainers for tests: given responses, a student and teachers in any layouts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_vopd.config.schema import OptimizerSection
from megatron_vopd.hf.mapping import LayerSpec
from megatron_vopd.megatron import student as student_module
from megatron_vopd.megatron.groups import Groups, independent_groups
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.megatron.student import Student, load_student
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.megatron.weights import export_tensors
from megatron_vopd.objectives import Objective
from megatron_vopd.trainer.exchange import Graded
from megatron_vopd.trainer.trainer import Trainer
from megatron_vopd.types import Layout, Prompt, Rollout
from tests.support.layouts import Case
from tests.support.reference_step import CAP, GATE, REVERSE_WEIGHT, Adam
from tests.support.settings import objective_named, step_settings

# Name in reference_step -> (key of OBJECTIVES, changes to its settings).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "opd": ("sampled", {"baseline": "none"}),
    "vopd_full": ("sampled", {"baseline": "full"}),
    "vopd_topk": ("sampled", {"baseline": "topk"}),
    "vopd_topk_tail": ("sampled", {"baseline": "topk_tail"}),
    "vopd_optimal": ("sampled", {"baseline": "optimal"}),
    "gated": ("sampled", {"baseline": "full", "entropy_gate": GATE}),
    "reverse": ("reverse", {}),
    "forward": ("forward", {}),
    "mixed": ("mixed", {"reverse_weight": REVERSE_WEIGHT}),
    "topk_reverse": ("topk_reverse", {}),
    "hard": ("hard", {}),
}
TOPK = 7


def objective(kind: str, chunk: int = 16) -> Objective:
    """Return the package's objective of that name; chunks are small, so that a row has several."""
    name, changes = KINDS[kind]
    topk = TOPK if "topk" in kind else 0
    return replace(objective_named(name, topk, importance_cap=CAP, **changes), chunk=chunk)


def make_rollouts(
    num: int,
    vocab_size: int,
    seed: int = 0,
    longest: int = 20,
    teachers: Sequence[str] = ("teacher",),
    sampled: bool = True,
) -> list[Rollout]:
    """Make random prompts and responses with made-up log-probs; the last id occurs."""
    draw = random.Random(seed)
    rollouts = []
    for i in range(num):
        prompt_ids = tuple(draw.randrange(vocab_size) for _ in range(draw.randint(1, 9)))
        ids = [draw.randrange(vocab_size) for _ in range(draw.randint(1, longest))]
        ids[-1] = vocab_size - 1
        prompt = Prompt(f"p{seed}-{i}", prompt_ids, None, teachers[i % len(teachers)])
        logprobs = tuple(-draw.uniform(0.5, 9) for _ in ids) if sampled else None
        version = 0 if sampled else -1
        rollouts.append(Rollout(prompt, 0, tuple(ids), logprobs, "length", version))
    return rollouts


class GivenRollouts:
    """A stand-in for the collector, with the responses of each step written down."""

    def __init__(
        self, steps: Sequence[Sequence[Rollout]], grades: Sequence[float] | None = None
    ) -> None:
        self._steps, self._grades = steps, grades

    def take(self, step: int, limit: int, policy_version: int) -> list[Graded]:
        rollouts = self._steps[min(step, len(self._steps) - 1)]
        grades = self._grades or [float("nan")] * len(rollouts)
        return [Graded(i, r, g) for i, (r, g) in enumerate(zip(rollouts, grades, strict=True))]

    def push(self, policy_version: int) -> None:
        pass

    def settle(self, policy_version: int) -> None:
        pass

    def state_dict(self, policy_version: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class FixedLength:
    """A curriculum that never moves."""

    needs_entropy = False
    remark = ""

    def __init__(self, max_response_tokens: int = 64) -> None:
        self.max_response_tokens = max_response_tokens

    def due(self, step: int) -> bool:
        return False

    def update(self, step: int, entropy: float | None) -> None:
        raise AssertionError("never due")

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Setup:
    """A student's case and what else a trainer needs to be made, on every rank alike."""

    case: Case
    student_dir: str
    teacher_dirs: Mapping[str, str] = field(default_factory=dict)
    teacher_layout: Layout | None = None
    distributed: bool = False
    dtype: torch.dtype = torch.float32
    recompute: Any = "none"
    offload: bool = False
    adam: Adam = field(default_factory=Adam)
    device: str = "cpu"
    overlap_grad_reduce: bool = False
    layer_spec: LayerSpec = "local"  # "te": of student and teachers, in a world of support.te

    @property
    def _device(self) -> str:
        return self.device if self.layer_spec == "local" else "cuda"

    def student(self, groups: Groups) -> Student:
        adam = self.adam
        section = OptimizerSection(
            learning_rate=adam.learning_rate,
            schedule="constant",
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            clip_grad=adam.clip_grad,
            distributed=self.distributed,
            overlap_grad_reduce=self.overlap_grad_reduce,
        )
        options = ModelOptions(
            dtype=self.dtype,
            device=self._device,
            layer_spec=self.layer_spec,
            sequence_parallel=self.case.sequence_parallel,
            recompute=self.recompute,
        )
        return load_student(self.student_dir, groups, options, section, 100)

    def teachers(self, student: Student) -> dict[str, Teacher]:
        groups = independent_groups(self.teacher_layout or replace(self.case.layout, cp=1))
        return {
            key: Teacher(
                path,
                groups,
                student.facts,
                student.groups,
                ModelOptions(dtype=self.dtype, device=self._device, layer_spec=self.layer_spec),
                self.offload,
            )
            for key, path in sorted(self.teacher_dirs.items())
        }


class RecordingTrainer(Trainer):
    """A trainer that keeps the gradient of a step, before clipping, and its metrics."""

    gradients: dict[str, torch.Tensor]
    last_metrics: dict[str, float]

    def _update(self, rollouts: Sequence[Rollout]) -> Any:
        self.gradients = whole_gradients(self.student)
        return super()._update(rollouts)

    def train_step(self) -> dict[str, float]:
        self.last_metrics = super().train_step()
        return self.last_metrics


def small_buckets(num_parameters: int) -> None:
    """Let the overlapped students of this process have buckets of about so many parameters."""
    made = partial(student_module.DistributedDataParallelConfig, bucket_size=num_parameters)
    setattr(student_module, "DistributedDataParallelConfig", made)  # noqa: B010


def make_trainer(
    student: Student,
    teachers: Mapping[str, Teacher],
    steps: Sequence[Sequence[Rollout]],
    kind: str,
    max_tokens: int = 64,
    grades: Sequence[float] | None = None,
    make: Callable[..., Trainer] = RecordingTrainer,
    **changes: Any,
) -> Any:
    """Make a trainer that goes through `steps`."""
    settings = step_settings(
        objective=objective(kind),
        num_prompts=len(steps[0]),
        max_tokens_per_microbatch=max_tokens,
    )
    collector: Any = GivenRollouts(steps, grades)
    return make(student, teachers, collector, FixedLength(), replace(settings, **changes))


def whole_gradients(student: Student) -> dict[str, torch.Tensor]:
    """Return gradients by HF name, on every rank; scattered ones are gathered first."""
    buffers = [*student.model.buffers, *student.model.expert_parallel_buffers]
    for buffer in buffers:
        if student.model.ddp_config.use_distributed_optimizer:
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
    shards = {name: p.main_grad for name, p in student.bare.named_parameters()}
    spec = student.options.layer_spec
    exported = export_tensors(shards, student.facts, student.groups, spec)
    return {name: tensor.clone() for name, tensor in exported}


def whole_weights(student: Student) -> dict[str, torch.Tensor]:
    """Return weights by HF name, on every rank."""
    shards = dict(student.bare.named_parameters())
    spec = student.options.layer_spec
    exported = export_tensors(shards, student.facts, student.groups, spec)
    return {name: tensor.clone() for name, tensor in exported}


def worst_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Return max over tensors of |found - expected| / max(|expected|, 1e-3 largest |expected|)."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    floor = 1e-3 * max(float(tensor.norm()) for tensor in expected.values())
    return max(
        float((found[name].float() - tensor).norm()) / max(float(tensor.norm()), floor)
        for name, tensor in expected.items()
    )
