"""A pipeline stage frees its output once it is sent; the backward pass does without its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.steps import Setup, make_rollouts, make_trainer
from tests.support.tiny_models import TinyModel

VOCAB = 61
CASES = (
    (Case("pp2", Layout(2, pp=2)), TinyModel("qwen3", True, VOCAB), "none"),
    (Case("tp2-pp2-sp", Layout(4, tp=2, pp=2), True), TinyModel("qwen3", False, VOCAB), "full"),
)


def _gradients(folder: str, case: Case, recompute: str) -> tuple[list[int], bool]:
    """On a rank: sizes of the outputs that were freed, and whether gradients are those without."""
    setup = Setup(case, folder, {"teacher": folder}, recompute=recompute)
    groups, found, sizes = enter(case), [], []
    free = schedules.deallocate_output_tensor

    def noted(output: Any, is_on: bool = False) -> None:
        size = 0 if output is None else output.numel()
        free(output, is_on)
        if output is not None and size > 1 and output.numel() == 1:
            sizes.append(size)

    for is_on in (True, False):
        student = setup.student(groups)
        assert student.bare.config.deallocate_pipeline_outputs
        student.bare.config.deallocate_pipeline_outputs = is_on
        trainer = make_trainer(
            student, setup.teachers(student), [make_rollouts(6, VOCAB)], "vopd_full"
        )
        with mock.patch.object(schedules, "deallocate_output_tensor", noted):
            trainer.train_step()
        found.append(trainer.gradients)
    on, off = found
    return sizes, all(torch.equal(on[name], off[name]) for name in off) and bool(off)


@pytest.mark.parametrize(("case", "model", "recompute"), CASES, ids=lambda one: str(one))
def test_gradients_do_not_need_what_was_sent(
    case: Case, model: TinyModel, recompute: str, tmp_path: Path
) -> None:
    folder = model.save(tmp_path)
    for rank, (sizes, is_equal) in enumerate(
        spawn(_gradients, case.layout.world_size, str(folder), case, recompute)
    ):
        assert bool(sizes) == (case.layout.coordinates(rank).pp == 0)
        assert is_equal
