"""The problems of every context-parallel rank, solved, are causal attention of each sequence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from megatron_vopd.megatron import context_parallel
from megatron_vopd.megatron.attention import CausalAttention, packed_params
from megatron_vopd.megatron.context_parallel import causal_problems
from megatron_vopd.megatron.microbatch import cp_chunks

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
REAL_VARLEN = signature(varlen.varlen_attn)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Mix [T, heads, d] queries over [K, heads, d] keys, the last query seeing all: by definition.

    Written out with a loop over queries, in the tensors' own type.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    rows = []
    for i, q in enumerate(query):
        seen = len(key) - len(query) + i + 1
        scores = torch.einsum("hd,khd->hk", q, key[:seen]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[:seen]))
    return torch.stack(rows)


def made(lengths: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Make queries, keys, values of a whole row, and weights that make a scalar of the output."""
    draw = torch.Generator().manual_seed(sum(lengths))
    sizes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    made = [torch.randn(sum(lengths), n, HEAD_DIM, generator=draw).to(dtype) for n in sizes]
    return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(made)]


def expected(lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Return the output of the whole row and the gradients of queries, keys and values, in fp64."""
    *inputs, weights = made(lengths)
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    output = torch.cat([attention(*part) for part in parts])
    (output * weights).sum().backward()
    return output.detach(), [x.grad for x in inputs if x.grad is not None]


@contextmanager
def one_process(row_of: Any) -> Iterator[list[tuple[int, ...]]]:
    """Let `gather_keys` find the whole row's keys and values here; list what it was given."""
    given: list[tuple[int, ...]] = []

    def gather(both: Tensor, group: Any) -> Tensor:
        given.append(tuple(both.shape))
        return row_of()

    with mock.patch.object(context_parallel, "gather_from_sequence_parallel_region", gather):
        yield given


def varlen_by_definition(*args: Any, **settings: Any) -> Tensor:
    """Stand in for torch's CUDA kernel: its arguments are checked against torch's own signature."""
    call = REAL_VARLEN.bind(*args, **settings).arguments
    query, key, value = (call[name] for name in ("query", "key", "value"))
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert call["window_size"] == (-1, 0) and call["scale"] is None
    bounds = call["cu_seq_q"], call["cu_seq_k"]
    assert all(b.dtype == torch.int32 for b in bounds)
    lengths = [b.diff().tolist() for b in bounds]
    assert [call["max_q"], call["max_k"]] == [max(own) for own in lengths]
    parts = zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    )
    return torch.cat([attention(*part) for part in parts])


def on_ranks(lengths: list[int], cp: int, dtype: torch.dtype, cuda: bool) -> tuple[Tensor, list]:
    """Run the module as each cp rank, one after another; return what `expected` does."""
    *inputs, weights = made(lengths, dtype)
    query, key, value = inputs
    chunks = [cp_chunks(lengths, rank, cp) for rank in range(cp)]
    order = torch.cat(chunks)
    output = torch.empty(sum(lengths), HEADS, HEAD_DIM, dtype=dtype)
    for rank, own in enumerate(chunks):
        group = SimpleNamespace(rank=lambda at=rank: at, size=lambda: cp)
        module = CausalAttention(None, 1, pg_collection=SimpleNamespace(cp=group))
        with one_process(lambda: torch.stack((key[order], value[order]), dim=1)) as given:
            parts = (query[own], key[own], value[own])
            if cuda:
                with (
                    mock.patch.object(torch.Tensor, "is_cuda", True),
                    mock.patch.object(varlen, "varlen_attn", varlen_by_definition),
                ):
                    mixed = module(*parts, None, packed_seq_params=packed_params(lengths, CPU))
            else:
                mixed = module(*parts, None, packed_seq_params=packed_params(lengths, CPU))
        assert given == ([(len(own), 2, KV_HEADS, HEAD_DIM)] if cp > 1 else [])
        assert mixed.shape == (len(own), HEADS * HEAD_DIM)
        mixed = mixed.view(-1, HEADS, HEAD_DIM)
        output[own] = mixed.detach()
        (mixed * weights[own]).sum().backward()
    return output, [x.grad for x in inputs]


