"""Runs saved and resumed: bitwise in the same layout, no bit of weights and moments lost in others.

Also what a resume refuses, by name, and what the run folder may look like.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vopd.collectives import StopFlag
from megatron_vopd.errors import UserError
from megatron_vopd.megatron.groups import init_world
from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.trainer.trainer import PHASES
from megatron_vopd.types import Layout, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case
from tests.support.resumable import VOCAB, Made, make, raw_state, resume_engine, whole_state
from tests.support.scripted import ScriptedEngine
from tests.support.steps import Setup, small_buckets
from tests.support.tiny_models import TinyModel

STUDENT = TinyModel("qwen3", True, VOCAB, overrides=(("num_hidden_layers", 2),))
MOE = TinyModel("qwen3_moe", False, VOCAB, overrides=(("num_hidden_layers", 2),))
LAYOUTS = {"tp2": Layout(2, tp=2), "pp2": Layout(2, pp=2), "dp2": Layout(2)}
LAYOUTS |= {"ep2": Layout(2, ep=2), "cp2": Layout(2, cp=2)}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    root = tmp_path_factory.mktemp("models")
    student, teacher = STUDENT.save(root / "student", 0), STUDENT.save(root / "teacher", 1)
    return Setup(Case("", Layout(2)), str(student), {"teacher": str(teacher)})


@pytest.fixture(scope="module")
def moe(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Save a student with experts, and the dense teacher."""
    return replace(setup, student_dir=str(MOE.save(tmp_path_factory.mktemp("moe"), 2)))


def cut(setup: Setup, layout: Layout, **changes: Any) -> Setup:
    return replace(setup, case=Case("", layout), teacher_layout=replace(layout, cp=1), **changes)


def _trained(made: Made, num_steps: int) -> list[dict[str, float]]:
    """Return the metrics of every step but for times and memory."""
    seen = []
    while made.trainer.step < num_steps:
        values = made.trainer.train_step()
        untimed = {k: v for k, v in values.items() if not k.startswith(("time/", "perf/"))}
        seen.append(untimed)
    return seen


def _halves(setup: Setup, root: Path, at: int, staleness: int) -> dict[str, Any]:
    """Run eight steps or more undisturbed; then `at` steps, and the rest in a new process."""
    whole, num_steps = make(setup, root / "whole", staleness=staleness), max(8, at + 2)
    undisturbed = _trained(whole, num_steps)
    expected = raw_state(whole)
    first = make(setup, root / "run", staleness=staleness)
    metrics = _trained(first, at)
    folder = first.checkpoints.save({"best": 0.5})
    del first
    torch.manual_seed(99)
    second = make(setup, root / "run", staleness=staleness)
    extra = second.checkpoints.load(folder)
    resume_engine(second)
    metrics += _trained(second, num_steps)
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
# inside step 3, inside step 6 and with step 8: saved before, just behind, and at its end.
RESUMED = {
    "tp2": ("tp2", False, torch.float32, 4, 0),
    "pp2": ("pp2", False, torch.float32, 3, 0),
    "dp2": ("dp2", False, torch.float32, 2, 1),
    "dp2-distributed": ("dp2", True, torch.float32, 4, 0),
    "dp2-distributed-bf16": ("dp2", True, torch.bfloat16, 4, 0),
    "tp2-bf16": ("tp2", False, torch.bfloat16, 4, 0),
    "dp2-epoch": ("dp2", True, torch.float32, 8, 0),
    "dp2-epoch-ahead": ("dp2", True, torch.float32, 8, 1),
    "cp2-distributed-bf16": ("cp2", True, torch.bfloat16, 4, 1),
    "moe-ep2": ("ep2", False, torch.float32, 4, 0),
    "moe-ep2-distributed": ("ep2", True, torch.float32, 4, 0),
    "moe-ep2-distributed-bf16": ("ep2", True, torch.bfloat16, 4, 1),
}


def _all_halves(setup: Setup, moe: Setup, root: Path) -> dict[str, Any]:
    init_world("cpu")
    found = {}
    for name, (layout, distributed, dtype, at, staleness) in RESUMED.items():
        base = moe if name.startswith("moe") else setup
        own = cut(base, LAYOUTS[layout], distributed=distributed, dtype=dtype)
        own = replace(own, teacher_layout=Layout(2))
        found[name] = _halves(own, root / name, at, staleness)
    return found


