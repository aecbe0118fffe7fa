"""The loss and its metrics never make the host of a GPU wait: counted on the CPU, by operation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_vopd.trainer.packing import pack
from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.host_syncs import HostSyncs
from tests.support.layouts import Case, enter
from tests.support.steps import Setup, make_rollouts, make_trainer
from tests.support.tiny_models import TinyModel

VOCAB = 61


# megatron-core's own: RoPE without TransformerEngine's kernel, and one look a step at the count of
# tokens.
OF_MEGATRON = {"embeddings/rope_utils.py", "distributed/finalize_model_grads.py"}


def _loss_of_rows(folder: str, kind: str) -> Counter[tuple[str, str]]:
    """On a rank: run a step's loss, forward and backward; count what the host would wait for."""
    setup = Setup(Case("tp1", Layout(1)), folder, {"teacher": folder})
    student = setup.student(enter(setup.case))
    rollouts = make_rollouts(4, VOCAB)
    trainer = make_trainer(student, setup.teachers(student), [rollouts], kind)
    replicas = pack(rollouts, trainer.packing)
    states = [torch.randn(row.num_tokens, student.facts.hidden_size) for row in replicas[0]]
    with HostSyncs() as syncs:
        trainer.loss.forward_backward(replicas, states)
    assert trainer.loss.loss_sum != 0
    return syncs.found


@pytest.mark.parametrize("kind", ["vopd_full", "vopd_topk", "gated", "forward"])
def test_a_row_needs_no_answer_from_the_device(kind: str, tmp_path: Path) -> None:
    folder = TinyModel("qwen3", False, VOCAB).save(tmp_path)
    (found,) = spawn(_loss_of_rows, 1, str(folder), kind)
    assert {where for _, where in found} == OF_MEGATRON, found
