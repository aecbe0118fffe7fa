"""Prefix x direction and every mix, from configuration to gradient, against the plain reference.

The objective comes from a configuration section, responses through the collector: sampled by an
engine, given, or both. The reference gets the responses that the step was made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.config.method import ObjectiveSection
from megatron_vopd.data.stream import PromptStream
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.run.settings import objective_of
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.settings import StepSettings
from megatron_vopd.types import Prompt, Rollout
from tests.support.harness import spawn
from tests.support.layouts import enter
from tests.support.reference_step import reference_step
from tests.support.scripted import ScriptedEngine
from tests.support.settings import step_settings
from tests.support.step_cases import BAR, STUDENT, STUDENTS, TEACHER, VOCAB
from tests.support.steps import FixedLength, RecordingTrainer, Setup, make_rollouts, worst_error
from tests.support.tiny_models import TinyModel

NUM_PROMPTS, LONGEST = 6, 14
PROMPTS = [Prompt(f"p{i}", (i, 3 * i + 1, 150 - i)) for i in range(9)]
GIVEN = make_rollouts(9, VOCAB, seed=5, sampled=False)
HALF = {"student": 0.5, "teacher": 0.25, "dataset": 0.25}


@dataclass(frozen=True)
class Cell:
    """A cell of the table: where responses come from, and which KL."""

    prefix: Any
    direction: str
    reverse_weight: float | None = None

    @property
    def section(self) -> ObjectiveSection:
        weight: Any = {"reverse_weight": self.reverse_weight} if self.direction == "mixed" else {}
        chosen: Any = {"prefix": self.prefix, "estimator": "exact", "direction": self.direction}
        return ObjectiveSection(**chosen, **weight)

    @property
    def kind(self) -> str:
        """The name of the cell in the reference."""
        mixed = self.direction == "mixed"
        return f"mixed:{self.reverse_weight}" if mixed else self.direction


WEIGHTS = (0.0, 0.2, 0.5, 1.0)
CELLS = [
    *(Cell(prefix, way) for prefix in ("student", "teacher") for way in ("forward", "reverse")),
    *(Cell("student", "mixed", weight) for weight in WEIGHTS),
    Cell(HALF, "mixed", 0.2),
]
MORE_CELLS = [
    *CELLS,
    *(Cell(prefix, "mixed", weight) for prefix in ("teacher", HALF) for weight in WEIGHTS),
    *(Cell(prefix, way) for prefix in ("dataset", HALF) for way in ("forward", "reverse")),
]


class KeepsRollouts(RecordingTrainer):
    """A trainer that also keeps the responses that the step was made of."""

    rollouts: list[Rollout]

    def _update(self, rollouts: Any) -> Any:
        self.rollouts = list(rollouts)
        return super()._update(rollouts)


def _collector(groups: Groups, settings: StepSettings) -> RolloutCollector:
    engine = ScriptedEngine(VOCAB)
    engine.update_weights([], 0)
    own = engine if groups.is_leader else None
    prompts, given = PromptStream(PROMPTS, seed=1), PromptStream(GIVEN, seed=1)
    return RolloutCollector(groups, own, prompts, settings, VOCAB, "cpu", given)


def _gradients(setup: Setup, cells: list[Cell]) -> list[tuple[list[Rollout], float, dict]]:
    """On a rank: return responses, loss and gradient of one step of each cell."""
    groups = enter(setup.case)
    teachers, found = None, []
    for cell in cells:
        student = setup.student(groups)
        teachers = teachers or setup.teachers(student)
        settings = step_settings(
            objective=replace(objective_of(cell.section, temperature=1.0), chunk=16),
            num_prompts=NUM_PROMPTS,
            prefix_fractions=cell.section.prefix_fractions,
            stop_ids=(VOCAB - 1, 3, 4, 5, 6, 7, 8, 9, 10, 11),
            max_tokens_per_microbatch=64,
        )
        collector = _collector(groups, settings)
        curriculum = FixedLength(LONGEST)
        trainer = KeepsRollouts(student, teachers, collector, curriculum, settings)
        loss = trainer.train_step()["loss/mean"]
        found.append((trainer.rollouts, loss, trainer.gradients))
    return found


def _num_given(cell: Cell) -> int:
    return {"student": 0, "teacher": NUM_PROMPTS, "dataset": NUM_PROMPTS}.get(str(cell.prefix), 3)


def _check(setup: Setup, cells: list[Cell], references: dict[Any, Any]) -> None:
    ranks = spawn(_gradients, setup.case.layout.world_size, setup, cells)
    for index, cell in enumerate(cells):
        rollouts, _, _ = ranks[0][index]
        assert sum(r.policy_version == -1 for r in rollouts) == _num_given(cell)
        assert len({len(r.response_ids) for r in rollouts}) > 2 and len(rollouts) == NUM_PROMPTS
        key = repr(cell)
        if key not in references:
            dirs = (setup.student_dir, setup.teacher_dirs)
            references[key] = reference_step(*dirs, rollouts, cell.kind)
        reference = references[key]
        for own_rollouts, loss, gradients in (rank[index] for rank in ranks):
            assert own_rollouts == rollouts, "every rank trains on the same responses"
            error = worst_error(gradients, reference.gradients)
            print(f"{setup.case} {cell}: gradient {error:.1e}")
            assert error <= BAR, (cell, error)
            assert abs(loss - reference.loss) <= BAR * max(1, abs(reference.loss))


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    root: Path = tmp_path_factory.mktemp("models")
    teacher: TinyModel = TEACHER
    return str(STUDENT.save(root, 0)), {"teacher": str(teacher.save(root / "1", 1))}


@pytest.fixture(scope="module")
def references() -> dict[Any, Any]:
    return {}


def test_cells_and_mixes(dirs: Any, references: dict[Any, Any]) -> None:
    case, distributed = STUDENTS["dp2"]
    _check(Setup(case, dirs[0], dirs[1], None, distributed), CELLS, references)


def test_the_ends_of_a_mix_are_the_pure_directions(dirs: Any) -> None:
    """Mixes with lambda 0 and 1 have the gradients of the pure directions, bit for bit."""
    case, distributed = STUDENTS["dp2"]
    pairs = [
        (Cell("student", "mixed", 0.0), Cell("student", "forward")),
        (Cell("student", "mixed", 1.0), Cell("student", "reverse")),
    ]
    cells = [cell for pair in pairs for cell in pair]
    found = spawn(_gradients, 2, Setup(case, dirs[0], dirs[1], None, distributed), cells)[0]
    for mixed, pure in (found[:2], found[2:]):
        assert all(torch.equal(mixed[2][name], pure[2][name]) for name in pure[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_every_cell_in_every_layout(name: str, dirs: Any, references: dict[Any, Any]) -> None:
    case, distributed = STUDENTS[name]
    _check(Setup(case, dirs[0], dirs[1], None, distributed), MORE_CELLS, references)
