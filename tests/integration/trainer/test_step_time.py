"""Where a step's time goes with a real engine, and what generating one step ahead gains.

One trainer process and one vLLM process, a thread each, the vocabulary of Qwen3. Run with -s for
the table. The machine should have two idle cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.config.schema import OptimizerSection
from megatron_vopd.data.stream import PromptStream
from megatron_vopd.megatron.groups import independent_groups, init_world, student_groups
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.megatron.student import load_student
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.rollout.push import make_probe, push
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.student_logprobs import sequence_logprobs
from megatron_vopd.trainer.trainer import PHASES, Trainer
from megatron_vopd.types import Layout, Prompt
from tests.support.engines import needs_vllm, settings
from tests.support.harness import spawn
from tests.support.settings import objective_named, step_settings
from tests.support.steps import FixedLength
from tests.support.tiny_models import TinyModel

pytestmark = needs_vllm
VOCAB = 151_936
SIZES = (
    ("hidden_size", 256),
    ("intermediate_size", 512),
    ("head_dim", 64),
    ("max_position_embeddings", 512),
)
MODEL = TinyModel("qwen3", True, VOCAB, overrides=SIZES)
RESPONSE_TOKENS, PROMPT_TOKENS, NUM_PROMPTS = 48, 16, 16
STOP = 7
# An engine that gives up a probe in fp32 over 152k columns differs in the order of longer sums.
PROBE_TOLERANCE = 5e-5


def _prompts() -> list[Prompt]:
    return [
        Prompt(f"p{i}", tuple((i * 7919 + j * 104729) % VOCAB for j in range(PROMPT_TOKENS)))
        for i in range(64)
    ]


def _metrics(
    model_dir: str, teacher_dir: str, log_path: str, staleness: int, num_steps: int
) -> list[dict[str, float]]:
    """On the only rank: return the metrics of each step."""
    init_world("cpu")
    groups = student_groups(Layout(1))
    section = OptimizerSection(learning_rate=1e-5, schedule="constant")
    student = load_student(model_dir, groups, ModelOptions(), section, 100)
    teacher_groups = independent_groups(Layout(1))
    teacher = Teacher(teacher_dir, teacher_groups, student.facts, groups, ModelOptions())
    engine = LocalEngine(settings(model_dir, log_path, cpu_threads=1))
    probe = make_probe(VOCAB, tolerance=PROBE_TOLERANCE)

    def score(sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return sequence_logprobs(student, sequences, 512)

    def push_weights(policy_version: int) -> Any:
        return push(student.bare, student.facts, groups, engine, policy_version, score, probe)

    step = step_settings(
        objective=replace(objective_named("sampled"), chunk=256),
        num_prompts=NUM_PROMPTS,
        stop_ids=(STOP,),
        max_tokens_per_microbatch=512,
        max_staleness=staleness,
    )
    stream = PromptStream(_prompts(), seed=0)
    collector = RolloutCollector(groups, engine, stream, step, VOCAB, "cpu", push=push_weights)
    trainer = Trainer(student, {"teacher": teacher}, collector, FixedLength(RESPONSE_TOKENS), step)
    try:
        collector.push(0)
        return [trainer.train_step() for _ in range(num_steps)]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return str(MODEL.save(root, 0)), str(MODEL.save(root / "teacher", 1))


def _table(steps: list[dict[str, float]]) -> Iterator[tuple[str, float]]:
    """Return the mean seconds of every phase."""
    for name in (*PHASES, "other", "total"):
        yield name, statistics.fmean(m[f"time/{name}_seconds"] for m in steps)


def test_table_and_staleness(folders: tuple[str, str], tmp_path: Path) -> None:
    rates, waits = {}, {}
    for staleness in (0, 1):
        log_path = str(tmp_path / f"engine{staleness}.log")
        (metrics,) = spawn(_metrics, 1, *folders, log_path, staleness, 6)
        # The engine compiles in the first step, and nothing is sampled ahead of it.
        steps = metrics[1:-1]
        seconds = dict(_table(steps))
        operator = statistics.fmean(m["time/loss_operator_seconds"] for m in steps)
        tokens = statistics.fmean(m["loss/num_tokens"] for m in steps)
        print(f"\nstaleness {staleness}: {tokens:.0f} response tokens, V = {VOCAB}")
        for name, value in seconds.items():
            print(f"  {name:18} {value:7.3f} s {100 * value / seconds['total']:6.1f} %")
        share = 100 * operator / seconds["total"]
        print(f"  {'(loss operator)':18} {operator:7.3f} s {share:6.1f} %")
        rates[staleness], waits[staleness] = tokens / seconds["total"], seconds["rollout"]
        print(f"  {rates[staleness]:.0f} tokens/s")
        assert seconds["total"] >= 2 and seconds["other"] <= 0.05 * seconds["total"]
        assert all(m["optim/skipped"] == 0 for m in metrics)
        kl = [m["mismatch/kl"] for m in steps]
        print("  mismatch/kl " + " ".join(f"{value:.1e}" for value in kl))
        # Same weights: rounding. One step behind: what one update changed.
        assert all(value < 1e-8 for value in kl) if staleness == 0 else min(kl) > 1e-8
    print(f"staleness 1 over 0: {rates[1] / rates[0]:.2f} x")
    # What overlapping is for. How much throughput that gains depends on the cores that are idle.
    assert waits[1] < 0.5 * waits[0]
