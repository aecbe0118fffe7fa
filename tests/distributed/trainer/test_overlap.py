"""Gradients that are summed over replicas during the backward pass are those that are summed after.

The models are cut into several buckets, as large ones are. megatron-core learns in the first step
how often each parameter's gradient arrives, and overlaps from the second one on.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megatron_vopd.megatron import student as student_module
from megatron_vopd.types import Layout, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.steps import Setup, make_rollouts, make_trainer, whole_weights
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

# Layout, and what of it: (model, changes of the setup).
PLAIN: list[tuple[str, dict[str, Any]]] = [("untied", {}), ("tied", {"distributed": True})]
CASES: list[tuple[Case, list[tuple[str, dict[str, Any]]]]] = [
    (
        DP2,
        [
            ("untied", {"distributed": True}),
            ("tied", {}),
            ("tied", {"distributed": True, "dtype": torch.bfloat16}),
            ("untied", {"recompute": "full"}),
            ("experts", {"distributed": True}),
        ],
    ),
    (Case("cp2", Layout(2, cp=2)), [("tied", {"distributed": True})]),
    (Case("tp2-dp2-sp", Layout(4, tp=2), True), PLAIN),
    (Case("pp2-dp2", Layout(4, pp=2)), PLAIN),
    (Case("ep2-dp4", Layout(4, ep=2)), [("experts", {}), ("experts", {"distributed": True})]),
]


def batches() -> list[list[Rollout]]:
    """Make three steps: of several rows, of one sequence (a replica has no token), of several."""
    return [make_rollouts(num, VOCAB, seed) for num, seed in ((9, 1), (1, 2), (12, 3))]


def small_buckets() -> None:
    """Make the students of this process with buckets of `BUCKET` parameters."""
    made = partial(student_module.DistributedDataParallelConfig, bucket_size=BUCKET)
    setattr(student_module, "DistributedDataParallelConfig", made)  # noqa: B010


def _both_ways(setups: list[Setup]) -> list[list[tuple[int, Any, Any]]]:
    """On a rank: return buckets, gradients of each step and weights, without and with overlap."""
    small_buckets()
    groups, found = enter(setups[0].case), []
    for setup in setups:
        ways = []
        for overlap in (False, True):
            student = replace(setup, overlap_grad_reduce=overlap).student(groups)
            trainer = make_trainer(student, {}, batches(), "hard", 40)
            gradients = []
            for _ in batches():
                assert trainer.train_step()["optim/skipped"] == 0
                gradients.append(trainer.gradients)
            ways.append((len(student.model.bucket_groups), gradients, whole_weights(student)))
        found.append(ways)
    return found


@pytest.mark.parametrize(("case", "variants"), CASES, ids=lambda value: str(value)[:12])
def test_overlap_changes_no_bit(
    case: Case, variants: list[tuple[str, dict[str, Any]]], tmp_path: Any
) -> None:
    """It holds over three steps, the second of which leaves a replica without a token."""
    folders = {name: str(MODELS[name].save(tmp_path)) for name in dict(variants)}
    setups = [Setup(case, folders[name], **changes) for name, changes in variants]
    ranks = spawn(_both_ways, case.layout.world_size, setups)
    for rank, found in enumerate(ranks):
        for (name, changes), (after, during) in zip(variants, found, strict=True):
            what = (case.name, name, changes, rank)
            assert after[0] == 1 or name == "experts", what
            assert during[0] >= 3 or case.layout.pp > 1, what
            for before, now in zip((*after[1], after[2]), (*during[1], during[2]), strict=True):
                assert before.keys() == now.keys()
                worst = max(float((now[n] - t).abs().max()) for n, t in before.items())
                assert worst == 0, (*what, worst)


def _events(setup: Setup, steps: list[list[Rollout]]) -> list[list[str]]:
    """On a rank: return what happens in each step, in order."""
    small_buckets()
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
def test_reduction_starts_in_the_last_backward(distributed: bool, tmp_path: Any) -> None:
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


def test_without_overlap_everything_is_sent_at_the_end(tmp_path: Any) -> None:
    setup = Setup(DP2, str(MODELS["untied"].save(tmp_path)), distributed=True)
    for steps in spawn(_events, 2, setup, batches()):
        for events in steps:
            assert events[events.index("end") :] == ["end", "send"]
            assert "send" not in events[: events.index("end")]
