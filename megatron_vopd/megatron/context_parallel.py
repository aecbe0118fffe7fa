"""Causal attention of a context-parallel rank: which keys its queries see, and how they come.

Rank r holds chunks r and 2 cp - 1 - r of every sequence (`microbatch.cp_chunks`). A causal query
sees the keys up to its own place in its sequence, so chunk c attends to chunks 0 .. c: two problems
for each sequence, each of a block of queries at the end of a prefix of the keys. The two prefixes
together have 2 cp + 1 chunks on every rank, which balances the work.

Keys and values come from all ranks by one all-gather in each layer, before KV heads are repeated.
The prefixes are kept for the backward pass, (2 cp + 1) / 2 times a rank's own keys and values, or
gathered again where attention is recomputed. A ring would keep a rank's own alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_vopd.megatron.microbatch import cp_chunks


@dataclass(frozen=True)
class Problems:
    """The causal problems of one rank in a packed row, in the order of its queries.

    The last query of a problem sees all of its keys, the one before it all but the last, and so on.

    Attributes:
        num_queries: of each problem; together they fill the rank's part of the row.
        num_keys: of each problem, never fewer than its queries.
        places: [sum of num_keys] int64 positions in the gathered keys; None: the rank's own keys as
            they lie.
        dtype, device: of queries and keys.
    """

    num_queries: tuple[int, ...]
    num_keys: tuple[int, ...]
    places: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def query_bounds(self) -> Tensor:
        """[problems + 1] int32 position of each problem's first query, and the number of all."""
        return self._bounds(self.num_queries)

    @cached_property
    def key_bounds(self) -> Tensor:
        """[problems + 1] int32 position of each problem's first key, and the number of all."""
        return self._bounds(self.num_keys)

    def _bounds(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)

    def mask(self, num_queries: int, num_keys: int) -> Tensor | None:
        """Return what is added to a problem's scores, [queries, keys]; None: as many as queries.

        One tensor serves all problems of the row in all layers: each takes a corner of it.
        """
        if num_keys == num_queries:
            return None
        rows, columns = self._widest.shape
        first = (columns - rows) - (num_keys - num_queries)
        return self._widest[:num_queries, first : first + num_keys]

    @cached_property
    def _widest(self) -> Tensor:
        """The mask of as many queries as any problem has, behind the longest prefix of any."""
        rows = max(self.num_queries)
        before = max(k - q for q, k in zip(self.num_queries, self.num_keys, strict=True))
        hidden = torch.full((rows, before + rows), -torch.inf, dtype=self.dtype, device=self.device)
        return hidden.triu(before + 1)


def causal_problems(
    lengths: Sequence[int], rank: int, cp: int, dtype: torch.dtype, device: torch.device
) -> Problems:
    """Return what cp rank `rank` attends to in a row.

    Args:
        lengths: of the sequences of the whole row, multiples of 2 cp (any, when cp is 1).
        dtype, device: of queries and keys.
    """
    if cp == 1:
        return Problems(tuple(lengths), tuple(lengths), None, dtype, device)
    # Gathered keys lie rank after rank, each rank's chunks in its order.
    gathered = torch.cat([cp_chunks(lengths, other, cp) for other in range(cp)])
    place_of = torch.empty_like(gathered)
    place_of[gathered] = torch.arange(len(gathered))
    num_queries, num_keys, prefixes = [], [], []
    for sequence in place_of.split(list(lengths)):
        chunk = len(sequence) // (2 * cp)
        for position in (rank, 2 * cp - 1 - rank):
            num_queries.append(chunk)
            num_keys.append((position + 1) * chunk)
            prefixes.append(sequence[: num_keys[-1]])
    places = torch.cat(prefixes).to(device)
    return Problems(tuple(num_queries), tuple(num_keys), places, dtype, device)


def gather_keys(
    key: Tensor, value: Tensor, problems: Problems, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return keys and values of this rank's problems, [sum of num_keys, heads, d].

    Crosses the wire, where cp > 1: forward one all-gather of [T / cp, 2, KV heads, d] from each
    rank; backward one reduce-scatter of [T, 2, KV heads, d] to the owners, in the same dtype.
    Where attention is recomputed, the all-gather is made again instead of being kept.

    Args:
        key, value: [T / cp, KV heads, d] of this rank's part of the row.
        group: the context-parallel ranks.
    """
    if problems.places is None:
        return key, value
    # Its name is from the tp region: the gather of equal parts whose gradients are summed.
    both = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=group)
    key, value = both.index_select(0, problems.places).unbind(1)
    return key, value
