"""Normalisation and attention for megatron-core's local layer spec, on any device.

megatron-core's own packed attention and its norm under sequence parallelism need TransformerEngine.
These two modules take their place where it is absent, so that packing, sequence parallelism and
pipelines run for real on a CPU, and on a GPU without extra packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from megatron_vopd.megatron.context_parallel import Problems, causal_problems, gather_keys


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


@dataclass
class PackedRow(PackedSeqParams):
    """Bounds of a packed row's sequences, as megatron-core and TransformerEngine take them.

    They are those of the whole row on every context-parallel rank.

    Attributes:
        lengths: the same, on the host.
        problems: what `CausalAttention` attends to on this rank; its first layer writes it down.
    """

    lengths: tuple[int, ...] = ()
    problems: Problems | None = None


class CausalAttention(torch.nn.Module):
    """Causal attention over this rank's heads: dense [S, B, heads, d] or packed [T, heads, d].

    Padding belongs at the end of a row, where a causal query never sees it; attention masks are
    refused. Packed rows hold several sequences; each attends to itself, also where context
    parallelism cuts it (`context_parallel`; dense rows cannot be cut). Grouped query heads share KV
    heads in order.

    Args:
        pg_collection: megatron-core's process groups; `cp` is used.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *,
        pg_collection: Any,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale
        self._cp: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """Return the mixed values [S, B, heads * d], or [T, heads * d] for packed rows.

        Under context parallelism T is this rank's part of the row, and keys and values are gathered
        over cp (`gather_keys`).
        """
        assert attention_mask is None, "causal attention takes no mask: pad at the end"
        assert attention_bias is None, "causal attention takes no bias"
        if packed_seq_params is None:
            assert self._cp.size() == 1, "context parallelism takes packed rows"
            mixed = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return mixed.permute(2, 0, 1, 3).flatten(2)
        problems = self._problems(packed_seq_params, query)
        key, value = gather_keys(key, value, problems, self._cp)
        attend = self._attend_packed_cuda if query.is_cuda else self._attend_packed
        return attend(query, key, value, problems).flatten(1)

    def _problems(self, row: PackedRow, query: Tensor) -> Problems:
        """Return the problems of this rank in the row, made once for all layers."""
        if row.problems is None:
            at = (self._cp.rank(), self._cp.size())
            row.problems = causal_problems(row.lengths, *at, query.dtype, query.device)
        return row.problems

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return attention [B, heads, S, d]; key and value may have fewer heads than query.

        Args:
            mask: added to the scores; None: plainly causal.
        """
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=True,
        )

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, problems: Problems
    ) -> Tensor:
        """Return the mixed values [T, heads, d], one problem after another."""
        queries = query.split(problems.num_queries)
        keys, values = (x.split(problems.num_keys) for x in (key, value))
        mixed = []
        for q, k, v in zip(queries, keys, values, strict=True):
            mask = problems.mask(len(q), len(k))
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            mixed.append(self._attend(q, k, v, mask)[0].transpose(0, 1))
        return torch.cat(mixed)

    def _attend_packed_cuda(
        self, query: Tensor, key: Tensor, value: Tensor, problems: Problems
    ) -> Tensor:
        """Return the same by torch's variable-length kernel; with cp > 1 not yet run on a GPU."""
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.11 shares KV heads only by repeating them; `enable_gqa` came with 2.12.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        # Its causal mask is aligned to the last key, as the problems are: the window (-1, 0) lets
        # query i of q see keys up to i + k - q.
        mixed = varlen_attn(
            query,
            key,
            value,
            problems.query_bounds,
            problems.key_bounds,
            max(problems.num_queries),
            max(problems.num_keys),
            scale=self.scale,
            window_size=(-1, 0),
        )
        assert isinstance(mixed, Tensor)
        return mixed


def packed_params(lengths: Sequence[int], device: torch.device | str) -> PackedRow:
    """Return the bounds of the sequences that lie one after another in a packed row.

    Args:
        lengths: tokens of each sequence, all positive; they fill the row, the whole one also where
            context parallelism cuts it.
        device: where the row's hidden states live.
    """
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bounds = bounds.to(device)
    # The longest sequence, not the row: when the two are equal megatron-core lets positions run
    # through the whole row, and rotary attention forgives that only up to rounding.
    longest = max(lengths)
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
    )
