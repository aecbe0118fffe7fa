"""A teacher with experts: each token goes to its experts once, whatever tp, and none is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vopd.hf.tensors import read_config
from megatron_vopd.megatron.groups import independent_groups
from megatron_vopd.megatron.microbatch import PackingSettings
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.trainer.packing import pack
from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.steps import make_rollouts
from tests.support.tiny_models import TinyModel

VOCAB, ROW = 61, 45
# Two KV heads: at tp 4 each is on two ranks.
LAYOUTS = (
    Layout(4, tp=4, ep=4),
    Layout(4, tp=2, ep=2),
    Layout(4, tp=2, pp=2, ep=2),
    Layout(4, tp=2),
    Layout(4, ep=4),
)
MODEL = TinyModel("qwen3_moe", False, VOCAB)
ROLLOUTS = make_rollouts(9, VOCAB, longest=17)


def _rows() -> list[Any]:
    """Pack rows of odd lengths, the same for every replica."""
    (rows,) = pack(ROLLOUTS, PackingSettings(1, ROW))
    assert any(row.size % 2 for row in rows)
    return [row.microbatch for row in rows]


def _score_and_count(folder: str) -> list[tuple[list[torch.Tensor], int]]:
    """On a rank: hidden states and tokens that the rank's experts saw, by layout."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    seen: list[int] = []
    forward = SequentialMLP.forward

    def counted(self: Any, hidden: torch.Tensor, tokens_per_expert: Any, *rest: Any) -> Any:
        seen.append(int(tokens_per_expert.sum()))
        return forward(self, hidden, tokens_per_expert, *rest)

    student = enter(Case("student", Layout(4, pp=4)))
    _, facts = read_config(folder)
    found = []
    for layout in LAYOUTS:
        seen.clear()
        groups = independent_groups(layout)
        teacher = Teacher(folder, groups, facts, student, ModelOptions(trained=False))
        with mock.patch.object(SequentialMLP, "forward", counted):
            hidden = teacher.score(_rows())
        found.append((hidden, sum(seen)))
    return found


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = MODEL.save(tmp_path_factory.mktemp("teacher"))
    return folder, spawn(_score_and_count, 4, str(folder))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_token_goes_to_its_experts_once(layout: Layout, scored: tuple[Path, list[Any]]) -> None:
    tokens = sum(len(row.ids_S) + -len(row.ids_S) % layout.tp for row in _rows())
    found = sum(of_rank[LAYOUTS.index(layout)][1] for of_rank in scored[1])
    experts, layers = 2, 4
    assert found == tokens * layout.dp * experts * layers


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_hidden_states_are_those_of_transformers(
    layout: Layout, scored: tuple[Path, list[Any]]
) -> None:
    from transformers import AutoModel

    reference = AutoModel.from_pretrained(scored[0], dtype=torch.float32)
    expected = []
    for row in _rows():
        with torch.no_grad():
            parts = [reference(ids[None]) for ids in row.ids_S.split(row.lengths)]
        expected.append(torch.cat([part.last_hidden_state[0] for part in parts])[row.rows_T])
    for rank, of_rank in enumerate(scored[1]):
        hidden, _ = of_rank[LAYOUTS.index(layout)]
        is_last = layout.coordinates(rank).pp == layout.pp - 1
        assert len(hidden) == (len(expected) if is_last else 0)
        for own, right in zip(hidden, expected, strict=False):
            assert float((own - right).abs().max()) <= 2e-5
