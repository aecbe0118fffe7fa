"""Kernels of `transformer_engine_torch` in plain torch, as far as a dense or MoE GPT calls them.

Each computes in fp32 and rounds once to the type that the compiled kernel returns. Signatures are
TransformerEngine's, oldest to newest supported version; where these differ, arguments are found by
their kind. What the project's use never asks for (FP8, dropout, bias in attention) is asserted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

called: Counter[str] = Counter()
# Settings of the last call of the attention kernel, by their names.
attention: dict[str, Any] = {}


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


def _rotated(x: Tensor, angles: Tensor, bounds: Tensor, sign: int) -> Tensor:
    """Rotate packed heads [T, heads, d] by angles [S, 1, 1, d], each sequence from position 0."""
    width, out = angles.shape[-1], torch.empty_like(x)
    for start, stop in itertools.pairwise(bounds.tolist()):
        angle = angles[: stop - start].view(-1, 1, width)
        low, high = x[start:stop, :, :width].float().chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1) * (sign * angle.sin())
        kept = x[start:stop, :, :width].float() * angle.cos()
        out[start:stop, :, :width] = (kept + turned).to(x.dtype)
        out[start:stop, :, width:] = x[start:stop, :, width:]
    return out


def _rope(arguments: tuple[Any, ...], sign: int) -> Tensor:
    x, angles, bounds = (value for value in arguments if isinstance(value, Tensor))
    size_of_cp = arguments[-2]
    assert size_of_cp == 1, "the stand-in rotates whole sequences"
    return _rotated(x, angles, bounds, sign)


def fused_rope_forward(*arguments: Any) -> Tensor:
    """Return rotated heads [T, heads, d] of packed sequences; angles and cu_seqlens are given."""
    return _rope(arguments, 1)


def fused_rope_backward(*arguments: Any) -> Tensor:
    """Return the gradient of `fused_rope_forward`: the rotation back."""
    return _rope(arguments, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """Return causal attention fp32 [T, heads, d] of packed sequences, KV heads shared in order."""
    parts = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        one = [x[start:stop].transpose(0, 1)[None].float() for x in (q, k, v)]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *one, is_causal=True, scale=scale, enable_gqa=True
        )
        parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


def _named(arguments: tuple[Any, ...], kind: str) -> str:
    """Return the name of the one argument that is a member of the enumeration `kind`."""
    names = {a.name for a in arguments if type(a).__name__ == kind}
    assert len(names) == 1, (kind, names)
    return names.pop()


def fused_attn_fwd(*arguments: Any) -> list[Tensor]:
    """Return packed causal attention [T, heads, d], softmax statistics and random state."""
    longest_q, longest_kv, _training, scale, dropout, *_ = arguments
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    bounds, bounds_kv, q, k, v = tensors[:5]
    window = next(a for a in arguments if isinstance(a, tuple | list) and len(a) == 2)
    assert torch.equal(bounds, bounds_kv) and dropout == 0.0
    attention.update(
        layout=_named(arguments, "NVTE_QKV_Layout"),
        mask=_named(arguments, "NVTE_Mask_Type"),
        bias=_named(arguments, "NVTE_Bias_Type"),
        window=tuple(window),
        longest=(longest_q, longest_kv),
        bounds=bounds.tolist(),
        heads=(q.shape[1], k.shape[1]),
        scale=scale,
    )
    out = _attend(q, k, v, bounds, scale).to(q.dtype)
    return [out, torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*arguments: Any) -> list[Tensor | None]:
    """Return the gradients of q, k and v, and none of a bias or of softmax offsets."""
    scale = arguments[2]
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    bounds, _, q, k, v, _out, grad = tensors[:7]
    heads = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = _attend(*heads, bounds, scale)
    return [*torch.autograd.grad(out, heads, grad.reshape(out.shape).float()), None, None]


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
    multi_tensor_l2norm,
    multi_tensor_scale,
    multi_tensor_adam,
)
