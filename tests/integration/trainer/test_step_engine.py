"""Steps with a real engine: a student that is its own teacher, learning, and a killed engine."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.curriculum import EntropyGatedLength
from megatron_vopd.data.stream import PromptStream
from megatron_vopd.rollout.push import make_probe, push
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.student_logprobs import sequence_logprobs
from megatron_vopd.trainer.trainer import Trainer
from megatron_vopd.types import Layout
from tests.support.engines import MODELS, STOP, VOCAB, make_prompts, needs_vllm, settings
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.reference_step import Adam
from tests.support.settings import step_settings
from tests.support.steps import Setup, objective, whole_weights

pytestmark = needs_vllm
TP2 = Case("tp2", Layout(2, tp=2))
MODEL = MODELS["qwen3-tied"]


def _run(setup: Setup, log_path: str, num_steps: int, kill_before: int) -> Any:
    """On a rank: return metrics of the steps, a hash of the final weights, starts of the engine.

    Args:
        kill_before: step before which all of the engine's processes are killed; -1: none.
    """
    groups = enter(setup.case)
    student = setup.student(groups)
    engine = None
    if groups.is_leader:
        engine = LocalEngine(settings(setup.student_dir, log_path, cpu_threads=1))
    probe = make_probe(VOCAB)

    def score(sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return sequence_logprobs(student, sequences, 256)

    def push_weights(policy_version: int) -> Any:
        bare, facts = student.bare, student.facts
        return push(bare, facts, groups, engine, policy_version, score, probe)

    step = step_settings(
        objective=objective("vopd_full"),
        num_prompts=8,
        samples_per_prompt=2,
        stop_ids=(STOP,),
        max_tokens_per_microbatch=256,
    )
    prompts = make_prompts(24)
    collector = RolloutCollector(
        groups, engine, PromptStream(prompts[4:], 0), step, VOCAB, "cpu", push=push_weights
    )
    curriculum = EntropyGatedLength((16, 32), interval=2)
    trainer = Trainer(
        student, setup.teachers(student), collector, curriculum, step, held_out=prompts[:4]
    )
    metrics = []
    try:
        collector.push(0)
        for number in range(num_steps):
            if number == kill_before and engine is not None:
                for process in engine.processes():
                    os.kill(process, signal.SIGKILL)
            metrics.append(trainer.train_step())
    finally:
        starts = 0 if engine is None else engine.num_starts
        if engine is not None:
            engine.close()
    digest = hashlib.sha256()
    for weight in whole_weights(student).values():
        digest.update(weight.numpy().tobytes())
    return metrics, digest.hexdigest(), starts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return str(MODEL.save(root, 0)), str(MODEL.save(root / "teacher", 1))


def test_a_student_that_is_its_own_teacher(folders: tuple[str, str], tmp_path: Path) -> None:
    """Nothing is left to learn: loss, advantage and gradient are exactly 0, step after step."""
    setup = Setup(TP2, folders[0], {"teacher": folders[0]})
    for metrics, _, _ in spawn(_run, 2, setup, str(tmp_path / "engine.log"), 2, -1):
        for values in metrics:
            keys = ("loss/mean", "kl/reverse", "advantage/std", "optim/grad_norm")
            assert [values[key] for key in keys] == [0.0] * 4
            assert values["mismatch/kl"] < 1e-9 and values["loss/num_tokens"] > 100


def test_learning_survives_a_killed_engine(folders: tuple[str, str], tmp_path: Path) -> None:
    """KL falls; the run whose engine was killed ends with the same bits as the undisturbed one."""
    teachers = {"teacher": folders[1]}
    setup = Setup(TP2, folders[0], teachers, Layout(2, pp=2), adam=Adam(learning_rate=3e-3))
    outcomes = []
    for kill_before in (-1, 3):
        log_path = str(tmp_path / f"engine{kill_before}.log")
        outcomes.append(spawn(_run, 2, setup, log_path, 6, kill_before))
    (metrics, digest, starts), _ = outcomes[0]
    kls = [values["kl/reverse"] for values in metrics]
    lengths = [values["curriculum/max_response_tokens"] for values in metrics]
    print("\nkl/reverse " + " ".join(f"{kl:.3f}" for kl in kls), lengths)
    assert kls[-1] < 0.9 * kls[0]
    assert all(values["mismatch/kl"] < 1e-9 for values in metrics)
    (killed_metrics, killed_digest, killed_starts), _ = outcomes[1]
    assert (starts, killed_starts) == (1, 2)
    assert [values["kl/reverse"] for values in killed_metrics] == kls
    assert killed_digest == digest
