"""What context parallelism sends and keeps: each layer's keys and values once, as estimated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_vopd.hf.tensors import read_config
from megatron_vopd.megatron.attention import packed_params
from megatron_vopd.megatron.microbatch import cp_chunks
from megatron_vopd.preflight.activations import layer_memory
from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.layouts import Case, build, enter
from tests.support.tiny_models import TinyModel
from tests.support.training import forward_backward, make_microbatches, wrap

VOCAB = 157
MODEL = TinyModel("qwen3", False, VOCAB)
NUM_LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 24
CASE = Case("cp2", Layout(2, cp=2))


def _sent(model_dir: str, recompute: str) -> tuple[Counter, int]:
    """On a rank: count (collective, values that this rank gives) of a step; and its tokens."""
    groups = enter(CASE)
    model, facts = build(model_dir, CASE, groups, recompute=recompute)
    ddp, batch = wrap(model, groups), make_microbatches(VOCAB)[1]
    sent: Counter = Counter()

    def counted(name: str, real: Any) -> Any:
        def call(output: Tensor, given: Tensor, group: Any) -> Any:
            assert group is groups.process_groups.cp
            sent[name, given.numel()] += 1
            return real(output, given, group=group)

        return call

    names = {"dist_all_gather_func": "gather", "dist_reduce_scatter_func": "scatter"}
    patches = {key: counted(name, getattr(mappings, key)) for key, name in names.items()}
    with mock.patch.multiple(mappings, **patches):
        forward_backward(ddp, facts, groups, [batch], False)
    return sent, len(batch.cut(4, 4)[0])


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("selective", 2), ("full", 2)])
def test_keys_and_values_are_sent_once(recompute: str, times: int, tmp_path: Path) -> None:
    """Twice where attention is recomputed in the backward pass: what is gathered is not kept."""
    for sent, num_tokens in spawn(_sent, 2, str(MODEL.save(tmp_path)), recompute):
        whole = num_tokens * 2 * KV_HEADS * HEAD_DIM
        assert sent == {
            ("gather", whole // 2): times * NUM_LAYERS,
            ("scatter", whole): NUM_LAYERS,
        }


def _kept(model_dir: str, case: Case, row: list[int]) -> float:
    """On a rank: run a row of one sequence; return bytes per token kept for the backward pass."""
    groups = enter(case)
    model, _ = build(model_dir, case, groups)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    cp, at = case.layout.cp, groups.coordinates.cp
    own = cp_chunks([len(row)], at, cp)
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        packed = packed_params([len(row)], "cpu")
        ids = torch.tensor(row)[own][None]
        output = model(ids, own[None], None, packed_seq_params=packed)
    assert output.requires_grad
    total = sum(size for place, (size, _) in kept.items() if place not in weights)
    # One mask for all layers: as many rows as a chunk, as many columns as the longest prefix.
    chunk = len(row) // (2 * cp)
    mask = 4 * chunk * (2 * cp - at) * chunk if cp > 1 else 0
    return (total - mask) / len(own)


def test_the_gathered_keys_are_estimated(tmp_path: Path) -> None:
    """What cp adds to the bytes kept per token and layer is what the memory estimate says."""
    folder, row = str(MODEL.save(tmp_path)), list(range(64))
    _, facts = read_config(folder)
    (alone,) = spawn(_kept, 1, folder, Case("alone", Layout(1)), row)
    expected = [
        layer_memory(facts, case.layout, "cpu", 4, trained=True).kept
        for case in (CASE, Case("alone", Layout(1)))
    ]
    for cut in spawn(_kept, 2, folder, CASE, row):
        added = (cut - alone) / NUM_LAYERS
        print(f"kept per token: {alone:.0f} bytes, and {added:.0f} per layer more with cp 2")
        # Beside the keys: positions of the prefixes, 8 bytes a key for all layers.
        assert added == pytest.approx(expected[0] - expected[1], abs=8 * 5 / 2 / NUM_LAYERS + 1)