LENGTHS = {
    1: [5, 1, 12],
    2: [4, 16, 8, 40],
    3: [6, 18, 12],
    4: [8, 64, 16, 8],
}


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda arguments"])
@pytest.mark.parametrize("cp", LENGTHS)
def test_attention_over_the_ranks(cp: int, cuda: bool) -> None:
    """Output and gradients in fp64, for a sequence of one token per chunk and longer ones."""
    output, gradients = expected(LENGTHS[cp])
    found, own_gradients = on_ranks(LENGTHS[cp], cp, torch.float64, cuda)
    assert float((found - output).abs().max()) <= 1e-12
    for own, gradient in zip(own_gradients, gradients, strict=True):
        assert float((own - gradient).abs().max()) <= 1e-12


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-2)])
def test_narrower_types(dtype: torch.dtype, bar: float) -> None:
    """The mask has the type of the queries; the error is that of rounding."""
    output, gradients = expected(LENGTHS[4])
    found, own_gradients = on_ranks(LENGTHS[4], 4, dtype, False)
    assert found.dtype == dtype
    assert float((found - output).abs().max()) <= bar
    for own, gradient in zip(own_gradients, gradients, strict=True):
        assert float((own - gradient).norm() / gradient.norm()) <= bar


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_every_rank_has_as_much_to_do(cp: int) -> None:
    draw = random.Random(cp)
    lengths = [2 * cp * draw.randint(1, 9) for _ in range(5)]
    pairs, kept = set(), set()
    for rank in range(cp):
        own = causal_problems(lengths, rank, cp, torch.float32, CPU)
        assert sum(own.num_queries) == sum(lengths) // cp == own.query_bounds[-1]
        # Of k keys, q queries see q k - q (q - 1) / 2.
        sizes = list(zip(own.num_queries, own.num_keys, strict=True))
        pairs.add(sum(q * k - q * (q - 1) // 2 for q, k in sizes))
        kept.add(int(own.key_bounds[-1]))
    assert len(pairs) == len(kept) == 1
    assert pairs.pop() * cp == sum(n * (n + 1) // 2 for n in lengths)
    assert kept.pop() == (sum(lengths) // (2 * cp) * (2 * cp + 1) if cp > 1 else sum(lengths))


def test_one_mask_serves_a_row() -> None:
    """Masks of long and short sequences lie in the memory of one, and none is for square ones."""
    own = causal_problems([8, 64, 16], 1, 4, torch.float32, CPU)
    masks = [own.mask(q, k) for q, k in zip(own.num_queries, own.num_keys, strict=True)]
    assert len({mask.untyped_storage().data_ptr() for mask in masks if mask is not None}) == 1
    for mask, q, k in zip(masks, own.num_queries, own.num_keys, strict=True):
        assert mask is not None
        assert torch.equal(mask == 0, torch.ones(q, k).tril(k - q).bool())
    first = causal_problems([8, 64, 16], 0, 4, torch.float32, CPU)
    assert first.mask(first.num_queries[0], first.num_keys[0]) is None


def test_bounds_are_those_of_the_whole_row() -> None:
    """megatron-core and TransformerEngine divide by cp themselves, positions and chunks alike."""
    row = packed_params((8, 32), CPU)
    assert row.cu_seqlens_q.tolist() == row.cu_seqlens_kv.tolist() == [0, 8, 40]
    assert (row.max_seqlen_q, row.max_seqlen_kv, row.qkv_format) == (32, 32, "thd")
    assert row.cp_group is None and row.local_cp_size is None


def test_a_dense_row_is_not_cut() -> None:
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    module = CausalAttention(None, 1, pg_collection=SimpleNamespace(cp=group))
    query = torch.zeros(4, 1, HEADS, HEAD_DIM)
    with pytest.raises(AssertionError, match="packed rows"):
        module(query, query, query, None)
