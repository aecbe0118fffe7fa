"""What must not change a step: rows, packing order, replicas, empty replicas, layouts."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_vopd.types import Layout, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.reference_step import reference_step
from tests.support.steps import TOPK, Setup, make_rollouts, make_trainer, whole_weights, worst_error
from tests.support.tiny_models import TinyModel

VOCAB = 157
STUDENT = TinyModel("qwen3", False, VOCAB, overrides=(("num_hidden_layers", 2),))
TEACHER = TinyModel("qwen2", True, VOCAB, overrides=(("num_hidden_layers", 2),))
ALONE = Case("alone", Layout(1))
DP2 = Case("dp2", Layout(2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return str(STUDENT.save(root, 0)), str(TEACHER.save(root, 1))


def _variants(setup: Setup, rollouts: list[Rollout], orders: list[tuple[list[int], int]]) -> Any:
    """On a rank: return loss, gradient, weights for each order of responses and row length."""
    groups = enter(setup.case)
    teachers, found = None, []
    for order, max_tokens in orders:
        student = setup.student(groups)
        teachers = teachers or setup.teachers(student)
        shuffled = [rollouts[i] for i in order]
        trainer = make_trainer(student, teachers, [shuffled], "vopd_full", max_tokens)
        metrics = trainer.train_step()
        found.append((metrics["loss/mean"], trainer.gradients, whole_weights(student)))
    return found


def test_packing_does_not_change_the_gradient(folders: tuple[str, str]) -> None:
    """It holds for rows of one sequence to all of them, shuffled orders, one and two replicas."""
    rollouts = make_rollouts(7, VOCAB)
    draw = random.Random(0)
    orders = []
    for max_tokens in (28, 48, 400):
        order = list(range(7))
        draw.shuffle(order)
        orders.append((order, max_tokens))
    setup = Setup(ALONE, folders[0], {"teacher": folders[1]})
    reference = reference_step(folders[0], {"teacher": folders[1]}, rollouts, "vopd_full")
    worlds = [
        spawn(_variants, 1, setup, rollouts, orders),
        spawn(_variants, 2, replace(setup, case=DP2), rollouts, orders),
    ]
    worst = 0.0
    for ranks in worlds:
        for variants in ranks:
            for loss, gradients, weights in variants:
                assert abs(loss - reference.loss) <= 1e-6
                worst = max(worst, worst_error(gradients, reference.gradients))
                assert worst_error(weights, reference.updated) <= 1e-6
    print(f"\ngradient over 6 packings: {worst:.1e}")
    assert worst <= 1e-5


def _equal_sequences(num: int, seed: int) -> list[Rollout]:
    """Make responses of 6 to prompts of 5 tokens: rows of 10."""
    made = make_rollouts(num, VOCAB, seed)
    draw = random.Random(seed)
    return [
        replace(
            rollout,
            prompt=replace(rollout.prompt, ids=tuple(draw.randrange(VOCAB) for _ in range(5))),
            response_ids=tuple(draw.randrange(VOCAB) for _ in range(6)),
            rollout_logprobs=tuple(-draw.uniform(1, 8) for _ in range(6)),
        )
        for rollout in made
    ]


def _batch_sizes(setup: Setup, batches: list[list[Rollout]]) -> Any:
    """On a rank: return (loss, gradient, skipped, moved) of 8 sizes x 1 to 3 sequences a row."""
    groups = enter(setup.case)
    student = setup.student(groups)
    teachers = setup.teachers(student)
    start = {name: p.detach().clone() for name, p in student.bare.named_parameters()}
    found = {}
    for num, rollouts in enumerate(batches):
        for in_row in (1, 2, 3):
            for name, parameter in student.bare.named_parameters():
                parameter.data.copy_(start[name])
            trainer = make_trainer(student, teachers, [rollouts], "vopd_full", 10 * in_row)
            metrics = trainer.train_step()
            moved = any(not torch.equal(p, start[n]) for n, p in student.bare.named_parameters())
            loss = metrics.get("loss/mean", 0.0)
            found[num, in_row] = (loss, trainer.gradients, metrics["optim/skipped"], moved)
    return found


def test_batch_sizes_that_leave_replicas_empty(folders: tuple[str, str]) -> None:
    """S9: 0 to 7 sequences x 2 replicas x 1 to 3 sequences a row, 24 steps without a hang."""
    batches = [_equal_sequences(num, num) for num in range(8)]
    setup = Setup(DP2, folders[0], {"teacher": folders[1]})
    references = [
        reference_step(folders[0], {"teacher": folders[1]}, rollouts, "vopd_full")
        for rollouts in batches[1:]
    ]
    worst = 0.0
    for found in spawn(_batch_sizes, 2, setup, batches):
        assert len(found) == 24
        for (num, _), (loss, gradients, skipped, moved) in found.items():
            assert (skipped, moved) == ((1.0, False) if num == 0 else (0.0, True))
            if num == 0:
                assert all(not g.any() for g in gradients.values())
                continue
            assert abs(loss - references[num - 1].loss) <= 1e-6
            worst = max(worst, worst_error(gradients, references[num - 1].gradients))
    print(f"\ngradient over 24 batches: {worst:.1e}")
    assert worst <= 1e-5


def _own_teacher(setup: Setup, rollouts: list[Rollout], kinds: tuple[str, ...]) -> Any:
    """On a rank: let the student distil itself; return loss, gradient norm, advantage per kind."""
    groups = enter(setup.case)
    student = setup.student(groups)
    teachers = setup.teachers(student)
    found = {}
    for kind in kinds:
        trainer = make_trainer(student, teachers, [rollouts], kind)
        # Where the gradient is 0 the weights stay; across layouts they must not move either.
        trainer.student.optimizer.step_with_ready_grads = lambda: True
        trainer.train_step()
        largest = max(float(g.abs().max()) for g in trainer.gradients.values())
        found[kind] = largest, {key: float(value) for key, value in trainer.loss.sums.items()}
    return found


SAME = {
    1: (Case("alone", Layout(1)), (None,)),
    2: (Case("tp2", Layout(2, tp=2)), (None, Layout(2), Layout(2, pp=2))),
    4: (Case("tp2-pp2", Layout(4, tp=2, pp=2)), (None, Layout(4, tp=4), Layout(4, pp=2))),
}


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_student_that_is_its_own_teacher(world: int, folders: tuple[str, str]) -> None:
    """Loss, advantage and gradient are exactly 0 in the same layout; |A| <= 1e-5 across layouts."""
    case, layouts = SAME[world]
    rollouts = make_rollouts(5, VOCAB)
    kinds = ("vopd_full", "reverse", "vopd_topk")
    for layout in layouts:
        setup = Setup(case, folders[0], {"teacher": folders[0]}, layout)
        results = spawn(_own_teacher, world, setup, rollouts, kinds)
        for kind in kinds:
            largest = max(result[kind][0] for result in results)
            sums = next(result[kind][1] for result in reversed(results) if result[kind][1])
            count = sums["num_tokens"]
            advantage = (sums.get("advantage_squared", 0.0) / count) ** 0.5
            print(f"\n{case} teacher {layout}: {kind} A {advantage:.1e} gradient {largest:.1e}")
            if layout is None:
                assert largest == 0 and advantage == 0
                assert sums["loss/mean"] == 0 and sums["kl/reverse"] == 0
            else:
                assert advantage <= 1e-5 and largest <= 1e-5


def test_topk_of_the_fixture_is_below_the_vocabulary() -> None:
    assert 1 < TOPK < VOCAB
