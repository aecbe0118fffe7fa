"""Runs under TransformerEngine's names saved and resumed: bitwise, experts included, without a GPU.

TransformerEngine's Python is real, FusedAdam included; its kernels are torch (tests/support/te).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.checkpoint.sharded import read_state
from megatron_vopd.megatron.groups import init_world
from megatron_vopd.types import Layout
from tests.support.layouts import Case, destroy_groups, enter
from tests.support.resumable import VOCAB, Made, make, raw_state, resume_engine
from tests.support.steps import Setup, whole_weights
from tests.support.te.worlds import VERSIONS, spawn
from tests.support.tiny_models import TinyModel

TINY = (("num_hidden_layers", 2),)
DENSE = TinyModel("qwen3", True, VOCAB, "bfloat16", TINY)
MOE = TinyModel("qwen3_moe", False, VOCAB, "bfloat16", TINY)
# Name -> student, layout, distributed optimizer.
RESUMED = {
    "dense-tp2-sp": (DENSE, Case("tp2-sp", Layout(2, tp=2), True), False),
    "dense-dp2-distributed": (DENSE, Case("dp2", Layout(2)), True),
    "moe-ep2-distributed": (MOE, Case("ep2", Layout(2, ep=2)), True),
    "moe-tp2-sp": (MOE, Case("tp2-sp", Layout(2, tp=2), True), False),
}


def _trained(made: Made, num_steps: int) -> None:
    from tests.support.te import gpu

    with gpu.seen_as_cuda():
        while made.trainer.step < num_steps:
            assert made.trainer.train_step()["optim/skipped"] == 0


def _resumed(setup: Setup, root: Path) -> dict[str, Any]:
    """On a rank: four steps at once, and two saved, loaded into a fresh run, and two more."""
    from transformer_engine.pytorch.optimizers import (  # pyright: ignore[reportMissingImports]
        FusedAdam,
    )

    init_world("cpu")
    whole = make(setup, root / "whole")
    optimizer = whole.student.optimizer
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    assert all(isinstance(member.optimizer, FusedAdam) for member in members)
    _trained(whole, 4)
    expected = raw_state(whole)
    first = make(setup, root / "run")
    _trained(first, 2)
    saved, folder = raw_state(first), first.checkpoints.save()
    del first
    torch.manual_seed(99)
    second = make(setup, root / "run")
    second.checkpoints.load(folder)
    loaded = raw_state(second)
    resume_engine(second)
    _trained(second, 4)
    return {
        "loaded": _unlike(loaded, saved),
        "resumed": _unlike(raw_state(second), expected),
        "moved": len(_unlike(expected, saved)),
        "updates": read_state(folder)["num_updates"],
        "exports": _exports(setup),
    }


def _unlike(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return [key for key in {**found, **expected} if found.get(key) != expected.get(key)]


def _exports(setup: Setup) -> list[str]:
    """Return the HF tensors that differ between the layer specs, loaded from one folder."""
    destroy_groups()
    groups = enter(setup.case)
    own, local = (
        whole_weights(replace(setup, layer_spec=spec).student(groups)) for spec in ("te", "local")
    )
    assert own.keys() == local.keys()
    return [name for name in own if not torch.equal(own[name], local[name])]


def _all(setups: dict[str, Setup], root: Path) -> dict[str, Any]:
    return {name: _resumed(setup, root / name) for name, setup in setups.items()}


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(version: str, tmp_path: Path) -> None:
    """Weights, main weights and moments under TransformerEngine's names, of experts too."""
    setups = {}
    teacher = str(DENSE.save(tmp_path / "teacher", 1))
    for name, (model, case, distributed) in RESUMED.items():
        student = str(model.save(tmp_path / "student"))
        setups[name] = Setup(
            case,
            student,
            {"teacher": teacher},
            Layout(2),
            distributed,
            torch.bfloat16,
            layer_spec="te",
        )
    for rank in spawn(version, _all, 2, setups, tmp_path / "runs"):
        for name, found in rank.items():
            assert not found["loaded"] and not found["resumed"], name
            assert found["moved"] > 20 and found["updates"] == 2, name
            assert not found["exports"], name
