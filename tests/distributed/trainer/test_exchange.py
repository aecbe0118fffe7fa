"""F20: which ranks look at which tokens of a step, sampled by engines on four replicas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.megatron.groups import init_world, student_groups
from megatron_vopd.megatron.microbatch import Microbatch
from megatron_vopd.trainer import packing
from megatron_vopd.trainer.exchange import Graded, share_rollouts
from megatron_vopd.types import Layout, TensorNumbers
from tests.support.harness import spawn
from tests.support.layouts import Case, destroy_groups
from tests.support.steps import Setup, make_rollouts, make_trainer, whole_weights
from tests.support.tiny_models import TinyModel

VOCAB, NUM = 61, 40
MODEL = TinyModel("qwen3", True, VOCAB, overrides=(("num_hidden_layers", 1),))


class Shared:
    """A collector whose responses are spread over the ranks, and exchanged by all."""

    def __init__(self, given: Any, rank: int, world_size: int) -> None:
        self._given, self._rank, self._world_size = given, rank, world_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)

    def take(self, *args: Any) -> list[Graded]:
        graded = self._given.take(*args)
        prompts = [one.rollout.prompt for one in graded]
        return share_rollouts(graded[self._rank :: self._world_size], prompts, 1, "cpu")


def _step(setup: Setup, as_tensors: bool) -> dict[str, Any]:
    """Train one step; return its weights, and the responses that this rank built and read."""
    init_world("cpu")
    groups = student_groups(setup.case.layout)
    student, rollouts = setup.student(groups), make_rollouts(NUM, VOCAB)
    trainer = make_trainer(student, setup.teachers(student), [rollouts], "vopd_full", 48)
    if as_tensors:
        at = groups.coordinates.dp
        trainer.collector = Shared(trainer.collector, at, groups.layout.world_size)
    built, read, numbers = set[int](), [0], TensorNumbers.__iter__

    def noted(*values: Any) -> Microbatch:
        row = Microbatch(*values)
        built.update(row.rollouts)
        return row

    def counted(own: TensorNumbers) -> Any:
        read[0] += len(own)
        return numbers(own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "Microbatch", noted)
        patch.setattr(TensorNumbers, "__iter__", counted)
        trainer.train_step()
    own = (
        {index for row in packing.pack(rollouts, trainer.packing)[at] for index in row.rollouts}
        if as_tensors
        else built
    )
    return {"built": built, "own": own, "read": read[0], "weights": whole_weights(student)}


def _both(setup: Setup) -> list[dict[str, Any]]:
    first = _step(setup, False)
    destroy_groups()
    return [first, _step(setup, True)]


def test_a_rank_builds_the_rows_that_it_scores_or_trains(tmp_path: Path) -> None:
    """Of 40 responses each of four ranks builds its own and a teacher's share, and decodes none."""
    student, teacher = str(MODEL.save(tmp_path / "s", 0)), str(MODEL.save(tmp_path / "t", 1))
    setup = Setup(Case("dp4", Layout(4)), student, {"teacher": teacher}, distributed=True)
    ranks = spawn(_both, 4, replace(setup, teacher_layout=Layout(4)))
    for given, shared in ranks:
        assert all(given["weights"][name].equal(w) for name, w in shared["weights"].items())
        print(f"\nbuilt {len(shared['built'])} of {NUM}, trains {len(shared['own'])}")
        assert shared["own"] <= shared["built"] and len(shared["built"]) <= 0.7 * NUM
        assert shared["read"] == 0
    assert set().union(*(shared["own"] for _, shared in ranks)) == set(range(NUM))
