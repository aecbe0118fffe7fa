"""S7: a NaN, an infinity or a spike on one rank is skipped on all ranks, and changes no bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vopd.errors import SkipLimitError
from megatron_vopd.types import Layout, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.steps import RecordingTrainer, Setup, make_rollouts, make_trainer
from tests.support.tiny_models import TinyModel

VOCAB = 157
STUDENT = TinyModel("qwen3", False, VOCAB, overrides=(("num_hidden_layers", 2),))
FAULTS = {"nan": float("nan"), "inf": float("inf"), "spike": 1e6}
WARM_STEPS = 4


class FaultyTrainer(RecordingTrainer):
    """A trainer that spoils one number of one rank's gradient in chosen steps."""

    faulty_rank = 1
    faults: dict[int, float]

    def _update(self, rollouts: Any) -> Any:
        value = self.faults.get(self.step)
        if value is not None and dist.get_rank() == self.faulty_rank:
            gradient = next(iter(self.student.bare.parameters())).main_grad
            gradient.view(-1)[0] = value
        return super()._update(rollouts)


def _state_hash(student: Any) -> str:
    """Hash this rank's parameters, moments and learning-rate position."""
    digest = hashlib.sha256()
    for parameter in student.bare.parameters():
        digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
    for member in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        for state in member.optimizer.state.values():
            for value in state.values():
                digest.update(value.detach().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _run(setup: Setup, rollouts: list[Rollout], replay_dir: Path) -> dict[str, Any]:
    """On a rank: take warm steps, then each fault once with a good step between, then faults."""
    groups = enter(setup.case)
    student = setup.student(groups)
    teachers = setup.teachers(student)
    steps = [WARM_STEPS + 2 * i for i in range(len(FAULTS))]
    seen: dict[str, Any] = {"skipped": [], "unchanged": [], "changed": [], "versions": []}
    trainer = make_trainer(
        student,
        teachers,
        [rollouts],
        "vopd_full",
        make=FaultyTrainer,
        replay_dir=replay_dir,
        max_consecutive_skips=3,
    )
    trainer.faults = dict(zip(steps, FAULTS.values(), strict=True))
    for step in range(steps[-1] + 2):
        before = _state_hash(student)
        metrics = trainer.train_step()
        kind = "unchanged" if _state_hash(student) == before else "changed"
        seen[kind].append(step)
        if metrics["optim/skipped"]:
            seen["skipped"].append(step)
        seen["versions"].append(trainer.policy_version)
    trainer.faults = dict.fromkeys(range(trainer.step, trainer.step + 3), float("nan"))
    trainer.train_step()
    trainer.train_step()
    with pytest.raises(SkipLimitError) as caught:
        trainer.train_step()
    return seen | {"faulty_steps": steps, "end": str(caught.value)}


@pytest.mark.parametrize(
    ("case", "distributed"),
    [
        (Case("dp2", Layout(2)), False),
        (Case("tp2", Layout(2, tp=2)), True),
        pytest.param(Case("pp2", Layout(2, pp=2)), False, marks=pytest.mark.slow),
        pytest.param(Case("dp2", Layout(2)), True, marks=pytest.mark.slow),
        pytest.param(Case("tp2-pp2", Layout(4, tp=2, pp=2)), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_faults_of_one_rank_are_skipped_together(
    case: Case, distributed: bool, tmp_path: Path
) -> None:
    folder = str(STUDENT.save(tmp_path, 0))
    teacher = str(STUDENT.save(tmp_path / "teacher", 1))
    setup = Setup(case, folder, {"teacher": teacher}, distributed=distributed)
    replay = tmp_path / "skipped"
    results = spawn(_run, case.layout.world_size, setup, make_rollouts(5, VOCAB), replay)
    for rank, seen in enumerate(results):
        assert seen["skipped"] == seen["unchanged"] == seen["faulty_steps"], (rank, seen)
        assert len(seen["changed"]) == WARM_STEPS + 3
        assert seen["versions"][-1] == len(seen["changed"])
        assert "3 steps in a row were skipped" in seen["end"]
    saved = sorted(replay.iterdir())
    assert len(saved) == len(FAULTS) + 3
    batch = json.loads((replay / f"step_{WARM_STEPS}.json").read_text())
    assert len(batch["rollouts"]) == 5 and "gradient norm nan" in batch["skip_reason"]