@pytest.fixture(scope="module")
def halves(
    setup: Setup, moe: Setup, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return spawn(_all_halves, 2, setup, moe, tmp_path_factory.mktemp("halves"))


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(name: str, halves: list) -> None:
    """C8: the resumed half has the bits of the undisturbed run."""
    for rank in halves:
        found = rank[name]
        assert found["num"] > 20
        assert not found["different"] and not found["extra keys"]
        assert found["metrics equal"]
        # The curriculum moved on both sides of the restart, where that does not come too late.
        at, lengths = RESUMED[name][3], found["lengths"]
        assert lengths[0] < lengths[at - 1] or at == 2
        assert lengths[at - 1] < lengths[-1] or "epoch" in name
        assert found["extra"] == {"best": 0.5}


# Name -> layout, distributed optimizer. The first of them trains; each saves, the next one loads.
HOPS = {
    "tp2": (LAYOUTS["tp2"], False),
    "dp2": (LAYOUTS["dp2"], True),
    "pp2": (LAYOUTS["pp2"], False),
    "cp2": (LAYOUTS["cp2"], True),
    "tp2 again": (LAYOUTS["tp2"], True),
    "dp2 again": (LAYOUTS["dp2"], False),
}
OVERLAPPED = ("dp2", "tp2 again")  # whose gradient buffers are cut into several buckets


def _hops(setup: Setup, root: Path, dtype: torch.dtype) -> list[dict[str, str]]:
    """Return hashes by HF name after each hop."""
    folder, states, last = None, [], None
    for name, (layout, distributed) in HOPS.items():
        own = cut(setup, layout, distributed=distributed, dtype=dtype)
        made = make(replace(own, overlap_grad_reduce=name in OVERLAPPED), root / name)
        assert (len(made.student.model.bucket_groups) > 2) == (name in OVERLAPPED)
        if folder is None:
            _trained(made, 3)
        else:
            made.checkpoints.load(folder)
            # Random states belong to a layout; a log line says that they start from the seed.
            assert bool(made.said) == (layout != last)
        last = layout
        states.append(whole_state(made))
        folder = made.checkpoints.save()
    return states


def _all_hops(setup: Setup, root: Path) -> dict[str, Any]:
    init_world("cpu")
    small_buckets(6000)
    return {str(t): _hops(setup, root / str(t), t) for t in (torch.float32, torch.bfloat16)}


def test_no_bit_changes_over_layouts_and_optimizers(setup: Setup, tmp_path: Path) -> None:
    """C9: hashes stay the same after every hop, in fp32 and bf16."""
    for rank in spawn(_all_hops, 2, setup, tmp_path):
        for dtype, states in rank.items():
            first, *others = states
            # Parameters by layer; two moments of stacked layers; in bf16 the fp32 copies as well.
            assert len(first) > 40
            changed = [sum(first[key] != other[key] for key in first) for other in others]
            print(f"\n{dtype}: {len(first)} tensors, changed at each hop: {changed}")
            assert changed == [0] * 5
            assert all(other.keys() == first.keys() for other in others)
            assert len({first[key] for key in first if "exp_avg_sq" in key}) > 8


class Counting(StopFlag):
    """A stop flag that asks rank 1 to stop at the n-th look of all ranks."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def anywhere(self) -> bool:
        self._left -= 1
        if self._left <= 0 and dist.get_rank() == 1:
            self.is_set = True
        return super().anywhere()


class Terminated(ScriptedEngine):
    """An engine that sends this process a SIGTERM in a generation, which then takes ten minutes."""

    def generate(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Rollout]:
        if self.policy_version == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return super().generate(prompts, sampling, progress)


# A step has five phases in which a request to stop is heard; the curriculum's is the first.
STOPS = {f"{name} of step 4": 16 + i for i, name in enumerate(["curriculum", *PHASES[:4]])}


def _stopped(setup: Setup, root: Path, stop: StopFlag, engine: Any, staleness: int) -> Any:
    """Stop in the middle of a step, save, resume in another process: as if undisturbed."""
    whole = make(setup, root / "whole", staleness=staleness)
    _trained(whole, 6)
    expected = raw_state(whole)
    first = make(setup, root / "run", staleness=staleness, stop=stop, engine=engine)
    first.trainer.fit(6)
    asked = time.perf_counter()
    folder = first.checkpoints.save()
    seconds = time.perf_counter() - asked
    second = make(setup, root / "run", staleness=staleness)
    second.checkpoints.load(folder)
    resume_engine(second)
    start = second.trainer.step
    _trained(second, 6)
    found = raw_state(second)
    return start, [key for key in expected if expected[key] != found.get(key)], seconds


def _all_stops(setup: Setup, root: Path) -> dict[str, Any]:
    init_world("cpu")
    own = cut(setup, LAYOUTS["dp2"], distributed=True)
    found = {
        name: _stopped(own, root / str(at), Counting(at), None, at % 2)
        for name, at in STOPS.items()
    }
    listening = StopFlag()
    listening.listen()
    started = time.perf_counter()
    engine = Terminated(VOCAB) if dist.get_rank() == 0 else None
    found["generation"] = _stopped(own, root / "signal", listening, engine, 0)
    assert time.perf_counter() - started < 120
    return found


def test_a_stop_in_any_phase_loses_nothing(setup: Setup, tmp_path: Path) -> None:
    """T1: all ranks hear it at once; the last whole step is saved, and the resume is exact."""
    for rank in spawn(_all_stops, 2, setup, tmp_path):
        for name, (start, different, seconds) in rank.items():
            print(f"{name}: saved after step {start} in {seconds:.1f} s")
            assert start == 3, name
            assert not different, name
            assert seconds < 30


def _refusals(setup: Setup, other_dirs: dict[str, str], root: Path) -> dict[str, str]:
    """Return the messages of a resume with another model, teacher or configuration."""
    init_world("cpu")
    own = cut(setup, LAYOUTS["tp2"])
    folder = make(own, root / "run").checkpoints.save()
    found = {}

    def refused(name: str, made: Made) -> None:
        before = raw_state(made)
        with pytest.raises(UserError) as caught:
            made.checkpoints.load(folder)
        assert raw_state(made) == before, "a refused resume changed something"
        found[name] = str(caught.value)

    for name, path in other_dirs.items():
        refused(name, make(replace(own, student_dir=path), root / "run"))
    for name, changes in {
        "teacher": {"teachers": {"teacher": "y"}},
        "no teacher": {"teachers": {}},
        "another teacher": {"teachers": {"teacher": "x", "teachers.math": "y"}},
        "setting": {"config": {"optimizer.beta1": 0.8}},
    }.items():
        refused(name, make(own, root / "run", changes=changes))
    refused("type", make(replace(own, dtype=torch.bfloat16), root / "run"))
    return found


def test_another_model_teacher_or_setting_is_refused_by_name(setup: Setup, tmp_path: Path) -> None:
    """C7: each refusal names the key."""
    others = {
        "layers": TinyModel("qwen3", True, VOCAB, overrides=(("num_hidden_layers", 1),)),
        "vocabulary": TinyModel("qwen3", True, 63, overrides=(("num_hidden_layers", 2),)),
        "tied": TinyModel("qwen3", False, VOCAB, overrides=(("num_hidden_layers", 2),)),
        "shape": TinyModel(
            "qwen3", True, VOCAB, overrides=(("num_hidden_layers", 2), ("hidden_size", 32))
        ),
    }
    dirs = {name: str(model.save(tmp_path / name)) for name, model in others.items()}
    expected = {
        "layers": "num_layers=1",
        "vocabulary": "vocab_size=63",
        "tied": "tied",
        "shape": "hidden_size=32",
        "teacher": "teacher.path: got other weights",
        "no teacher": "teacher.path",
        "another teacher": "teachers.math.path: got a teacher of that name",
        "setting": "optimizer.beta1: got 0.8",
        "type": "is float32, expected bfloat16",
    }
    for rank in spawn(_refusals, 2, setup, dirs, tmp_path):
        assert rank.keys() == expected.keys()
        for name, words in expected.items():
            assert words in rank[name], (name, rank[name])
