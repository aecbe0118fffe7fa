"""TransformerEngine's attention and rotary kernels in plain torch, for packed sequences (THD).

Under context parallelism each of `cp` ranks holds two of the 2 cp chunks of every sequence, chunk r
and chunk 2 cp - 1 - r, and the keys go around. The merging of partial results is then a matter of
small kernels, `thd_*`, on the halves of each sequence; log-sums of exponentials are [heads, T].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Settings of the last call of `fused_attn_fwd`, by their names.
attention: dict[str, Any] = {}


def _positions(length: int, size: int, rank: int) -> Tensor:
    """Return where a rank's tokens of one sequence stand in it: `length` tokens in two chunks."""
    if size == 1:
        return torch.arange(length)
    half = length // 2
    firsts = (rank * half, (2 * size - 1 - rank) * half)
    return torch.cat([torch.arange(first, first + half) for first in firsts])


def _rotated(arguments: tuple[Any, ...], sign: int) -> Tensor:
    """Rotate packed heads [T, heads, d] by angles [S, 1, 1, d], each sequence from position 0."""
    x, angles, bounds = (value for value in arguments if isinstance(value, Tensor))
    size, rank = arguments[-2:]
    width, out = angles.shape[-1], torch.empty_like(x)
    for start, stop in pairwise((bounds // size).tolist()):
        angle = angles[_positions(stop - start, size, rank)].view(-1, 1, width)
        low, high = x[start:stop, :, :width].float().chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1) * (sign * angle.sin())
        kept = x[start:stop, :, :width].float() * angle.cos()
        out[start:stop, :, :width] = (kept + turned).to(x.dtype)
        out[start:stop, :, width:] = x[start:stop, :, width:]
    return out


def fused_rope_forward(*arguments: Any) -> Tensor:
    """Return rotated heads [T, heads, d]; given are angles, cu_seqlens, size and rank of cp."""
    return _rotated(arguments, 1)


def fused_rope_backward(*arguments: Any) -> Tensor:
    """Return the gradient of `fused_rope_forward`: the rotation back."""
    return _rotated(arguments, -1)


def _named(arguments: tuple[Any, ...], kind: str) -> str:
    """Return the name of the one argument that is a member of the enumeration `kind`."""
    names = {a.name for a in arguments if type(a).__name__ == kind}
    assert len(names) == 1, (kind, names)
    return names.pop()


def _each(arguments: tuple[Any, ...]) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield each sequence's rows of q, its rows of k and v, and the mask [q, k] of what is seen."""
    bounds_q, bounds_kv = [value for value in arguments if isinstance(value, Tensor)][:2]
    is_causal = _named(arguments, "NVTE_Mask_Type") == "NVTE_PADDING_CAUSAL_MASK"
    both = zip(pairwise(bounds_q.tolist()), pairwise(bounds_kv.tolist()), strict=True)
    for (start, stop), (start_kv, stop_kv) in both:
        seen = torch.ones(stop - start, stop_kv - start_kv, dtype=torch.bool)
        assert not is_causal or seen.shape[0] == seen.shape[1]
        yield slice(start, stop), slice(start_kv, stop_kv), seen.tril() if is_causal else seen


def _heads(x: Tensor, rows: slice, num_heads: int) -> Tensor:
    """Return rows of [T, heads, d] as [num_heads, rows, d] fp32, KV heads repeated in order."""
    return x[rows].float().transpose(0, 1).repeat_interleave(num_heads // x.shape[1], dim=0)


def fused_attn_fwd(*arguments: Any) -> list[Tensor]:
    """Return attention [T, heads, d], log-sums of exponentials [T, heads, 1] and random state."""
    longest_q, longest_kv, _training, scale, dropout, *_ = arguments
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    bounds, _, q, k, v = tensors[:5]
    window = next(a for a in arguments if isinstance(a, tuple | list) and len(a) == 2)
    assert dropout == 0.0
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
    out, sums = torch.zeros_like(q), torch.zeros(*q.shape[:2], 1)
    for rows, rows_kv, seen in _each(arguments):
        num = q.shape[1]
        scores = _heads(q, rows, num) @ _heads(k, rows_kv, num).transpose(1, 2) * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        out[rows] = (scores.softmax(-1) @ _heads(v, rows_kv, num)).transpose(0, 1).to(q.dtype)
        sums[rows, :, 0] = scores.logsumexp(-1).t()
    return [out, sums, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*arguments: Any) -> list[Tensor | None]:
    """Return the gradients of q, k and v, and none of a bias or of softmax offsets.

    Under context parallelism the given log-sums are those over all keys, not only the given ones.
    """
    scale = arguments[2]
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    _, _, q, k, v, out, grad_out = tensors[:7]
    sums = next(a for a in arguments if isinstance(a, list) and isinstance(a[0], Tensor))[0]
    out, grad_out = out.view(q.shape), grad_out.reshape(q.shape)
    grads = [torch.zeros(x.shape) for x in (q, k, v)]
    num, shared = q.shape[1], q.shape[1] // k.shape[1]
    for rows, rows_kv, seen in _each(arguments):
        query, key, value = _heads(q, rows, num), _heads(k, rows_kv, num), _heads(v, rows_kv, num)
        mixed, grad = _heads(out, rows, num), _heads(grad_out, rows, num)
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        weights = (scores - sums[rows, :, 0].t()[..., None]).exp()
        onto = grad @ value.transpose(1, 2) - (grad * mixed).sum(-1, keepdim=True)
        onto = weights * onto * scale
        grads[0][rows] = (onto @ key).transpose(0, 1)
        for target, repeated in (
            (grads[1], onto.transpose(1, 2) @ query),
            (grads[2], weights.transpose(1, 2) @ grad),
        ):
            summed = repeated.unflatten(0, (-1, shared)).sum(1)
            target[rows_kv] = summed.transpose(0, 1)
    return [*(grad.to(q.dtype) for grad in grads), None, None]


def _half_rows(bounds: Tensor, half: int) -> Tensor:
    """Return the rows of the first (0) or second (1) half of each sequence."""
    parts = []
    for start, stop in pairwise(bounds.tolist()):
        middle = (start + stop) // 2
        parts.append(torch.arange(start, middle) if half == 0 else torch.arange(middle, stop))
    return torch.cat(parts)


def thd_read_half_tensor(x: Tensor, bounds: Tensor, half: int) -> Tensor:
    """Return one half of each sequence of x [T, ...]."""
    return x[_half_rows(bounds, half)]


def thd_read_second_half_lse(sums: Tensor, bounds: Tensor, packed: bool, _length: int) -> Tensor:
    """Return the log-sums [heads, T / 2] of each sequence's second half."""
    assert packed
    return sums[:, _half_rows(bounds, 1)]


def thd_second_half_lse_correction(
    sums: Tensor, of_step: Tensor, bounds: Tensor, packed: bool
) -> None:
    """Add a step's exponentials, of second halves only, to the log-sums [heads, T] in place."""
    assert packed
    rows = _half_rows(bounds, 1)
    sums[:, rows] = torch.logaddexp(sums[:, rows], of_step)


def thd_out_correction(
    out: Tensor,
    of_step: Tensor,
    old: Tensor,
    new: Tensor,
    sums_of_step: Tensor,
    bounds: Tensor,
    second_half_only: bool,
    packed: bool,
) -> None:
    """Merge a step's attention into `out` [T, heads, d] in place, both weighted by their sums."""
    assert packed
    rows = _half_rows(bounds, 1) if second_half_only else torch.arange(len(out))
    kept = (old - new).exp()[:, rows].t()[..., None]
    added = (sums_of_step - new[:, rows]).exp().t()[..., None]
    merged = out[rows].float() * kept + of_step.view(len(rows), *out.shape[1:]).float() * added
    out[rows] = merged.to(out.dtype)


def thd_grad_correction(
    grad: Tensor, of_step: Tensor, bounds: Tensor, first_half: str, second_half: str
) -> None:
    """Copy or add a step's gradient [T or T / 2, ...] into halves of `grad`, or zero them."""
    for half, action in enumerate((first_half, second_half)):
        rows = _half_rows(bounds, half)
        if action == "zero":
            grad[rows] = 0
        elif action in ("copy", "add"):
            source = of_step if len(of_step) < len(grad) else of_step[rows]
            grad[rows] = source + grad[rows] if action == "add" else source
        else:
            assert action == "none", action
