"""Shapes of the compiled operators for tracing (fake tensors): no arithmetic, no data.

Imported by `ops.native` after the extension, which defines the schemas.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
