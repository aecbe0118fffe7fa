"""S1: what a real vLLM engine samples is what the trainer's weights say, push after push.

Four gloo ranks hold the student as TP 2 x PP 2 (experts: PP 2 x EP 2); their leader hosts the
engine. Ten steps of training, each pushed; after each at least 1,000 tokens are sampled and scored
by the student itself through megatron-core's pipeline schedule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.rollout.push import make_probe, push
from megatron_vopd.rollout.vllm.local import LocalEngine
from tests.support.engines import (
    EP2_PP2,
    MODELS,
    STOP,
    TOLERANCE,
    TP2_PP2,
    VOCAB,
    Student,
    make_collector,
    make_prompts,
    needs_vllm,
    settings,
    worst_gap,
)
from tests.support.harness import spawn
from tests.support.layouts import Case, enter

pytestmark = needs_vllm
PUSHES, MIN_TOKENS = 10, 1000
# Logits of a few nats with 8 bits each, through four layers.
BF16_TOLERANCE = 0.1


def _pushes(
    folder: str, case: Case, log_path: str, pushes: int, dtype: str, tolerance: float
) -> list[dict[str, Any]]:
    """On a rank: return what was measured after each push."""
    groups = enter(case)
    student = Student(folder, case, groups, getattr(torch, dtype))
    engine = LocalEngine(settings(folder, log_path, dtype=dtype)) if groups.is_leader else None
    collector = make_collector(groups, engine)
    prompts, probe, found = make_prompts(16), make_probe(VOCAB, tolerance=tolerance), []
    try:
        for version in range(1, pushes + 1):
            student.train()
            arguments = (student.model, student.facts, groups, engine, version)
            report = push(*arguments, score_fn=student.score, probe=probe)
            sampling = Sampling(max_tokens=48, samples=2, seed=version, stop_ids=(STOP,))
            rollouts = collector.sample(prompts, sampling, version)
            gap, tokens = worst_gap(student, rollouts)
            found.append({"report": report, "gap": gap, "tokens": tokens, "first": rollouts[:1]})
        return found
    finally:
        if engine is not None:
            assert engine.num_starts == 1
            engine.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
def test_ten_pushes(name: str, tmp_path: Path) -> None:
    folder = MODELS[name].save(tmp_path)
    case = EP2_PP2 if name == "qwen3_moe" else TP2_PP2
    arguments = (str(folder), case, str(tmp_path / "engine.log"), PUSHES, "float32", TOLERANCE)
    found = spawn(_pushes, 4, *arguments)[0]
    assert [one["report"].policy_version for one in found] == list(range(1, PUSHES + 1))
    for one in found:
        assert one["tokens"] >= MIN_TOKENS
        assert one["gap"] <= TOLERANCE and one["report"].probe_gap <= TOLERANCE
    first = [one["first"][0].response_ids for one in found]
    assert len(set(first)) > 1, "training did not change what is sampled"
    print(
        f"\n{name}: {PUSHES} pushes, tokens {sum(one['tokens'] for one in found)}, largest gap "
        f"{max(one['gap'] for one in found):.1e}, probe "
        f"{max(one['report'].probe_gap for one in found):.1e}, push "
        f"{max(one['report'].seconds for one in found):.2f} s at most"
    )


@pytest.mark.timeout(900)
def test_bf16(tmp_path: Path) -> None:
    """In bf16 engine and trainer round differently; what is sent is still the student's bits."""
    folder = MODELS["qwen3-tied"].save(tmp_path)
    arguments = (str(folder), TP2_PP2, str(tmp_path / "engine.log"), 3, "bfloat16", BF16_TOLERANCE)
    found = spawn(_pushes, 4, *arguments)[0]
    gaps = [one["gap"] for one in found], [one["report"].probe_gap for one in found]
    print(f"\nbf16: largest gaps {gaps[0]}, probe {gaps[1]}")
    assert max(gaps[0]) <= BF16_TOLERANCE
    assert [one["report"].attempts for one in found] == [1, 1, 1]
