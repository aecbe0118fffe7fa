"""Kernels of `transformer_engine_torch` in plain torch, as far as a dense or MoE GPT calls them.

Each computes in fp32 and rounds once to the type that the compiled kernel returns. Signatures are
TransformerEngine's, oldest to newest supported version; where these differ, arguments are found by
their kind. What the project's use never asks for (FP8, dropout, bias in attention) is asserted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.te.attention import (
    fused_attn_bwd,
    fused_attn_fwd,
    fused_rope_backward,
    fused_rope_forward,
    thd_grad_correction,
    thd_out_correction,
    thd_read_half_tensor,
    thd_read_second_half_lse,
    thd_second_half_lse_correction,
)

called: Counter[str] = Counter()


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, _dtype: Any, *rest: Any
) -> tuple[Tensor, None, Tensor]:
    """Return the normalised x [N, D], None (there is no mean), and 1 / root mean square [N]."""
    zero_centered = rest[-1]
    assert out is None and quantizer is None and not zero_centered
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    return (x.float() * scale[:, None] * weight.float()).to(x.dtype), None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [N, D] and of the weight [D]."""
    unit = x.detach().float() * scale[:, None]
    grad = grad.reshape(x.shape).float()
    onto = grad * weight.detach().float()
    grad_x = scale[:, None] * (onto - unit * (onto * unit).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad * unit).sum(0).to(weight.dtype)


def _product(a: Tensor, trans_a: bool, b: Tensor, trans_b: bool) -> Tensor:
    """Return op(B) op(A) in fp32: cuBLAS reads the row-major operands as their transposes."""
    a, b = a.detach().flatten(0, -2).float(), b.detach().flatten(0, -2).float()
    return (b.t() if trans_b else b) @ (a.t() if trans_a else a)


def _store(out: Tensor, product: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(product.view(out.shape))
    else:
        out.copy_(product.view(out.shape))


def generic_gemm(
    a: Tensor,
    trans_a: bool,
    b: Tensor,
    trans_b: bool,
    out: Tensor | None,
    quantizer: Any,
    _out_dtype: Any,
    bias: Tensor | None,
    _bias_dtype: Any,
    gelu: bool,
    _gelu_in: Any,
    grad: bool,
    _workspace: Any,
    _workspace_size: int,
    accumulate: bool,
    _split_accumulator: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None, None, Any]:
    """Return op(B) op(A) (+ bias), the bias' gradient where `grad`, None, and the extra output."""
    assert quantizer is None and not gelu
    product, bias_grad = _product(a, trans_a, b, trans_b), None
    if bias is not None and grad:
        bias_grad = b.float().flatten(0, -2).sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if out is not None:
        _store(out, product, accumulate)
    else:
        shape = product.shape if trans_b else (*b.shape[:-1], product.shape[-1])
        out = product.view(shape).to(a.dtype)
    return out, bias_grad, None, options.get("extra_output")


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    trans_a: bool,
    b: Sequence[Tensor],
    trans_b: bool,
    out: Sequence[Tensor],
    _out_dtype: Any,
    splits: Any,
    bias: Any,
    _bias_dtype: Any,
    single_output: bool,
    *rest: Any,
) -> Any:
    """Multiply each expert's operands as `generic_gemm` does; write into `out`, return the bias."""
    accumulate = rest[4]  # pre-gelu, grad, workspaces, size of one, accumulate, ...
    outputs = out[0].split([int(size) for size in splits]) if single_output else out
    for weight, rows, target in zip(a, b, outputs, strict=True):
        _store(target, _product(weight, trans_a, rows, trans_b), accumulate)
    return bias


def multi_tensor_l2norm(
    _chunk: int, _overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor]:
    """Return the norm over all tensors [1], and nothing per tensor."""
    assert not per_tensor
    squares = [tensor.float().square().sum() for tensor in lists[0]]
    return torch.stack(squares).sum().sqrt()[None], torch.zeros(0)


def multi_tensor_scale(
    _chunk: int, _overflow: Tensor, lists: list[list[Tensor]], scale: float
) -> None:
    """Write the scaled tensors of the first list into the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    _chunk: int,
    _overflow: Tensor,
    lists: list[list[Tensor]],
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Update parameters and moments in place: AdamW with bias correction."""
    assert decoupled and bias_correction
    for grad, parameter, first, second in zip(*lists, strict=True):
        first.mul_(beta1).add_(grad.float(), alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad.float(), grad.float(), value=1 - beta2)
        root = (second / (1 - beta2**step)).sqrt().add_(eps)
        update = first / (1 - beta1**step) / root + weight_decay * parameter.float()
        parameter.copy_(parameter.float() - rate * update)


KERNELS = (
    rmsnorm_fwd,
    rmsnorm_bwd,
    generic_gemm,
    te_general_grouped_gemm,
    fused_rope_forward,
    fused_rope_backward,
    fused_attn_fwd,
    fused_attn_bwd,
    thd_read_half_tensor,
    thd_read_second_half_lse,
    thd_second_half_lse_correction,
    thd_out_correction,
    thd_grad_correction,
    multi_tensor_l2norm,
    multi_tensor_scale,
    multi_tensor_adam,
)
