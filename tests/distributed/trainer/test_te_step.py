"""Training steps with TransformerEngine's layers against the local ones, without a GPU.

The step is the project's own: packing, teacher, loss, megatron-core's schedule and optimizer.
TransformerEngine's Python is real, its kernels are torch (tests/support/te), so that both layer
specs round to bf16 at like places. Each is compared with the local one in fp32.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.types import Layout, Rollout
from tests.support.layouts import Case, destroy_groups, enter
from tests.support.steps import Setup, make_rollouts, make_trainer, whole_weights, worst_error
from tests.support.te.worlds import NEWEST, VERSIONS, spawn
from tests.support.tiny_models import TinyModel

VOCAB = 157
DENSE = TinyModel("qwen3", False, VOCAB, "bfloat16", (("num_hidden_layers", 2),))
BIASED = TinyModel("qwen2", True, VOCAB, "bfloat16", (("num_hidden_layers", 2),))
# Every expert of every token: which of two experts of nearly equal weight comes first is rounding.
MOE = TinyModel(
    "qwen3_moe", False, VOCAB, "bfloat16", (("num_hidden_layers", 2), ("num_experts_per_tok", 4))
)
CASES = {
    "tp1": (DENSE, Case("tp1", Layout(2)), True),
    "tp2-sp": (DENSE, Case("tp2-sp", Layout(2, tp=2), True), False),
    "tp2": (DENSE, Case("tp2", Layout(2, tp=2)), False),
    "tp2-sp-biased": (BIASED, Case("tp2-sp", Layout(2, tp=2), True), False),
    "pp2": (BIASED, Case("pp2", Layout(2, pp=2)), False),
    "cp2": (DENSE, Case("cp2", Layout(2, cp=2)), True),
    "moe": (MOE, Case("moe", Layout(2)), True),
    "moe-ep2": (MOE, Case("moe-ep2", Layout(2, ep=2)), True),
    "moe-tp2-sp": (MOE, Case("moe-tp2-sp", Layout(2, tp=2), True), False),
}
RECOMPUTED = {"tp1": "selective", "tp2-sp": "full", "moe-tp2-sp": "full"}
SPECS = {"exact": ("local", torch.float32), "local": ("local", torch.bfloat16)}
SPECS["te"] = ("te", torch.bfloat16)


def _errors(setups: dict[str, Setup], rollouts: list[Rollout]) -> dict[str, Any]:
    """On a rank: make one step with each layer spec; compare with the exact one, by case."""
    from tests.support.te import attention, gpu, kernels

    found = {}
    for name, setup in setups.items():
        seen = {}
        kernels.called.clear()
        for key, (spec, dtype) in SPECS.items():
            own = replace(setup, layer_spec=spec, dtype=dtype)
            destroy_groups()
            groups = enter(own.case)
            student = own.student(groups)
            trainer = make_trainer(student, own.teachers(student), [rollouts], "vopd_full")
            if spec == "te":
                with gpu.seen_as_cuda():
                    metrics = trainer.train_step()
                linear = {n: p for n, p in student.bare.named_parameters() if p.dim() > 1}
                unfused = [n for n, p in linear.items() if not p.grad_added_to_main_grad]
            else:
                metrics = trainer.train_step()
            assert metrics["optim/skipped"] == 0
            seen[key] = metrics, trainer.gradients, whole_weights(student)
        exact = seen["exact"]
        found[name] = {
            key: {
                "loss": abs(seen[key][0]["loss/mean"] - exact[0]["loss/mean"]),
                "norm": abs(seen[key][0]["optim/grad_norm"] / exact[0]["optim/grad_norm"] - 1),
                "gradient": worst_error(seen[key][1], exact[1]),
            }
            for key in ("local", "te")
        }
        found[name]["kernels"] = dict(kernels.called)
        found[name]["attention"] = dict(attention.attention)
        found[name]["unfused"] = unfused
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_is_that_of_the_local_layers(version: str, tmp_path: Path) -> None:
    rollouts = make_rollouts(6, VOCAB)
    setups = {}
    cases = {n: x for n, x in CASES.items() if n != "cp2" or version == NEWEST}
    for name, (model, case, distributed) in cases.items():
        student, teacher = (str(model.save(tmp_path / str(i), i)) for i in range(2))
        frozen = Layout(2) if case.layout.cp > 1 else case.layout
        made = Setup(case, student, {"teacher": teacher}, frozen, distributed)
        setups[name] = replace(made, recompute=RECOMPUTED.get(name, "none"))
    ranks = spawn(version, _errors, 2, setups, rollouts)
    for name, (model, case, _) in cases.items():
        for found in (rank[name] for rank in ranks):
            local, own = found["local"], found["te"]
            # bf16 has 8 bits: local layers are as far from fp32. A sum that is missing over ranks,
            # a wrong bound or position changes a gradient by its own size.
            assert max(local["gradient"], own["gradient"]) <= 0.1, name
            assert own["gradient"] <= 1.5 * local["gradient"] + 0.005, name
            assert own["norm"] <= 0.02 and own["loss"] <= 0.1, name
            kernels = found["kernels"]
            assert bool(kernels.get("thd_grad_correction")) == (case.layout.cp > 1), name
            assert kernels["fused_attn_bwd"] and kernels["multi_tensor_adam"], name
            assert bool(kernels.get("te_general_grouped_gemm")) == (model is MOE), name
            _check_fusion(name, found["unfused"])
            if case.layout.cp == 1:
                _check_attention(found["attention"], 2 if case.layout.tp == 2 else 4)
        worst = {k: max(r[name][k]["gradient"] for r in ranks) for k in ("local", "te")}
        print(f"{version} {name}: gradients against fp32: {worst}")


def _check_fusion(name: str, unfused: list[str]) -> None:
    """Only megatron-core's own embedding and router leave their gradient to autograd."""
    assert all("word_embeddings" in n or "router" in n for n in unfused), (name, unfused)


def _check_attention(asked: dict[str, Any], num_heads: int) -> None:
    """Packed, causal within each sequence, and its longest sequence, not the row's length."""
    assert asked["layout"] == "NVTE_THD_THD_THD" and asked["bias"] == "NVTE_NO_BIAS"
    assert asked["mask"] == "NVTE_PADDING_CAUSAL_MASK" and asked["window"] == (-1, 0)
    lengths = [stop - start for start, stop in pairwise(asked["bounds"])]
    assert len(lengths) > 1 and asked["longest"] == (max(lengths), max(lengths))
    assert asked["heads"][0] == num_heads
