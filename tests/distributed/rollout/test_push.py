"""A push reaches every engine whole, and a failure on one rank is raised on all (scripted engines).

That a real engine then samples from these weights is shown with vLLM in
tests/integration/rollout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_vopd.errors import EngineError
from megatron_vopd.megatron import weights
from megatron_vopd.rollout.engine import PushReport
from megatron_vopd.rollout.push import (
    Probe,
    largest_gap,
    make_probe,
    push,
)
from megatron_vopd.rollout.weights.memory_file import Segment, digest
from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.layouts import Case, build, enter
from tests.support.scoring import score
from tests.support.scripted import ScriptedEngine
from tests.support.tiny_models import TinyModel, reference_tensors

VOCAB = 157
CASES = (
    (Case("tp2-pp2", Layout(4, tp=2, pp=2)), TinyModel("qwen3", True, VOCAB)),
    (Case("dp2-pp2", Layout(4, pp=2)), TinyModel("llama", False, VOCAB)),
    (Case("cp2-pp2", Layout(4, pp=2, cp=2)), TinyModel("qwen3", True, VOCAB)),
    (Case("pp2-ep2", Layout(4, pp=2, ep=2)), TinyModel("qwen3_moe", False, VOCAB)),
)
PROBE = make_probe(VOCAB, num_sequences=2, length=9)


def _expected(model: TinyModel, folder: Path) -> dict[str, str]:
    """Return what a push must bring: the checkpoint, and the head of a tied model."""
    tensors = reference_tensors(folder)
    if model.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return {name: digest(tensor.contiguous()) for name, tensor in tensors.items()}


def _reference_scores(folder: Path) -> list[list[float]]:
    """Return the log-probs of the probe by transformers: the trainer's side of a push's proof."""
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(PROBE.sequences)
    with torch.no_grad():
        logprobs = reference(ids).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(2, ids[:, 1:, None])[..., 0].tolist()


def _attempt(action: Any) -> Any:
    """Return the result of `action`, or the message of its EngineError."""
    try:
        return action()
    except EngineError as error:
        return str(error)


@contextmanager
def _no_broadcasts() -> Iterator[None]:
    """Make the collectives of an export fail."""
    with mock.patch.object(weights, "broadcast_from_position", side_effect=AssertionError("used")):
        yield


@contextmanager
def _second_fails() -> Iterator[None]:
    """Find no memory for the second layer."""
    make_room, calls = Segment.make_room, itertools.count()

    def failing(self: Segment, *args: Any) -> Any:
        if next(calls) == 1:
            raise OSError("no memory left")
        return make_room(self, *args)

    with mock.patch.object(Segment, "make_room", failing):
        yield


def _pushes(case: Case, folder: str) -> dict[str, Any]:
    """On a rank: push one time after another, with every kind of failure."""
    groups = enter(case)
    student, facts = build(folder, case, groups)
    leader = groups.is_leader
    found: dict[str, Any] = {"leader": leader}

    def one(engine: ScriptedEngine | None, version: int, **options: Any) -> Any:
        return _attempt(lambda: push(student, facts, groups, engine, version, **options))

    engine = ScriptedEngine(VOCAB) if leader else None
    found["push"] = one(engine, 1)
    found["weights"] = engine.weights if engine else None

    # The same through memory that all ranks write; no collective carries a weight then.
    shared = ScriptedEngine(VOCAB, shared_dtype=torch.float32) if leader else None
    with _no_broadcasts():
        found["shared"] = one(shared, 1)
    found["shared weights"] = shared.weights if shared else None

    # The last rank cannot write the second layer.
    is_last = dist.get_rank() == dist.get_world_size() - 1
    unwritable = ScriptedEngine(VOCAB, shared_dtype=torch.float32) if leader else None
    with _second_fails() if is_last else nullcontext():
        found["unwritable"] = one(unwritable, 2, attempts=1)
    found["unwritable version"] = unwritable.policy_version if unwritable else None

    # The last leader fails once in the middle of a push, then always.
    is_last_leader = leader and groups.coordinates.dp == groups.layout.dp - 1
    flaky = (
        ScriptedEngine(VOCAB, push_faults=[0] if is_last_leader else [], shared_dtype=torch.float32)
        if leader
        else None
    )
    found["flaky"] = one(flaky, 2)
    found["flaky weights"] = flaky.weights if flaky else None
    broken = (
        ScriptedEngine(VOCAB, push_faults=range(9) if is_last_leader else ()) if leader else None
    )
    found["broken"] = one(broken, 3)
    found["broken version"] = broken.policy_version if broken else None

    # A scripted engine does not answer with the student's log-probs: the probe must refuse it.
    found["scores"] = score(student, facts, groups, PROBE.sequences)
    found["unproven"] = one(engine, 4, score_fn=lambda _: found["scores"], probe=PROBE)
    found["unproven version"] = engine.policy_version if engine else None
    answers = ScriptedEngine(VOCAB).probe_logprobs(PROBE.sequences)
    found["proven"] = one(engine, 5, score_fn=lambda _: answers, probe=PROBE)

    # NaN in one shard of one rank: nobody sends anything.
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            next(student.parameters()).view(-1)[-1] = torch.nan
    found["nan"] = one(engine, 6)
    found["nan version"] = engine.policy_version if engine else None
    return found


@pytest.mark.parametrize(("case", "model"), CASES, ids=lambda value: str(value))
def test_pushes(case: Case, model: TinyModel, tmp_path: Path) -> None:
    folder = model.save(tmp_path)
    expected, scores = _expected(model, folder), _reference_scores(folder)
    results = spawn(_pushes, 4, case, str(folder))
    leaders = [found for found in results if found["leader"]]
    assert len(leaders) == case.layout.dp
    num_bytes = sum(tensor.nbytes for tensor in reference_tensors(folder).values())
    for found in results:
        report = found["push"]
        assert isinstance(report, PushReport) and report.attempts == 1
        assert report.num_tensors == len(expected) and report.num_bytes >= num_bytes
        assert found["shared"] == report
        assert found["flaky"].attempts == 2 and found["flaky"].policy_version == 2
        for name in ("unwritable", "broken", "unproven", "nan"):
            assert found[name] == results[0][name], "every rank must raise the same"
        assert "rank 3: weights: 1 ranks could not write" in found["unwritable"]
        assert "no memory left" in found["unwritable"]
        assert found["unwritable version"] is None
        assert "failed 2 times" in found["broken"] and "as asked for" in found["broken"]
        assert "it does not hold the student's weights" in found["unproven"]
        assert found["proven"].probe_gap == 0.0
        assert largest_gap(found["scores"], scores) <= 1e-5
        assert "rank 3" in found["nan"] and "not finite" in found["nan"]
    for found in leaders:
        assert found["weights"] == found["flaky weights"] == found["shared weights"] == expected
        assert found["unproven version"] is None and found["nan version"] == 5
    assert leaders[-1]["broken version"] is None


def test_a_probe_needs_something_to_score() -> None:
    for sequences in ((), ((1,),)):
        with pytest.raises(ValueError, match="at least"):
            Probe(sequences)


def test_a_probe_allows_for_the_rounding_of_large_logits() -> None:
    probe = make_probe(VOCAB, tolerance=1e-4, relative=2e-5)
    assert probe.limit([[-0.5, -2.0], [-50.0]]) == pytest.approx(1e-4 + 50 * 2e-5)
    assert PROBE.limit([[-0.5, -50.0]]) == PROBE.tolerance
