"""Packed rows are cut fairly: over context-parallel ranks, and over a teacher's replicas."""

from __future__ import annotations

import pytest
import torch

from megatron_vopd.megatron.microbatch import (
    PackingSettings,
    cp_chunks,
    cp_shard,
    cp_tokens,
    empty_row,
)
from megatron_vopd.megatron.teacher import teacher_plan
from megatron_vopd.trainer.packing import pack
from tests.support.data_cases import random_rollouts


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_context_parallel_shards_cover_the_row_once(cp: int) -> None:
    settings = PackingSettings(1, 400, alignment=2, cp=cp)
    rollouts = random_rollouts(12, 5)
    (rows,) = pack(rollouts, settings, [1.0] * 12)
    for row in (planned.microbatch for planned in rows):
        shards = [cp_shard(row, rank, cp) for rank in range(cp)]
        chunks = [cp_chunks(row.lengths, rank, cp) for rank in range(cp)]
        assert sorted(torch.cat(chunks).tolist()) == list(range(len(row.ids_S)))
        assert len({len(shard.ids_S) for shard in shards}) == 1
        tokens = [cp_tokens(row, rank, cp) for rank in range(cp)]
        assert sorted(torch.cat(tokens).tolist()) == list(range(row.num_tokens))
        for shard, chunk, own in zip(shards, chunks, tokens, strict=True):
            assert shard.lengths == row.lengths
            assert torch.equal(shard.ids_S, row.ids_S[chunk])
            assert torch.equal(shard.labels_T, row.labels_T[own])
            # The local position points to the same place of the whole row.
            assert torch.equal(chunk[shard.rows_T], row.rows_T[own])


def test_chunks_of_a_sequence_are_those_of_megatron() -> None:
    """Rank r holds chunks r and 2 cp - 1 - r of each sequence."""
    assert cp_chunks([8, 4], 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert cp_chunks([8, 4], 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


def test_teacher_replicas_score_equally_many_rows() -> None:
    plan = teacher_plan([5, 9, 1, 7, 3], 2)
    assert sorted(i for hand in plan for i in hand if i is not None) == [0, 1, 2, 3, 4]
    assert [len(hand) for hand in plan] == [3, 3]
    (row,) = pack(random_rollouts(3, 1), PackingSettings(1, 200, alignment=4))[0]
    filling = empty_row(row)
    assert filling.num_tokens == 0 and sum(filling.lengths) == len(filling.ids_S)
