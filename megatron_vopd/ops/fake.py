"""Shapes of the compiled operators for tracing (fake tensors): no arithmetic, no data.

Imported by `ops.native` after the extension, which defines the schemas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vopd.ops.fields import FINAL, TUPLE


@torch.library.register_fake("megatron_vopd::merge_topk")
def _merge_topk(
    student: Tensor, teacher: Tensor, lengths: Tensor, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_ranks, num_tokens, _ = student.shape
    return (
        student.new_empty(num_tokens, topk),
        teacher.new_empty(num_tokens, topk),
        lengths.new_empty(num_tokens, num_ranks),
    )


@torch.library.register_fake("megatron_vopd::local_stats")
def _local_stats(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_valid: int,
    temperature: float,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, k = student.shape[0], min(topk, num_valid)
    return (
        student.new_empty(num_tokens, len(TUPLE), dtype=torch.float64),
        student.new_empty(num_tokens, k, dtype=torch.float32),
        student.new_empty(num_tokens, k, dtype=torch.float32),
        labels.new_empty(num_tokens, k),
    )


@torch.library.register_fake("megatron_vopd::merge_stats")
def _merge_stats(packed: Tensor, optimal_floor: float) -> Tensor:
    return packed.new_empty(packed.shape[1], len(FINAL))


@torch.library.register_fake("megatron_vopd::logits_gradient")
def _logits_gradient(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


@torch.library.register_fake("megatron_vopd::logits_gradient_narrow_")
@torch.library.register_fake("megatron_vopd::logits_gradient_")
def _logits_gradient_in_place(student: Tensor, *_: Any) -> None:
    return None
