"""What context parallelism sends: each layer's keys and values once, and their gradients once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.tensor_parallel import mappings

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
        def call(output: torch.Tensor, given: torch.Tensor, group: Any) -> Any:
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
