"""Normalisation and attention for megatron-core's local layer spec, on any device.

megatron-core's own packed attention and its norm under sequence parallelism need TransformerEngine.
These two modules take their place where it is absent, so that packing, sequence parallelism and
pipelines run for real on a CPU, and on a GPU without extra packages.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, weight in the model's dtype.

    Under sequence parallelism each tp rank sees its own tokens, so the weight's gradient is a
    partial sum: its mark `sequence_parallel` makes megatron-core add the parts up over tp.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise hidden [..., hidden_size]; shape and dtype stay."""
        return rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class CausalAttention(torch.nn.Module):
    """Causal attention over this rank's heads: dense [S, B, heads, d] or packed [T, heads, d].

    Padding belongs at the end of a row, where a causal query never sees it; attention masks are
    refused. Packed rows hold several sequences, bounded by `cu_seqlens`; each attends to itself.
    Grouped query heads share KV heads in order.
    """

    def __init__(
        self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError(
                f"cp={config.context_parallel_size} needs TransformerEngine's attention; "
                "install it and set parallel.backend: te, or use cp=1"
            )
        self.layer_number = layer_number
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return the mixed values [S, B, heads * d], or [T, heads * d] for packed rows."""
        assert attention_mask is None, "causal attention takes no mask: pad at the end"
        assert attention_bias is None, "causal attention takes no bias"
        if packed_seq_params is None:
            mixed = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return mixed.permute(2, 0, 1, 3).flatten(2)
        if query.is_cuda:
            return self._attend_packed_cuda(query, key, value, packed_seq_params).flatten(1)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        rows = [
            self._attend(*(x.transpose(0, 1)[None] for x in sequence))[0].transpose(0, 1)
            for sequence in zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(rows).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return attention [B, heads, S, d]; key and value may have fewer heads than query."""
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
        )

    def _attend_packed_cuda(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.11 shares KV heads only by repeating them; `enable_gqa` came with 2.12.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        mixed = varlen_attn(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            scale=self.scale,
            window_size=(-1, 0),
        )
        assert isinstance(mixed, Tensor)
        return mixed


def packed_params(lengths: list[int], device: torch.device | str) -> PackedSeqParams:
    """Return the bounds of the sequences that lie one after another in a packed row.

    Args:
        lengths: tokens of each sequence, all positive; they fill the row.
        device: where the row's hidden states live.
    """
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bounds = bounds.to(device)
    # The longest sequence, not the row: when the two are equal megatron-core lets positions run
    # through the whole row, and rotary attention forgives that only up to rounding.
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
