"""A frozen model in a layout of its own, in the student's world, answers as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)

from megatron_vopd.hf.facts import kv_repeat
from megatron_vopd.hf.tensors import read_config
from megatron_vopd.megatron.groups import independent_groups
from megatron_vopd.megatron.model import ModelOptions, build_model
from megatron_vopd.megatron.weights import load_weights
from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.layouts import Case, build, enter
from tests.support.tiny_models import TinyModel
from tests.support.training import ROW_LENGTH, make_microbatches, packed_params, vocabulary_logits

STUDENT = Case("student", Layout(4, tp=2, pp=2), sequence_parallel=True)
TEACHER_LAYOUTS = (
    Layout(4, tp=4),
    Layout(4, pp=4),
    Layout(4, tp=2, pp=2),
    Layout(4, tp=2),
    Layout(4, pp=2),
    Layout(4),
)
MOE_LAYOUTS = (Layout(4, ep=4), Layout(4, tp=2, ep=2), Layout(4, tp=2, pp=2, ep=2))
# One and two KV heads: fewer than tp 4, so they are repeated. Tied heads: shared by end stages.
DENSE = (TinyModel("qwen2", True, 157), TinyModel("qwen3", False, 157))
MOE = (TinyModel("qwen3_moe", False, 157),)


def _score(model: Any, facts: Any, groups: Any, batches: list) -> list[list[torch.Tensor]]:
    """Forward only, through the schedule of the model's own groups; logits on its last stage."""
    seen = []

    def step(batch_iterator: Any, stage: Any) -> Any:
        batch = next(batch_iterator)
        rows = batch.rows()
        packing = packed_params(batch.lengths(), "cpu") if batch.packed else None
        hidden = stage(rows, torch.arange(rows.shape[1])[None], None, packed_seq_params=packing)

        def collect(output: torch.Tensor, non_loss_data: bool = True) -> None:
            whole = vocabulary_logits(output, stage, facts, groups, False)
            seen.append(batch.split(whole))

        return hidden, collect

    schedule: Any = forward_backward_no_pipelining
    extra: dict[str, Any] = {}
    if groups.layout.pp > 1:
        schedule = forward_backward_pipelining_without_interleaving
        extra["p2p_communicator"] = P2PCommunicator(groups.pp, model.config)
    with torch.no_grad():
        schedule(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=ROW_LENGTH,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
            pg_collection=groups.process_groups,
            **extra,
        )
    return seen


def _score_everywhere(
    layouts: tuple[Layout, ...], folders: list[str], answers: list[list[list[torch.Tensor]]]
) -> list[float | None]:
    """On a rank: return the worst logit difference per layout and model (None: no last stage)."""
    build(folders[0], STUDENT, enter(STUDENT))
    worst: list[float | None] = []
    for layout in layouts:
        groups = independent_groups(layout)
        for folder, answer in zip(folders, answers, strict=True):
            config, facts = read_config(folder)
            model = build_model(config, facts, groups, ModelOptions(trained=False))
            load_weights(
                model, facts, groups, folder, kv_repeat=kv_repeat(facts, layout.tp, trained=False)
            )
            assert not any(p.requires_grad for p in model.parameters())
            seen = _score(model, facts, groups, make_microbatches(157))
            assert len(seen) == (2 if groups.is_last_stage else 0)
            differences = [
                float((row - expected).abs().max())
                for rows, expected_rows in zip(seen, answer, strict=False)
                for row, expected in zip(rows, expected_rows, strict=True)
            ]
            worst.append(max(differences) if differences else None)
    return worst


@pytest.mark.parametrize(
    ("layouts", "models"), [(TEACHER_LAYOUTS, DENSE), (MOE_LAYOUTS, MOE)], ids=["dense", "moe"]
)
def test_frozen_model_in_its_own_layout(
    layouts: tuple[Layout, ...], models: tuple[TinyModel, ...], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folders = [model.save(tmp_path) for model in models]
    answers = []
    with torch.no_grad():
        for folder in folders:
            reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            answers.append(
                [
                    [reference(ids[None]).logits[0] for ids in batch.sequences]
                    for batch in make_microbatches(157)
                ]
            )
    results = spawn(_score_everywhere, 4, layouts, [str(f) for f in folders], answers)
    for position, layout in enumerate(layout for layout in layouts for _ in models):
        places = [layout.coordinates(rank) for rank in range(4)]
        for rank, at in enumerate(places):
            worst = results[rank][position]
            assert (worst is not None) == (at.pp == layout.pp - 1)
            assert worst is None or worst <= 1e-5, f"{layout} rank {rank}: {worst}"
