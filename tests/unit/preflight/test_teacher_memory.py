"""Activations of a teacher with experts are cut along the sequence, as it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vopd.config.loading import build_config
from megatron_vopd.config.world import layouts
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.preflight.activations import layer_memory
from megatron_vopd.preflight.memory import Machine, estimate
from megatron_vopd.types import Layout

FACTS = ModelFacts(
    "qwen3",
    num_layers=2,
    hidden_size=64,
    ffn_size=128,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=64,
    max_positions=64,
    norm_eps=1e-6,
    tied=False,
)
EXPERTS = replace(
    FACTS, model_type="qwen3_moe", num_experts=8, experts_per_token=4, expert_ffn_size=32
)


@pytest.mark.parametrize(("teacher", "is_cut"), [(FACTS, False), (EXPERTS, True)])
def test_scoring_at_tp_4(teacher: ModelFacts, is_cut: bool) -> None:
    config = build_config(
        {
            "student": {"path": "org/a"},
            "teacher": {"path": "org/b", "tp": 4},
            "data": {"train": "org/c", "max_prompt_tokens": 8},
            "curriculum": {"kind": "fixed", "ladder": [8]},
            "train": {"max_tokens_per_microbatch": 16},
        }
    )
    cuts = layouts(config, 4)
    facts = {"student": FACTS, "teacher": teacher}
    rank = estimate(config, facts, cuts, Machine("te", 2**30))[0]
    layer = layer_memory(teacher, Layout(4, tp=4), "te", 2, False, is_cut)
    other = layer_memory(teacher, Layout(4, tp=4), "te", 2, False, not is_cut)
    per_token = rank.phases["scoring"]["activations"] / layer.forward
    assert per_token == round(per_token) > 0
    assert layer.forward != other.forward or not is_cut
