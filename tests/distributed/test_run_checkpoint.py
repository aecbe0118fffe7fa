"""Runs saved and resumed: bitwise in the same layout, no bit of weights and moments lost in others.

Also what a resume refuses, by name, and what the run folder may look like.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.parallel import init_world
from megatron_vopd.types import Layout
from tests.distributed.harness import spawn
from tests.distributed.layouts import Case
from tests.distributed.resumable import VOCAB, Made, make, raw_state, resume_engine, whole_state
from tests.distributed.steps import Setup
from tests.tiny_models import TinyModel

STUDENT = TinyModel("qwen3", True, VOCAB, overrides=(("num_hidden_layers", 2),))
LAYOUTS = {"tp2": Layout(2, tp=2), "pp2": Layout(2, pp=2), "dp2": Layout(2)}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    root = tmp_path_factory.mktemp("models")
    student, teacher = STUDENT.save(root / "student", 0), STUDENT.save(root / "teacher", 1)
    return Setup(Case("", Layout(2)), str(student), {"teacher": str(teacher)})


def cut(setup: Setup, layout: Layout, **changes: Any) -> Setup:
    return replace(setup, case=Case("", layout), teacher_layout=layout, **changes)


def _trained(made: Made, num_steps: int) -> list[dict[str, float]]:
    """Metrics of every step but for times and memory."""
    seen = []
    while made.trainer.step < num_steps:
        values = made.trainer.train_step()
        untimed = {k: v for k, v in values.items() if not k.startswith(("time/", "perf/"))}
        seen.append(untimed)
    return seen


def _halves(setup: Setup, root: Path, at: int, staleness: int) -> dict[str, Any]:
    """Eight steps undisturbed; then `at` steps, and a new process' rest of them."""
    whole = make(setup, root / "whole", staleness=staleness)
    undisturbed = _trained(whole, 8)
    expected = raw_state(whole)
    first = make(setup, root / "run", staleness=staleness)
    metrics = _trained(first, at)
    folder = first.checkpoints.save({"best": 0.5})
    del first
    torch.manual_seed(99)
    second = make(setup, root / "run", staleness=staleness)
    extra = second.checkpoints.load(folder)
    resume_engine(second)
    metrics += _trained(second, 8)
    found = raw_state(second)
    return {
        "different": [key for key in expected if expected[key] != found.get(key)],
        "extra keys": sorted(found.keys() - expected.keys()),
        "num": len(expected),
        "metrics equal": repr(metrics) == repr(undisturbed),
        "lengths": [values["curriculum/max_response_tokens"] for values in metrics],
        "extra": extra,
    }


# Name -> layout, distributed optimizer, type, step at which it is saved, staleness. An epoch ends
# inside step 3, inside step 6 and with step 8.
RESUMED = {
    "tp2": ("tp2", False, torch.float32, 4, 0),
    "pp2": ("pp2", False, torch.float32, 3, 0),
    "dp2": ("dp2", False, torch.float32, 2, 1),
    "dp2-distributed": ("dp2", True, torch.float32, 4, 0),
    "dp2-distributed-bf16": ("dp2", True, torch.bfloat16, 4, 0),
    "tp2-bf16": ("tp2", False, torch.bfloat16, 4, 0),
}


def _all_halves(setup: Setup, root: Path) -> dict[str, Any]:
    init_world("cpu")
    found = {}
    for name, (layout, distributed, dtype, at, staleness) in RESUMED.items():
        own = cut(setup, LAYOUTS[layout], distributed=distributed, dtype=dtype)
        found[name] = _halves(own, root / name, at, staleness)
    return found


@pytest.fixture(scope="module")
def halves(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(_all_halves, 2, setup, tmp_path_factory.mktemp("halves"))


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(name: str, halves: list) -> None:
    """C8."""
    for rank in halves:
        found = rank[name]
        assert found["num"] > 20
        assert not found["different"] and not found["extra keys"]
        assert found["metrics equal"]
        # The curriculum moved on both sides of the restart.
        assert len(set(found["lengths"])) > 1
        assert found["extra"] == {"best": 0.5}


# Name -> layout, distributed optimizer. The first of them trains; each saves, the next one loads.
HOPS = {
    "tp2": (LAYOUTS["tp2"], False),
    "dp2": (LAYOUTS["dp2"], True),
    "pp2": (LAYOUTS["pp2"], False),
    "tp2 again": (LAYOUTS["tp2"], True),
    "dp2 again": (LAYOUTS["dp2"], False),
}


def _hops(setup: Setup, root: Path, dtype: torch.dtype) -> list[dict[str, str]]:
    """Hashes by HF name after each hop."""
    folder, states, last = None, [], None
    for name, (layout, distributed) in HOPS.items():
        own = cut(setup, layout, distributed=distributed, dtype=dtype)
        made = make(own, root / name)
        if folder is None:
            _trained(made, 3)
        else:
            made.checkpoints.load(folder)
            # Random states belong to a layout; the reader is told that they start anew.
            assert bool(made.said) == (layout != last)
        last = layout
        states.append(whole_state(made))
        folder = made.checkpoints.save()
    return states


def _all_hops(setup: Setup, root: Path) -> dict[str, Any]:
    init_world("cpu")
    return {str(t): _hops(setup, root / str(t), t) for t in (torch.float32, torch.bfloat16)}


def test_no_bit_changes_over_layouts_and_optimizers(setup: Setup, tmp_path: Path) -> None:
    """C9, in fp32 and bf16."""
    for rank in spawn(_all_hops, 2, setup, tmp_path):
        for dtype, states in rank.items():
            first, *others = states
            # Parameters and two moments of 25 tensors; in bf16 the fp32 copies as well.
            assert len(first) > 60
            changed = [sum(first[key] != other[key] for key in first) for other in others]
            print(f"\n{dtype}: {len(first)} tensors, changed at each hop: {changed}")
            assert changed == [0] * 4
            assert all(other.keys() == first.keys() for other in others)
            assert len({first[key] for key in first if key.startswith("exp_avg_sq")}) > 20
