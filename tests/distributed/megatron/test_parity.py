"""Logits and gradients equal transformers', at every layout, for padded and for packed rows.

The reference is transformers in one process, one sequence at a time. The models under test run
through megatron-core's own pipeline schedule, DDP and gradient finalisation, with the head applied
outside the model, as training does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_vopd.megatron.weights import export_tensors
from tests.support.harness import spawn
from tests.support.layouts import (
    CP_CASES,
    DENSE_CASES,
    MOE_CASES,
    MOE_CP_CASES,
    Case,
    build,
    enter,
)
from tests.support.tiny_models import DENSE, TinyModel
from tests.support.training import Microbatch, forward_backward, make_microbatches, wrap

# Two models per architecture; odd vocabularies and tied heads are where shards and sums go wrong.
DENSE_MODELS = [TinyModel(kind, tied, 157) for kind in DENSE for tied in (False, True)]
MOE_MODELS = [
    TinyModel("qwen3_moe", False, 157),
    TinyModel("qwen3_moe", True, 160, overrides=(("norm_topk_prob", False),)),
]


@dataclass(frozen=True)
class Reference:
    """transformers' answer: logits of each sequence, and the gradient of the token-mean loss."""

    model_dir: str
    logits: list[list[torch.Tensor]]
    gradients: dict[str, torch.Tensor]


def _reference(model_dir: Path, microbatches: list[Microbatch]) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    logits = [[model(ids[None]).logits[0] for ids in batch.sequences] for batch in microbatches]
    pairs = [
        pair
        for batch, outputs in zip(microbatches, logits, strict=True)
        for pair in zip(outputs, batch.labels, strict=True)
    ]
    losses = [cross_entropy(out, labels, reduction="sum") for out, labels in pairs]
    (torch.stack(losses).sum() / sum(len(labels) for _, labels in pairs)).backward()
    return Reference(
        str(model_dir),
        [[out.detach() for out in outputs] for outputs in logits],
        _split_experts({name: p.grad for name, p in model.named_parameters()}),
    )


def _split_experts(gradients: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Separate the experts, which transformers stacks in memory and not in checkpoints."""
    split = {}
    for name, gradient in gradients.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(gradient):
                gate, up = both.chunk(2)
                prefix = name.replace("gate_up_proj", str(expert))
                split[f"{prefix}.gate_proj.weight"] = gate
                split[f"{prefix}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(gradient):
                split[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            split[name] = gradient
    return split


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Reference]]:
    root = tmp_path_factory.mktemp("models")
    batches = make_microbatches(vocab_size=157)
    return {
        kind: [_reference(model.save(root), batches) for model in models]
        for kind, models in (("dense", DENSE_MODELS), ("moe", MOE_MODELS))
    }


def relative_errors(
    gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return per parameter: norm of the difference / max(its norm, 1e-3 of the largest)."""
    floor = 1e-3 * max(float(g.norm()) for g in reference.values())
    return {
        name: float((gradients[name] - g).norm()) / max(float(g.norm()), floor)
        for name, g in reference.items()
    }


def _compare(
    case: Case, references: list[Reference], mutant: bool = False, recompute: str = "none"
) -> list[dict]:
    """On a rank: return the worst logit difference and gradient error of each model."""
    groups = enter(case)
    worst = []
    for reference in references:
        model, facts = build(reference.model_dir, case, groups, recompute=recompute)
        if mutant:
            model.config.qk_layernorm = False  # finalize_model_grads then leaves the norms unsummed
        ddp = wrap(model, groups)
        mine = slice(groups.coordinates.dp, None, groups.layout.dp)
        batches = make_microbatches(157)[mine]
        logits = forward_backward(ddp, facts, groups, batches, case.sequence_parallel)
        difference = max(
            (
                float((out[: len(expected)] - expected).abs().max())
                for outs, answers in zip(logits, reference.logits[mine], strict=False)
                for out, expected in zip(outs, answers, strict=True)
            ),
            default=0.0,
        )
        shards = {name: p.main_grad for name, p in model.named_parameters()}
        gradients = {k: v.clone() for k, v in export_tensors(shards, facts, groups)}
        assert gradients.keys() == reference.gradients.keys()
        errors = relative_errors(gradients, reference.gradients)
        worst.append({"logits": difference, "computed": len(logits), "gradients": errors})
    return worst


def _check(case: Case, references: list[Reference], recompute: str = "none") -> None:
    results = spawn(_compare, case.layout.world_size, case, references, False, recompute)
    for rank, models in enumerate(results):
        is_last_stage = case.layout.coordinates(rank).pp == case.layout.pp - 1
        for reference, result in zip(references, models, strict=True):
            name = f"{Path(reference.model_dir).name} rank {rank}"
            assert result["computed"] == (2 // case.layout.dp if is_last_stage else 0)
            assert result["logits"] <= 1e-5, name
            parameter, error = max(result["gradients"].items(), key=lambda item: item[1])
            assert error <= 1e-4, f"{name}: {parameter}"
    print(f"\n{case}: {_summary(results)}")


def _summary(results: list[list[dict]]) -> str:
    logits = max(result["logits"] for models in results for result in models)
    gradient = max(max(r["gradients"].values()) for models in results for r in models)
    return f"logits {logits:.1e}, gradients {gradient:.1e}"


@pytest.mark.parametrize("case", (*DENSE_CASES, *CP_CASES), ids=str)
def test_dense(case: Case, references: dict[str, list[Reference]]) -> None:
    _check(case, references["dense"])


@pytest.mark.parametrize("case", (*MOE_CASES, *MOE_CP_CASES), ids=str)
def test_moe(case: Case, references: dict[str, list[Reference]]) -> None:
    _check(case, references["moe"])


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["tp2-sp", "cp2-pp2"])
def test_recomputed_activations(
    name: str, recompute: str, references: dict[str, list[Reference]]
) -> None:
    case = next(case for case in (*DENSE_CASES, *CP_CASES) if case.name == name)
    _check(case, references["dense"], recompute)


def test_missing_qk_norm_reduction_shows(references: dict[str, list[Reference]]) -> None:
    """Without the sum over tp of the q/k-norm gradients, those and only those are wrong."""
    case = next(case for case in DENSE_CASES if case.name == "tp2")
    qwen3 = [reference for reference in references["dense"] if "qwen3" in reference.model_dir]
    for result in spawn(_compare, 2, case, qwen3, True)[0]:
        wrong = {name for name, error in result["gradients"].items() if error > 1e-4}
        assert wrong == {n for n in result["gradients"] if "q_norm" in n or "k_norm" in n}
        assert result["logits"] <= 1e-5
