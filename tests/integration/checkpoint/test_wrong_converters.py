"""H2: converters that are wrong in one way are caught by `check_conversion`.

Wrong values: HF -> Megatron writes something else than it read; the comparison of bits finds it.
Wrong table: the mapping is wrong in both directions, also while it is checked, so that a round trip
returns every bit. The bits cannot find that; logits and gradients against transformers must.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vopd.checkpoint.convert import to_megatron
from megatron_vopd.hf import mapping
from megatron_vopd.hf.mapping import Rule, Unit
from tests.support.harness import spawn
from tests.support.tiny_models import TinyModel
from tests.support.tools import run

# As many KV heads as heads, so that q and k have one shape; square o_proj in Llama.
FULL = TinyModel("qwen3", False, 157, overrides=(("num_key_value_heads", 4),))
MODELS = {
    "qwen3": TinyModel("qwen3", False, 157),
    "full": FULL,
    "llama": TinyModel("llama", False, 157),
    "qwen2": TinyModel("qwen2", True, 157),
    "moe": TinyModel("qwen3_moe", False, 157),
}

Edit = Callable[[Tensor], Any]


def _changed(name_part: str, edit: Edit) -> Any:
    """Make wrong values: edit every parameter that is made of an HF tensor of this name."""

    def mutate() -> tuple[Any, str, Any]:
        def read(entry: Any, plan: Any, source: Any, folder: Any) -> Any:
            values = to_megatron._read_parameter(plan, source, folder)
            for piece in plan.pieces:
                if name_part in piece.name:
                    part = values[piece.target]
                    edited = edit(part)
                    if edited is not None:
                        part.copy_(edited)
            return to_megatron.with_values(entry, values)

        return to_megatron, "_read_shards", read

    return mutate


def _blocks(change: Callable[[list, tuple, Any], list]) -> Any:
    """Make a wrong table: another order of the rows of q, k and v."""

    def mutate() -> tuple[Any, str, Any]:
        original = mapping._blocks

        def blocks(cut: Any, names: tuple, facts: Any, kv_repeat: int) -> list:
            found = original(cut, names, facts, kv_repeat)
            return change(found, names, facts) if cut == "qkv" else found

        return mapping, "_blocks", blocks

    return mutate


def _whole(names: tuple, facts: Any) -> list:
    return [(name, 0, mapping.hf_shape(name, facts)[0]) for name in names]


def _half_heads(_: list, names: tuple, facts: Any) -> list:
    """Interleave as if heads had half their size."""
    half, groups = facts.head_dim // 2, facts.num_kv_heads * 2
    q_rows = facts.num_heads // facts.num_kv_heads * half
    return [
        part
        for group in range(groups)
        for part in (
            (names[0], group * q_rows, q_rows),
            (names[1], group * half, half),
            (names[2], group * half, half),
        )
    ]


def _reversed_heads(blocks: list, names: tuple, facts: Any) -> list:
    """Reverse the query heads of a group."""
    found = []
    for name, first, rows in blocks:
        starts = range(first, first + rows, facts.head_dim)
        ordered = reversed(starts) if name == names[0] else starts
        found += [(name, start, facts.head_dim) for start in ordered]
    return found


def _renamed(blocks: list, order: tuple[int, int, int], names: tuple) -> list:
    new = dict(zip(names, (names[i] for i in order), strict=True))
    return [(new[name], first, rows) for name, first, rows in blocks]


def _other_kv_head(blocks: list, names: tuple, facts: Any) -> list:
    last = (facts.num_kv_heads - 1) * facts.head_dim
    return [
        (name, first if name == names[0] else last - first, rows) for name, first, rows in blocks
    ]


def _rules(*swaps: tuple[str, str]) -> Any:
    """Make a wrong table: exchange HF names between rules, or within one."""

    def exchange(name: str) -> str:
        for first, second in swaps:
            if first in name:
                return name.replace(first, second)
            if second in name:
                return name.replace(second, first)
        return name

    def mutate() -> tuple[Any, str, Any]:
        rules: tuple[Rule, ...] = tuple(
            replace(rule, hf=tuple(exchange(name) for name in rule.hf))
            for rule in mapping.LAYER_RULES
        )
        return mapping, "LAYER_RULES", rules

    return mutate


def _placed(other: Callable[[str, Any], str]) -> Any:
    """Make a wrong table: HF tensors belong to another parameter of the same shape."""

    def mutate() -> tuple[Any, str, Any]:
        original = Unit.megatron_name

        def megatron_name(self: Unit, rule: Rule, spec: Any, facts: Any, layout: Any) -> str:
            return other(original(self, rule, spec, facts, layout), facts)

        return Unit, "megatron_name", megatron_name

    return mutate


def _other_end(name: str, _: Any) -> str:
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    return ends[1 - ends.index(name)] if name in ends else name


def _next_expert(name: str, facts: Any) -> str:
    def following(found: re.Match[str]) -> str:
        return f"local_experts.{(int(found[1]) + 1) % facts.num_experts}."

    return re.sub(r"local_experts\.(\d+)\.", following, name)


def _layers_reversed(name: str, facts: Any) -> str:
    def mirrored(found: re.Match[str]) -> str:
        return f"layers.{facts.num_layers - 1 - int(found[1])}."

    return re.sub(r"layers\.(\d+)\.", mirrored, name)


def _zero_last_row(part: Tensor) -> None:
    part[-1] = 0


def _flip_lowest_bit(part: Tensor) -> None:
    part.view(torch.int32)[-1, -1] ^= 1


VALUES: dict[str, tuple[str, Any]] = {
    "k_proj zeroed": ("qwen3", _changed("0.self_attn.k_proj", lambda p: p.zero_())),
    "q_proj scaled by 1.001": ("qwen3", _changed("q_proj", lambda p: p.mul_(1.001))),
    "o_proj transposed": ("llama", _changed("o_proj", lambda p: p.t().clone())),
    "norm dropped": ("qwen3", _changed("1.input_layernorm", lambda p: p.fill_(1))),
    "embedding off by one row": ("qwen3", _changed("embed_tokens", lambda p: p.roll(1, 0))),
    "last vocabulary row lost": ("qwen3", _changed("lm_head", _zero_last_row)),
    "sign of down_proj": ("llama", _changed("2.mlp.down_proj", lambda p: p.neg_())),
    "up_proj rounded to bf16": ("llama", _changed("up_proj", lambda p: p.bfloat16().float())),
    "bias dropped": ("qwen2", _changed("v_proj.bias", lambda p: p.zero_())),
    "one bit of one weight": ("moe", _changed("3.down_proj", _flip_lowest_bit)),
    "router rows rolled": ("moe", _changed("mlp.gate.weight", lambda p: p.roll(1, 0))),
}
TABLES: dict[str, tuple[str, Any]] = {
    "q and k swapped": ("full", _blocks(lambda b, n, f: _renamed(b, (1, 0, 2), n))),
    "k and v swapped": ("qwen3", _blocks(lambda b, n, f: _renamed(b, (0, 2, 1), n))),
    "q, k, v not interleaved": ("qwen3", _blocks(lambda b, n, f: _whole(n, f))),
    "half the head size": ("qwen3", _blocks(_half_heads)),
    "query heads reversed": ("qwen3", _blocks(_reversed_heads)),
    "KV heads exchanged": ("llama", _blocks(_other_kv_head)),
    "gate and up swapped": ("llama", _rules(("gate_proj", "up_proj"))),
    "expert gate and up swapped": ("moe", _rules(("gate_proj", "up_proj"))),
    "q_norm and k_norm swapped": ("qwen3", _rules(("q_norm", "k_norm"))),
    "layer norms swapped": ("qwen3", _rules(("input_layernorm", "post_attention_layernorm"))),
    "embedding and head swapped": ("qwen3", _placed(_other_end)),
    "experts permuted": ("moe", _placed(_next_expert)),
    "layers reversed": ("llama", _placed(_layers_reversed)),
}


@contextmanager
def _mutated(mutate: Any) -> Iterator[None]:
    owner, name, mutant = mutate()
    original = getattr(owner, name)
    setattr(owner, name, mutant)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _judge(root: Path) -> dict[str, tuple[int, str]]:
    """On a rank: return what check_conversion says of every wrong converter, and of right ones."""
    results = {}
    for kind in MODELS:
        assert run("convert_hf_to_megatron", root / kind, root / f"{kind}.right").status == 0
        ran = run("check_conversion", root / kind, root / f"{kind}.right")
        results[kind] = (ran.status, ran.out + ran.err)
    for number, (name, (kind, mutate)) in enumerate({**VALUES, **TABLES}.items()):
        out = root / f"wrong{number}"
        with _mutated(mutate):
            ran = run("convert_hf_to_megatron", root / kind, out)
            assert ran.status == 0, (name, ran.err)
            if name in TABLES:
                ran = run("check_conversion", root / kind, out)
        if name in VALUES:
            ran = run("check_conversion", root / kind, out)
        results[name] = (ran.status, ran.out + ran.err)
    return results


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    root = tmp_path_factory.mktemp("converters")
    for kind, model in MODELS.items():
        model.save(root).rename(root / kind)
    return spawn(_judge, 1, root)[0]


def _failed(table: str) -> list[str]:
    return [line.split()[0] for line in table.splitlines() if line.rstrip().endswith("FAILED")]


@pytest.mark.parametrize("kind", MODELS)
def test_right_converters_pass(kind: str, verdicts: dict[str, tuple[int, str]]) -> None:
    status, table = verdicts[kind]
    assert status == 0 and not _failed(table), table


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values_differ_in_bits(name: str, verdicts: dict[str, tuple[int, str]]) -> None:
    status, table = verdicts[name]
    assert status == 1, table
    assert "tensors," in _failed(table), table


@pytest.mark.parametrize("name", TABLES)
def test_wrong_tables_differ_in_outputs(name: str, verdicts: dict[str, tuple[int, str]]) -> None:
    """Every bit comes back, and yet it is another model."""
    status, table = verdicts[name]
    assert status == 1, table
    failed = _failed(table)
    assert "tensors," not in failed, table
    assert {"logits,", "gradient,"} & set(failed), table
