"""The layouts that every model test runs on, one spawn each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.tensors import read_config
from megatron_vopd.megatron.groups import Groups, init_world, student_groups
from megatron_vopd.megatron.model import ModelOptions, build_model
from megatron_vopd.megatron.weights import load_weights
from megatron_vopd.types import Layout


@dataclass(frozen=True)
class Case:
    """A layout and whether activations are cut along the sequence."""

    name: str
    layout: Layout
    sequence_parallel: bool = False

    def __str__(self) -> str:
        return self.name


DENSE_CASES = (
    Case("tp1", Layout(1)),
    Case("tp2", Layout(2, tp=2)),
    Case("tp2-sp", Layout(2, tp=2), True),
    Case("pp2", Layout(2, pp=2)),
    Case("dp2", Layout(2)),
    Case("tp2-pp2", Layout(4, tp=2, pp=2)),
    Case("tp4", Layout(4, tp=4)),
)
MOE_CASES = (
    Case("moe-tp1", Layout(1)),
    Case("moe-ep2", Layout(2, ep=2)),
    Case("moe-pp2", Layout(2, pp=2)),
    Case("moe-tp2-sp", Layout(2, tp=2), True),
    Case("moe-tp2-ep2-sp", Layout(4, tp=2, ep=2), True),
    Case("moe-tp2-pp2-sp", Layout(4, tp=2, pp=2), True),
)
# Context parallelism; for models of both kinds.
CP_CASES = (
    Case("cp2", Layout(2, cp=2)),
    Case("tp2-cp2", Layout(4, tp=2, cp=2)),
    Case("tp2-cp2-sp", Layout(4, tp=2, cp=2), True),
    Case("cp2-pp2", Layout(4, pp=2, cp=2)),
    Case("cp4", Layout(4, cp=4)),
)
MOE_CP_CASES = (
    Case("moe-ep2-cp2", Layout(2, cp=2, ep=2)),
    Case("moe-tp2-cp2-ep2-sp", Layout(4, tp=2, cp=2, ep=2), True),
)


def enter(case: Case) -> Groups:
    """On a rank: activate the CPU runtime; return the student's groups of this layout."""
    init_world("cpu")
    return student_groups(case.layout)


def destroy_groups() -> None:
    """Forget megatron-core's parallel state, so that another layout may be initialised."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def build(
    model_dir: str,
    case: Case,
    groups: Groups,
    dtype: torch.dtype = torch.float32,
    recompute: Any = "none",
) -> tuple[Any, ModelFacts]:
    """On a rank: build and load its shard of the model in `model_dir`."""
    config, facts = read_config(model_dir)
    settings = ModelOptions(
        dtype=dtype, sequence_parallel=case.sequence_parallel, recompute=recompute
    )
    model = build_model(config, facts, groups, settings)
    load_weights(model, facts, groups, model_dir)
    return model, facts
