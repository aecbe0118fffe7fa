"""The trained model with its gradient buffers, optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_vopd.config.schema import OptimizerSection
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.tensors import read_config
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.microbatch import PackingSettings
from megatron_vopd.megatron.model import ModelOptions, build_model, head_weight
from megatron_vopd.megatron.weights import load_weights


@dataclass(frozen=True)
class Student:
    """The student as training holds it on this rank.

    Attributes:
        model: DistributedDataParallel around the bare GPTModel (`model.module`).
        optimizer: megatron-core's, fp32 main parameters under bf16.
        scheduler: its learning rate.
        clip_grad: largest gradient norm; 0: no clipping.
    """

    model: Any
    facts: ModelFacts
    groups: Groups
    options: ModelOptions
    optimizer: Any
    scheduler: OptimizerParamScheduler
    clip_grad: float

    @property
    def bare(self) -> Any:
        """The GPTModel: what `export_weights` and checkpoints take."""
        return self.model.module

    @property
    def head_VD(self) -> Tensor:  # noqa: N802
        """This rank's rows of the vocabulary head, on the last stage."""
        return head_weight(self.bare)

    @property
    def sequence_parallel(self) -> bool:
        """True where activations are cut along the sequence between tp ranks."""
        return self.options.sequence_parallel and self.groups.layout.tp > 1

    @property
    def counts_tokens(self) -> bool:
        """True where this rank's tokens count, so that a sum over ranks counts each token once."""
        return self.groups.is_last_stage and self.groups.coordinates.tp == 0

    def packing(self, max_tokens: int) -> PackingSettings:
        """Return how rows for this student are made."""
        layout = self.groups.layout
        alignment = layout.tp if self.sequence_parallel else 1
        return PackingSettings(layout.dp, max_tokens, alignment, layout.cp)


def load_student(
    model_dir: str | Path,
    groups: Groups,
    options: ModelOptions,
    section: OptimizerSection,
    num_steps: int,
) -> Student:
    """Build the student, fill it from a HuggingFace folder, and give it an optimizer.

    Args:
        groups: from `groups.student_groups`.
        num_steps: of the run; the schedule reaches its end at the last one.

    Raises:
        ModelError, LayoutError: the folder is no supported model, or cannot be cut this way.
    """
    config, facts = read_config(model_dir)
    bare = build_model(config, facts, groups, options)
    load_weights(bare, facts, groups, model_dir, options.layer_spec)
    bare.config.finalize_model_grads_func = finalize_model_grads
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=section.distributed,
        overlap_grad_reduce=section.overlap_grad_reduce,
    )
    model = DistributedDataParallel(bare.config, buffers, bare)
    if section.overlap_grad_reduce:
        # The schedules leave it for the backward of the last row: only then gradients are whole.
        bare.config.no_sync_func = model.no_sync
    # megatron-core's own checkpoints would gather moments over gloo; ours are in `checkpoint`.
    own = _optimizer_config(section, options)
    optimizer = get_megatron_optimizer(own, [model], use_gloo_process_groups=False)
    scheduler = make_scheduler(optimizer, section, num_steps)
    return Student(model, facts, groups, options, optimizer, scheduler, section.clip_grad)


def _optimizer_config(section: OptimizerSection, options: ModelOptions) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=section.learning_rate,
        min_lr=section.min_learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=options.dtype == torch.bfloat16,
        params_dtype=options.dtype,
        use_distributed_optimizer=section.distributed,
    )


def make_scheduler(
    optimizer: Any, section: OptimizerSection, num_steps: int
) -> OptimizerParamScheduler:
    """Make megatron-core's scheduler of the learning rate of step n = 0 .. num_steps - 1.

    The warm-up rises over `warmup_steps` steps from peak / (warmup_steps + 1), so that no step is
    spent at rate 0; the step after it has the peak, and the last step `min_learning_rate`.
    """
    warmup, peak = section.warmup_steps, section.learning_rate
    return OptimizerParamScheduler(
        optimizer,
        init_lr=peak / (warmup + 1),
        max_lr=peak,
        min_lr=section.min_learning_rate,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(num_steps - 1, warmup + 1),
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate(optimizer: Any) -> float:
    """Return the learning rate of the next update; parameter groups share one schedule."""
    return float(optimizer.param_groups[0]["lr"]) if optimizer.param_groups else 0.0


@torch.no_grad()
def clip_gradients(optimizer: Any, clip_grad: float, grad_norm: float) -> None:
    """Scale ready gradients so that their global norm is at most `clip_grad`; 0: leave them."""
    if clip_grad == 0:
        return
    members: Iterable[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    for member in members:
        if not getattr(member, "is_stub_optimizer", False):
            clip_grad_by_total_norm_fp32(member.get_parameters(), clip_grad, grad_norm)
