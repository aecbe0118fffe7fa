"""Five Adam steps give the same run at every layout, and replicas stay equal to the last bit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_vopd.hf.mapping import ShardPlan, shard_parameters
from megatron_vopd.megatron.weights import export_weights
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
from tests.support.training import forward_backward, make_microbatches, make_optimizer, wrap

STEPS = 5
MODELS = [TinyModel(kind, tied, 157) for kind in DENSE for tied in (False, True)]
MOE_MODELS = [TinyModel("qwen3_moe", tied, 157) for tied in (False, True)]


@dataclass(frozen=True)
class Run:
    """What one rank saw of a run."""

    loss_sums: list[float]
    num_tokens: int
    grad_norms: list[float]
    hashes: list[tuple[ShardPlan, str]]
    exported: dict[str, torch.Tensor]


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _train(case: Case, model_dirs: list[str], distributed: bool, mutant: bool = False) -> list[Run]:
    """On a rank: take five steps on each model."""
    groups = enter(case)
    runs = []
    for model_dir in model_dirs:
        model, facts = build(model_dir, case, groups)
        if mutant:
            model.config.qk_layernorm = False  # finalize_model_grads then leaves the norms unsummed
        ddp = wrap(model, groups, use_distributed_optimizer=distributed)
        optimizer = make_optimizer(ddp, distributed)
        loss_sums, grad_norms, num_tokens = [], [], 0
        batches = make_microbatches(157)[groups.coordinates.dp :: groups.layout.dp]
        labels = [torch.cat(batch.labels) for batch in batches]
        for _ in range(STEPS):
            optimizer.zero_grad()
            logits = forward_backward(ddp, facts, groups, batches, case.sequence_parallel)
            _, grad_norm, _ = optimizer.step()
            pairs = [(torch.cat(out).double(), y) for out, y in zip(logits, labels, strict=False)]
            sums = [cross_entropy(out, y, reduction="sum").item() for out, y in pairs]
            loss_sums.append(sum(sums))
            num_tokens = sum(len(y) for _, y in pairs)
            grad_norms.append(float(grad_norm))
        plans = shard_parameters(facts, groups.layout, groups.coordinates, "local")
        hashes = [(plans[name], _hash(p)) for name, p in model.named_parameters()]
        exported = {k: v.clone() for k, v in export_weights(model, facts, groups)}
        runs.append(Run(loss_sums, num_tokens, grad_norms, hashes, exported))
    return runs


def _losses(case: Case, runs: list[Run]) -> list[float]:
    """Return the token-mean loss of each step, from the ranks that computed it."""
    places = [case.layout.coordinates(rank) for rank in range(case.layout.world_size)]
    counted = [
        run
        for run, at in zip(runs, places, strict=True)
        if at.tp == 0 and at.pp == case.layout.pp - 1
    ]
    tokens = sum(run.num_tokens for run in counted)
    return [sum(run.loss_sums[step] for run in counted) / tokens for step in range(STEPS)]


def _unequal_replicas(runs: list[Run]) -> set[str]:
    """Name the parameters that should be equal on several ranks (equal plans) and are not."""
    seen: dict[str, str] = {}
    return {
        plan.pieces[0].name
        for run in runs
        for plan, digest in run.hashes
        if plan.pieces and seen.setdefault(repr(plan), digest) != digest
    }


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    root = tmp_path_factory.mktemp("models")
    return {
        "dense": [str(model.save(root)) for model in MODELS],
        "moe": [str(model.save(root)) for model in MOE_MODELS],
    }


@pytest.fixture(scope="module")
def single(model_dirs: dict[str, list[str]]) -> dict[str, list[Run]]:
    """Run in one process."""
    return {
        "dense": spawn(_train, 1, DENSE_CASES[0], model_dirs["dense"], False)[0],
        "moe": spawn(_train, 1, MOE_CASES[0], model_dirs["moe"], False)[0],
    }


def _check(case: Case, kind: str, single: dict, model_dirs: dict, distributed: bool) -> None:
    worlds = spawn(_train, case.layout.world_size, case, model_dirs[kind], distributed)
    worst_loss = worst_norm = worst_weight = 0.0
    for reference, *runs in zip(single[kind], *worlds, strict=True):
        alone = _losses(Case("alone", DENSE_CASES[0].layout), [reference])
        assert alone[-1] < 0.9 * alone[0]
        pairs = zip(_losses(case, runs), alone, strict=True)
        worst_loss = max(worst_loss, *(abs(a - b) for a, b in pairs))
        for run in runs:
            pairs = zip(run.grad_norms, reference.grad_norms, strict=True)
            worst_norm = max(worst_norm, *(abs(a - b) / b for a, b in pairs))
            for name, tensor in run.exported.items():
                difference = float((tensor - reference.exported[name]).abs().max())
                worst_weight = max(worst_weight, difference)
        assert _unequal_replicas(runs) == set()
    print(f"\n{case}: loss {worst_loss:.1e}, norm {worst_norm:.1e}, weights {worst_weight:.1e}")
    assert worst_loss <= 1e-6
    assert worst_norm <= 1e-5
    # Five steps move a weight by at most 5e-3.
    assert worst_weight <= 1e-5


@pytest.mark.parametrize("case", DENSE_CASES[1:], ids=str)
def test_dense(case: Case, single: dict, model_dirs: dict) -> None:
    _check(case, "dense", single, model_dirs, distributed=False)


@pytest.mark.parametrize("case", MOE_CASES[1:], ids=str)
def test_moe(case: Case, single: dict, model_dirs: dict) -> None:
    _check(case, "moe", single, model_dirs, distributed=False)


@pytest.mark.parametrize(
    "case",
    [DENSE_CASES[4], MOE_CASES[1], MOE_CASES[4], CP_CASES[2], MOE_CP_CASES[0]],
    ids=str,
)
def test_distributed_optimizer(case: Case, single: dict, model_dirs: dict) -> None:
    """Adam's state is split over dp and, under context parallelism, over cp."""
    kind = "moe" if case.name.startswith("moe") else "dense"
    _check(case, kind, single, model_dirs, distributed=True)


def test_missing_qk_norm_reduction_lets_replicas_drift(model_dirs: dict) -> None:
    """The check for equal replicas sees the fault it is there for, and names the parameters."""
    case = next(case for case in DENSE_CASES if case.name == "tp2")
    qwen3 = [path for path in model_dirs["dense"] if "qwen3" in path]
    worlds = spawn(_train, 2, case, qwen3, False, True)
    for runs in zip(*worlds, strict=True):
        layers = range(4)
        norms = {f"model.layers.{i}.self_attn.{x}_norm.weight" for i in layers for x in "qk"}
        assert _unequal_replicas(list(runs)) == norms
