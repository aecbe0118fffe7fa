"""Gradients that are summed over replicas during the backward pass are those summed after it.

The models are cut into several buckets, as large ones are. megatron-core learns in the first step
how often each parameter's gradient arrives, and overlaps from the second one on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.types import Layout, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case, destroy_groups, enter
from tests.support.reference_step import Adam
from tests.support.step_cases import BAR
from tests.support.steps import (
    Setup,
    make_rollouts,
    make_trainer,
    small_buckets,
    whole_weights,
    worst_error,
)
from tests.support.te import worlds
from tests.support.tiny_models import TinyModel

VOCAB = 157
TWO_LAYERS = (("num_hidden_layers", 2),)
MODELS = {
    "untied": TinyModel("qwen3", False, VOCAB, overrides=TWO_LAYERS),
    "tied": TinyModel("qwen3", True, VOCAB, overrides=TWO_LAYERS),
    "experts": TinyModel("qwen3_moe", False, VOCAB, overrides=TWO_LAYERS),
}
DP2 = Case("dp2", Layout(2))
BUCKET = 6000  # parameters; the models have 60 to 110 thousand
# The norm is a sum over buckets in their order: clipping by it differs in the last bit.
UNCLIPPED = Adam(clip_grad=0)

# What is trained: layout, model, changes of the setup.
CASES: dict[str, tuple[Case, str, dict[str, Any]]] = {
    "dp2": (DP2, "tied", {}),
    "dp2-distributed": (DP2, "untied", {"distributed": True}),
    "dp2-distributed-bf16": (DP2, "tied", {"distributed": True, "dtype": torch.bfloat16}),
    "dp2-recompute": (DP2, "untied", {"recompute": "full"}),
    "dp2-experts": (DP2, "experts", {"distributed": True}),
    "cp2": (Case("cp2", Layout(2, cp=2)), "tied", {"distributed": True}),
    "tp2-dp2-sp": (Case("", Layout(4, tp=2), True), "tied", {}),
    "tp2-dp2-distributed": (Case("", Layout(4, tp=2)), "untied", {"distributed": True}),
    "pp2-dp2": (Case("", Layout(4, pp=2)), "tied", {}),
    "pp2-dp2-distributed": (Case("", Layout(4, pp=2)), "tied", {"distributed": True}),
    "pp2-dp2-untied": (Case("", Layout(4, pp=2)), "untied", {"distributed": True}),
    "ep2-dp4": (Case("", Layout(4, ep=2)), "experts", {"distributed": True}),
    "ep4-dp4": (Case("", Layout(4, ep=4)), "experts", {}),
}
WORLDS = {
    size: [name for name in CASES if CASES[name][0].layout.world_size == size] for size in (2, 4)
}


def batches() -> list[list[Rollout]]:
    """Make three steps: of several rows, of one sequence (a replica has no token), of several."""
    return [make_rollouts(num, VOCAB, seed) for num, seed in ((9, 1), (1, 2), (12, 3))]


def _both_ways(setups: dict[str, Setup]) -> dict[str, list[Any]]:
    """On a rank: return results without and with overlap, by case.

    A result: number of groups of buckets, calls of an expert without a token, gradients of each
    step, and weights.
    """
    small_buckets(BUCKET)
    found = {}
    for name, setup in setups.items():
        destroy_groups()
        groups, found[name] = enter(setup.case), []
        for overlap in (False, True):
            student = replace(setup, overlap_grad_reduce=overlap).student(groups)
            trainer = make_trainer(student, {}, batches(), "hard", 40)
            idle, gradients = [0], []
            for module in student.bare.modules():
                if hasattr(module, "num_local_experts") and hasattr(module, "local_experts"):
                    module.register_forward_pre_hook(partial(_count_idle, idle))
            for _ in batches():
                assert trainer.train_step()["optim/skipped"] == 0
                gradients.append(trainer.gradients)
            num_groups = len(student.model.bucket_groups)
            found[name].append((num_groups, idle[0], gradients, whole_weights(student)))
    return found


def _count_idle(idle: list[int], _: Any, inputs: Any) -> None:
    idle[0] += int((inputs[1] == 0).sum())


@pytest.mark.parametrize("world_size", WORLDS)
def test_overlap_changes_nothing(world_size: int, tmp_path: Path) -> None:
    """It holds over three steps, the second of which leaves a replica without a token."""
    folders = {name: str(model.save(tmp_path)) for name, model in MODELS.items()}
    setups = {
        name: Setup(CASES[name][0], folders[CASES[name][1]], adam=UNCLIPPED, **CASES[name][2])
        for name in WORLDS[world_size]
    }
    ranks = spawn(_both_ways, world_size, setups)
    for name in setups:
        for after, during in (found[name] for found in ranks):
            # Stages behind the first have no buckets but that of a shared embedding.
            assert after[0] <= 2 and (during[0] >= 3 or "pp2" in name), name
            # Two replicas' sum has no order; that of four follows the places in the buckets.
            bar = BAR if CASES[name][0].layout.dp > 2 else 0.0
            require_same((*after[2], after[3]), (*during[2], during[3]), name, bar)
        assert ("expert" in CASES[name][1]) == any(found[name][1][1] > 0 for found in ranks), name


def require_same(after: Sequence[Any], during: Sequence[Any], name: str, bar: float = 0.0) -> None:
    """Assert that tensors, by their names, are equal up to `bar` of their size, and not all 0."""
    for expected, seen in zip(after, during, strict=True):
        assert any(bool(tensor.any()) for tensor in expected.values())
        worst = worst_error(seen, {key: tensor.float() for key, tensor in expected.items()})
        print(f"{name}: {worst:.1e}")
        assert worst <= bar, (name, worst)


def _events(setup: Setup, steps: list[list[Rollout]]) -> list[list[str]]:
    """On a rank: return what happens in each step, in order."""
    small_buckets(BUCKET)
    groups = enter(setup.case)
    student = setup.student(groups)
    events: list[str] = []
    for bucket_group in student.model.bucket_groups:
        bucket_group.start_grad_sync = _told(events, "send", bucket_group.start_grad_sync)
    config = student.bare.config
    config.finalize_model_grads_func = _told(events, "end", config.finalize_model_grads_func)
    student.model.register_forward_pre_hook(lambda *_: events.append("row"))
    for parameter in student.bare.parameters():
        parameter.register_hook(lambda _: events.append("gradient"))
    trainer = make_trainer(student, {}, steps, "hard", 40)
    found = []
    for _ in steps:
        trainer.train_step()
        found.append(list(events))
        events.clear()
    return found


def _told(events: list[str], name: str, function: Any) -> Any:
    def tell(*args: Any, **kwargs: Any) -> Any:
        events.append(name)
        return function(*args, **kwargs)

    return tell


@pytest.mark.parametrize("distributed", [False, True])
def test_reduction_starts_in_the_last_backward(distributed: bool, tmp_path: Path) -> None:
    """Nothing is sent before the last row; then buckets are sent while gradients still arrive."""
    folder = str(MODELS["untied"].save(tmp_path))
    setup = Setup(DP2, folder, distributed=distributed, overlap_grad_reduce=True)
    for first, *later in spawn(_events, 2, setup, batches()):
        assert "send" not in first[: first.index("end")]
        for events in later:
            last_row = len(events) - 1 - events[::-1].index("row")
            end = events.index("end")
            backward = events[last_row:end]
            assert "send" not in events[:last_row] + events[end:]
            assert backward.count("send") >= 3
            last_gradient = len(backward) - 1 - backward[::-1].index("gradient")
            assert backward[:last_gradient].count("send") >= 2, backward
        assert later[-1].count("row") >= 3


def test_without_overlap_everything_is_sent_at_the_end(tmp_path: Path) -> None:
    setup = Setup(DP2, str(MODELS["untied"].save(tmp_path)), distributed=True)
    for steps in spawn(_events, 2, setup, batches()):
        for events in steps:
            assert events[events.index("end") :] == ["end", "send"]
            assert "send" not in events[: events.index("end")]


TE_CASES = {
    "experts": ("experts", Case("", Layout(2, ep=2)), True),
    "tp2-sp": ("untied", Case("", Layout(2, tp=2), True), False),
}


def _te_both_ways(setups: dict[str, Setup]) -> dict[str, list[Any]]:
    """On a rank with TransformerEngine: return gradients of each step and weights, by case."""
    from tests.support.te import gpu

    small_buckets(BUCKET)
    found = {}
    for name, setup in setups.items():
        destroy_groups()
        groups, found[name] = enter(setup.case), []
        for overlap in (False, True):
            student = replace(setup, overlap_grad_reduce=overlap).student(groups)
            trainer = make_trainer(student, {}, batches(), "hard", 40)
            results = []
            for _ in batches():
                with gpu.seen_as_cuda():
                    trainer.train_step()
                results.append(trainer.gradients)
            found[name].append([*results, whole_weights(student)])
    return found


def test_overlap_with_fused_weight_gradients(tmp_path: Path) -> None:
    """TransformerEngine's layers (real Python, torch kernels) add gradients to buckets themselves.

    Their hooks get a tensor without meaning, for experts without a token too.
    """
    setups = {
        name: Setup(
            case,
            str(MODELS[model].save(tmp_path)),
            distributed=distributed,
            dtype=torch.bfloat16,
            layer_spec="te",
            adam=UNCLIPPED,
        )
        for name, (model, case, distributed) in TE_CASES.items()
    }
    for found in worlds.spawn(worlds.NEWEST, _te_both_ways, 2, setups):
        for name, (after, during) in found.items():
            require_same(after, during, name)
