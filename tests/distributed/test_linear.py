"""The LM-head entrance inside a real megatron step: the head's gradient arrives, once, everywhere.

Reference: whole logits and torch's autograd, in the same layout and schedule. The head is handed
over as the parameter itself, whose gradient the operator adds to `main_grad`, or as a view of it,
whose gradient autograd accumulates; tied and untied, on one and two stages, with and without
overlapped reduction, three microbatches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_vopd.megatron.model import head_weight
from megatron_vopd.vocab_parallel import Coefficients, VocabShard, linear_distill_loss
from tests.support.harness import spawn
from tests.support.layouts import DENSE_CASES, Case, build, enter
from tests.support.tiny_models import TinyModel
from tests.support.training import (
    Microbatch,
    forward_backward,
    make_microbatches,
    vocabulary_logits,
    wrap,
)

VOCAB = 157
CASES = [case for case in DENSE_CASES if case.name in ("tp1", "pp2", "dp2", "tp2-sp", "tp2-pp2")]
VARIANTS = [
    (direct, mode, overlap)
    for direct in (True, False)
    for mode in ("grad_in_forward", "recompute")
    for overlap in (False, True)
]


def _microbatches() -> list[Microbatch]:
    return [*make_microbatches(VOCAB), make_microbatches(VOCAB, seed=2)[1]]


def _teacher_logits(num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return 3 * torch.randn(num_tokens, VOCAB, generator=generator)


def _rows(batch: Microbatch, outputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(batch.split(outputs))


def _coefficients(stats: Any) -> Coefficients:
    """Mix all losses, so that every term of the gradient takes part."""
    one, zero = torch.ones_like(stats.reverse_kl_T), torch.zeros_like(stats.reverse_kl_T)
    return Coefficients(policy=0.5 * one, reverse=one, forward=0.3 * one, entropy=-one, topk=zero)


def _plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mixed loss with torch alone."""
    student = logits.log_softmax(-1)
    teacher = _teacher_logits(len(labels)).log_softmax(-1)
    reverse = (student.exp() * (student - teacher)).sum(-1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    entropy = -(student.exp() * student).sum(-1)
    chosen = student.gather(-1, labels[:, None])[:, 0]
    return (-0.5 * chosen + reverse + 0.3 * forward - entropy).sum()


def _gradients(case: Case, model_dir: str, groups: Any, variant: tuple | None) -> dict:
    model, facts = build(model_dir, case, groups)
    ddp = wrap(model, groups, overlap_grad_reduce=bool(variant and variant[2]))
    if variant and variant[2]:
        model.config.no_sync_func = ddp.no_sync
    sharded = case.sequence_parallel and groups.layout.tp > 1
    rows = facts.padded_vocab_size(groups.layout.tp) // groups.layout.tp
    start = min(groups.coordinates.tp * rows, VOCAB)
    shard = VocabShard(start, min(start + rows, VOCAB), groups.tp)

    def reference(output: torch.Tensor, stage: Any, batch: Microbatch) -> torch.Tensor:
        whole = vocabulary_logits(output, stage, facts, groups, case.sequence_parallel)
        return _plain_loss(_rows(batch, whole), torch.cat(batch.labels))

    def through_heads(output: torch.Tensor, stage: Any, batch: Microbatch) -> torch.Tensor:
        assert variant is not None
        direct, mode, _ = variant
        if sharded:
            output = gather_from_sequence_parallel_region(output.transpose(0, 1), group=groups.tp)
            output = output.transpose(0, 1)
        hidden, labels = _rows(batch, output), torch.cat(batch.labels)
        # A teacher whose hidden states are its logits: its head is a slice of the identity.
        teacher_head = torch.eye(VOCAB)[shard.start : shard.stop]
        weight = head_weight(stage)
        total, _ = linear_distill_loss(
            hidden,
            weight if direct else weight.view_as(weight),
            _teacher_logits(len(labels)),
            teacher_head,
            labels,
            shard,
            _coefficients,
            chunk=16,
            mode=mode,
            hidden_gradient="partial" if sharded else "all_reduce",
        )
        return total

    batches = _microbatches()[groups.coordinates.dp :: groups.layout.dp]
    loss = through_heads if variant else reference
    forward_backward(ddp, facts, groups, batches, case.sequence_parallel, loss)
    return {name: p.main_grad.clone() for name, p in model.named_parameters()}


def _worst_errors(case: Case, model_dirs: list[str]) -> dict[str, float]:
    """On a rank: return the worst relative error of any parameter, per model and variant."""
    groups = enter(case)
    worst = {}
    for model_dir in model_dirs:
        expected = _gradients(case, model_dir, groups, None)
        floor = 1e-3 * max(float(g.norm()) for g in expected.values())
        for variant in VARIANTS:
            found = _gradients(case, model_dir, groups, variant)
            worst[f"{Path(model_dir).name} {variant}"] = max(
                float((found[name] - g).norm()) / max(float(g.norm()), floor)
                for name, g in expected.items()
            )
    return worst


@pytest.mark.parametrize("case", CASES, ids=str)
def test_head_gradient_by_the_main_grad_protocol(case: Case, tmp_path: Path) -> None:
    models = [str(TinyModel("qwen3", tied, VOCAB).save(tmp_path)) for tied in (True, False)]
    for rank, errors in enumerate(spawn(_worst_errors, case.layout.world_size, case, models)):
        assert len(errors) == 16
        for variant, error in errors.items():
            assert error <= 2e-5, f"rank {rank}: {variant}"
