"""Teacher states from the disk give the gradients of computed ones, bit by bit, in any layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.errors import UserError
from megatron_vopd.files.teacher_states import StateCache
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.student import Student
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.types import Layout, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.steps import Setup, make_rollouts, make_trainer, worst_error
from tests.support.tiny_models import TinyModel

VOCAB = 157
STUDENT = TinyModel("qwen3", True, VOCAB, overrides=(("num_hidden_layers", 2),))
TEACHER = TinyModel("qwen3", False, VOCAB, overrides=(("hidden_size", 80),))
GIVEN = make_rollouts(7, VOCAB, sampled=False)
# A text that occurs twice in a step, as at the end of an epoch; and new texts beside known ones.
FIRST = [*GIVEN, GIVEN[2]]
SECOND = [*GIVEN[3:], *make_rollouts(3, VOCAB, seed=8, sampled=False)]
MIXED = [*GIVEN[:3], *make_rollouts(3, VOCAB, seed=9)]


class _Run:
    """On a rank: steps of fresh students, and how often the teacher ran."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.groups: Groups = enter(setup.case)
        self.calls = 0
        self.teachers: dict[str, Teacher] = {}

    def student(self) -> Student:
        student = self.setup.student(self.groups)
        if not self.teachers:
            self.teachers = self.setup.teachers(student)
            scored = self.teachers["teacher"].score

            def counted(rows: Any) -> Any:
                self.calls += 1
                return scored(rows)

            self.teachers["teacher"].score = counted
        return student

    def cache(self) -> StateCache:
        teacher = self.teachers["teacher"]
        size, dtype = teacher.facts.hidden_size, teacher.received(0).dtype
        return StateCache(self.folder, {"teacher": "t"}, size, dtype)

    def gradients(self, rollouts: Sequence[Rollout], cached: bool) -> tuple[dict, int]:
        """Return gradients of one step and the teacher's forward passes in it; a new cache each."""
        student, before = self.student(), self.calls
        caches = {}
        if cached:
            caches = {"teacher": self.cache()}
            caches["teacher"].scan()
        trainer = make_trainer(student, self.teachers, [rollouts], "mixed")
        trainer.caches = caches
        trainer.train_step()
        return trainer.gradients, self.calls - before


def _steps(setup: Setup, folder: Path) -> dict[str, Any]:
    run = _Run(setup, folder)
    folder.mkdir(exist_ok=True)
    plain, ran = run.gradients(FIRST, False)
    filling, ran_filling = run.gradients(FIRST, True)
    reading, ran_reading = run.gradients(FIRST, True)
    partly_plain, _ = run.gradients(SECOND, False)
    partly, ran_partly = run.gradients(SECOND, True)
    again, ran_again = run.gradients(SECOND, True)
    mixed_plain, _ = run.gradients(MIXED, False)
    mixed, ran_mixed = run.gradients(MIXED, True)
    return {
        "runs": (ran, ran_filling, ran_reading, ran_partly, ran_again, ran_mixed),
        "filling": _equal(plain, filling),
        "reading": _equal(plain, reading),
        "again": _equal(partly, again),
        "partly": worst_error(partly, partly_plain),
        "mixed": worst_error(mixed, mixed_plain),
    }


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


LAYOUTS = {
    "dp2, teacher tp2": (Case("dp2", Layout(2)), Layout(2, tp=2), torch.float32),
    "tp2, teacher dp2, bf16": (Case("tp2", Layout(2, tp=2)), Layout(2), torch.bfloat16),
    "cp2, teacher tp2": (Case("cp2", Layout(2, cp=2)), Layout(2, tp=2), torch.float32),
    "pp2, teacher pp2": (Case("pp2", Layout(2, pp=2)), Layout(2, pp=2), torch.float32),
    "tp2-pp2, teacher tp2": (
        Case("tp2-pp2", Layout(4, tp=2, pp=2)),
        Layout(4, tp=2),
        torch.float32,
    ),
}


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return str(STUDENT.save(root / "s", 0)), str(TEACHER.save(root / "t", 1))


@pytest.mark.parametrize(
    "name",
    [
        name if i < 3 else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(LAYOUTS)
    ],
)
def test_cached_states_are_the_computed_ones(name: str, dirs: Any, tmp_path: Path) -> None:
    case, teacher_layout, dtype = LAYOUTS[name]
    setup = Setup(case, dirs[0], {"teacher": dirs[1]}, teacher_layout, dtype=dtype)
    for found in spawn(_steps, case.layout.world_size, setup, tmp_path / "cache"):
        print(name, found)
        assert found["filling"] and found["reading"] and found["again"]
        # Computed, computed and kept, read; some of a row known, all known; some never kept.
        assert found["runs"] == (1, 1, 0, 1, 0, 1)
        # Computed in other rows than before: the order of sums differs, nothing else.
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        assert found["partly"] <= limit and found["mixed"] <= limit
    kept = list((tmp_path / "cache").iterdir())
    assert kept and all(path.suffix == ".safetensors" for path in kept)


def _torn(setup: Setup, folder: Path) -> str:
    run = _Run(setup, folder)
    folder.mkdir(exist_ok=True)
    run.gradients(FIRST, True)
    if run.groups.coordinates.dp == 0:
        for path in folder.iterdir():
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    torch.distributed.barrier()
    with pytest.raises(UserError) as caught:
        run.gradients(FIRST, True)
    return str(caught.value)


def test_a_damaged_file_is_refused_on_every_rank(dirs: Any, tmp_path: Path) -> None:
    case, teacher_layout, _ = LAYOUTS["dp2, teacher tp2"]
    setup = Setup(case, dirs[0], {"teacher": dirs[1]}, teacher_layout)
    for message in spawn(_torn, 2, setup, tmp_path / "cache"):
        assert "teacher.cache_dir: got " in message and "which is torn" in message
        assert "content is not what was written" in message and "remove it" in message
