"""A checkpoint that is loaded into any layout and exported again is the same, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vopd.hf.mapping import hf_tensors
from megatron_vopd.megatron.weights import export_weights
from tests.support.harness import spawn
from tests.support.layouts import DENSE_CASES, MOE_CASES, Case, build, enter
from tests.support.tiny_models import DENSE, TinyModel, reference_tensors


def _variants(model_types: tuple[str, ...]) -> list[TinyModel]:
    return [
        TinyModel(model_type, tied, vocab_size, dtype)
        for model_type in model_types
        for tied in (False, True)
        for vocab_size in (160, 157)
        for dtype in ("float32", "bfloat16")
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("models")
    return {
        "dense": [model.save(root) for model in _variants(DENSE)],
        "moe": [model.save(root) for model in _variants(("qwen3_moe",))],
    }


def _round_trip(case: Case, model_dirs: list[Path]) -> int:
    """On a rank: load and export every model; returns how many came back bit for bit."""
    groups = enter(case)
    for model_dir in model_dirs:
        reference = reference_tensors(model_dir)
        dtype = next(iter(reference.values())).dtype
        model, facts = build(str(model_dir), case, groups, dtype)
        exported = {}
        for name, tensor in export_weights(model, facts, groups):
            assert tensor.dtype == reference[name].dtype, name
            assert torch.equal(tensor, reference[name]), f"{model_dir.name}: {name} differs"
            exported[name] = tuple(tensor.shape)
        assert exported.keys() == reference.keys()
        assert list(exported.items()) == list(hf_tensors(facts).items())
        _check_padding(model, facts, groups)
    return len(model_dirs)


def _check_padding(model, facts, groups) -> None:
    """Assert that rows beyond the true vocabulary are zero, on the rank that has them."""
    shard_rows = facts.padded_vocab_size(groups.layout.tp) // groups.layout.tp
    valid = max(0, min(shard_rows, facts.vocab_size - groups.coordinates.tp * shard_rows))
    if groups.is_first_stage:
        weight = model.embedding.word_embeddings.weight
        assert weight.shape[0] == shard_rows
        assert not weight[valid:].any()


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense_round_trip(case: Case, folders: dict[str, list[Path]]) -> None:
    world_size = case.layout.world_size
    assert spawn(_round_trip, world_size, case, folders["dense"]) == [24] * world_size


@pytest.mark.parametrize("case", MOE_CASES, ids=str)
def test_moe_round_trip(case: Case, folders: dict[str, list[Path]]) -> None:
    world_size = case.layout.world_size
    assert spawn(_round_trip, world_size, case, folders["moe"]) == [8] * world_size
