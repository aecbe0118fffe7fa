"""The mapping table by itself: names, shapes and pieces, without any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import hf_tensors, model_units, shard_parameters, shard_plan
from megatron_vopd.types import Layout
from tests.support.tiny_models import ARCHITECTURES, TinyModel, reference_tensors

FACTS = ModelFacts(
    model_type="qwen3",
    num_layers=2,
    hidden_size=64,
    ffn_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    vocab_size=160,
    max_positions=128,
    norm_eps=1e-6,
    tied=False,
)
FACTS_OF = {
    "qwen3": FACTS,
    "qwen2": replace(FACTS, model_type="qwen2", head_dim=16),
    "qwen3_moe": replace(
        FACTS, model_type="qwen3_moe", num_experts=4, expert_ffn_size=40, experts_per_token=2
    ),
}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_on_disk(model_type: str, tied: bool, tmp_path: Path) -> None:
    from megatron_vopd.hf.tensors import read_config

    folder = TinyModel(model_type, tied, 157).save(tmp_path)
    _, facts = read_config(folder)
    on_disk = {name: tuple(t.shape) for name, t in reference_tensors(folder).items()}
    assert dict(hf_tensors(facts)) == on_disk


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "qwen3_moe"])
def test_every_element_lies_on_one_rank(tp: int, kv_heads: int, model_type: str) -> None:
    """Shards of all ranks together hold each element of a cut tensor once, and nothing else."""
    facts = replace(FACTS_OF[model_type], num_kv_heads=kv_heads, vocab_size=157)
    for unit in model_units(facts):
        for rule in unit.rules:
            if rule.cut == "replicated" or unit.expert is not None:
                continue
            counts = {n: torch.zeros(hf_tensors(facts)[n]) for n in unit.hf_names()}
            for rank in range(tp):
                plan = unit.plan(rule, facts, rank, tp)
                shard = torch.zeros(plan.shape)
                for piece in plan.pieces:
                    counts[piece.name][piece.source] += 1
                    shard[piece.target] += 1
                surplus = shard.numel() - int(shard.sum())
                assert shard.max() <= 1
                assert surplus == 0 or rule.cut == "vocab"
            names = {n.format(i=unit.layer, e=unit.expert) for n in rule.hf}
            assert all(torch.all(counts[name] == 1) for name in names), rule.local


def test_repeated_kv_heads_stand_beside_their_queries() -> None:
    """With four ranks and two KV heads, rank r holds query head r and KV head r // 2."""
    names = ("q", "k", "v")
    facts = replace(FACTS, num_kv_heads=2)
    full_names = tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in names)
    for rank in range(4):
        plan = shard_plan("qkv", full_names, facts, rank, 4, kv_repeat=2)
        first_rows = [piece.source[0].start // 24 for piece in plan.pieces]
        assert first_rows == [rank, rank // 2, rank // 2]
        assert plan.shape == (3 * 24, 64)


def test_fewer_kv_heads_than_ranks_cut_through_a_head() -> None:
    """One KV head and six blocks of 24 rows over four ranks: each gets 36 rows, half heads too."""
    facts = replace(FACTS, num_kv_heads=1)
    full_names = tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    plans = [shard_plan("qkv", full_names, facts, rank, 4) for rank in range(4)]
    assert [plan.shape[0] for plan in plans] == [36] * 4
    spans = [[(p.name[-13], p.source[0].start, p.source[0].stop) for p in x.pieces] for x in plans]
    assert spans == [
        [("q", 0, 36)],
        [("q", 36, 72)],
        [("q", 72, 96), ("k", 0, 12)],
        [("k", 12, 24), ("v", 0, 24)],
    ]


def test_layers_are_numbered_from_the_first_of_the_stage() -> None:
    layout = Layout(2, pp=2)
    first, second = (
        shard_parameters(FACTS, layout, layout.coordinates(rank), "local") for rank in range(2)
    )
    name = "decoder.layers.0.input_layernorm.weight"
    assert first[name].pieces[0].name == "model.layers.0.input_layernorm.weight"
    assert second[name].pieces[0].name == "model.layers.1.input_layernorm.weight"
    assert "embedding.word_embeddings.weight" in first.keys() - second.keys()
    assert "output_layer.weight" in second.keys() - first.keys()
