"""One training step equals a plain reference in one process, whatever the layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vopd.types import Layout, Rollout
from tests.support.harness import spawn
from tests.support.layouts import enter
from tests.support.reference_step import Reference, reference_step
from tests.support.step_cases import BAR, STUDENT, STUDENTS, TEACHER, VOCAB
from tests.support.steps import TOPK, Setup, make_rollouts, make_trainer, whole_weights, worst_error
from tests.support.tiny_models import TinyModel

SEVEN = ("vopd_full", "vopd_topk", "opd", "reverse", "forward", "mixed", "hard")
MORE = ("vopd_topk_tail", "vopd_optimal", "topk_reverse", "gated")

TIED_STUDENT = TinyModel("qwen3", True, VOCAB)
TEACHER_ONE_KV = TinyModel("qwen2", True, VOCAB)
MOE_TEACHER = TinyModel("qwen3_moe", False, VOCAB)

# Teacher layouts by the size of the world.
TEACHERS = {
    2: {
        "same": (TEACHER, None),
        "tp1": (TEACHER, Layout(2)),
        "tp2-one-kv-head": (TEACHER_ONE_KV, Layout(2, tp=2)),
        "pp2": (TEACHER, Layout(2, pp=2)),
        "moe-ep2": (MOE_TEACHER, Layout(2, ep=2)),
    },
    4: {
        "same": (TEACHER, None),
        "tp4-two-kv-heads": (TEACHER, Layout(4, tp=4)),
        "pp4": (TEACHER_ONE_KV, Layout(4, pp=4)),
        "tp2-dp2": (TEACHER, Layout(4, tp=2)),
        "moe-tp2-ep2": (MOE_TEACHER, Layout(4, tp=2, ep=2)),
    },
}


def step_errors(
    setup: Setup, rollouts: list[Rollout], references: dict[str, Reference]
) -> dict[str, dict[str, float]]:
    """On a rank: return errors of loss, gradient and update per objective; teachers made once."""
    groups = enter(setup.case)
    teachers, errors = None, {}
    for kind, reference in references.items():
        student = setup.student(groups)
        if teachers is None:
            teachers = setup.teachers(student)
        trainer = make_trainer(student, {} if kind == "hard" else teachers, [rollouts], kind)
        metrics = trainer.train_step()
        weights = whole_weights(student)
        moved = {name: weights[name] - start for name, start in reference.initial.items()}
        expected = {n: reference.updated[n] - start for n, start in reference.initial.items()}
        assert metrics["loss/num_tokens"] == reference.num_tokens
        assert metrics["optim/skipped"] == 0
        norm = reference.grad_norm
        errors[kind] = {
            "loss": abs(metrics["loss/mean"] - reference.loss) / max(1, abs(reference.loss)),
            "norm": abs(metrics["optim/grad_norm"] - norm) / norm,
            "gradient": worst_error(trainer.gradients, reference.gradients),
            "weights": worst_error(weights, reference.updated),
            "update": worst_error(moved, expected),
        }
    return errors


def check(setup: Setup, rollouts: list[Rollout], references: dict[str, Reference]) -> None:
    """Print the errors of one world and assert that they are below the bar."""
    results = spawn(step_errors, setup.case.layout.world_size, setup, rollouts, references)
    for kind in references:
        worst = {key: max(r[kind][key] for r in results) for key in results[0][kind]}
        print(f"{setup.case} {kind}: " + " ".join(f"{k} {v:.1e}" for k, v in worst.items()))
        for key in ("loss", "norm", "gradient", "weights"):
            assert worst[key] <= BAR, (str(setup.case), kind, key, worst)
        # Adam's first step is nearly the sign of the gradient: where that is small against eps,
        # its relative error passes on, magnified by g / eps.
        assert worst["update"] <= 1e-3, (str(setup.case), kind, worst)


class Models:
    """Folders of the models, and references by (student, teacher, kind), made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[tuple[str, int], str] = {}
        self._references: dict[tuple[str, str, str], Reference] = {}
        self.rollouts = make_rollouts(7, VOCAB)

    def folder(self, model: TinyModel, seed: int) -> str:
        key = (str(model), seed)
        if key not in self._folders:
            self._folders[key] = str(model.save(self._root / str(seed), seed))
        return self._folders[key]

    def references(
        self, student: TinyModel, teacher: TinyModel, kinds: tuple[str, ...]
    ) -> dict[str, Reference]:
        found = {}
        for kind in kinds:
            key = (str(student), str(teacher), kind)
            if key not in self._references:
                self._references[key] = reference_step(
                    self.folder(student, 0),
                    {"teacher": self.folder(teacher, 1)},
                    self.rollouts,
                    kind,
                    TOPK,
                )
            found[kind] = self._references[key]
        return found

    def setup(
        self, name: str, teacher_name: str, student: TinyModel = STUDENT
    ) -> tuple[Setup, TinyModel]:
        case, distributed = STUDENTS[name]
        teacher, layout = TEACHERS[case.layout.world_size][teacher_name]
        folders = {"teacher": self.folder(teacher, 1)}
        made = Setup(case, self.folder(student, 0), folders, layout, distributed)
        return made, teacher


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("name", "teacher_name", "kinds"),
    [
        ("tp2-pp2", "tp4-two-kv-heads", SEVEN),
        ("dp2-distributed", "moe-ep2", ("vopd_full", "gated")),
        ("cp2-distributed", "tp2-one-kv-head", ("vopd_full", "vopd_topk", "reverse")),
        ("tp2-cp2-sp", "tp2-dp2", ("vopd_full", "hard")),
        ("cp2-pp2", "same", ("vopd_full", "forward")),
    ],
)
def test_step(name: str, teacher_name: str, kinds: tuple[str, ...], models: Models) -> None:
    setup, teacher = models.setup(name, teacher_name)
    check(setup, models.rollouts, models.references(STUDENT, teacher, kinds))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "teacher_name"),
    [
        (name, teacher_name)
        for name, (case, _) in STUDENTS.items()
        for teacher_name in TEACHERS[case.layout.world_size]
    ],
)
def test_every_layout(name: str, teacher_name: str, models: Models) -> None:
    """Seven objectives run with an untied student, four more with a tied one."""
    for student, kinds in ((STUDENT, SEVEN), (TIED_STUDENT, MORE)):
        setup, teacher = models.setup(name, teacher_name, student)
        check(setup, models.rollouts, models.references(student, teacher, kinds))
