"""S2, S3: whatever goes wrong with a push is noticed before a rollout is used, on a real engine.

Each fault is put between the student and the engine, after a sound push of the step before; the
faulty push must fail on every rank and leave an engine that does not sample. A sound push then
brings it back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vopd.errors import EngineError
from megatron_vopd.megatron.weights import export_weights
from megatron_vopd.rollout import push
from megatron_vopd.rollout.engine import PushReport, Sampling
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.rollout.weights.memory_file import Segment
from megatron_vopd.types import Layout
from tests.support.engines import (
    MODELS,
    TOLERANCE,
    VOCAB,
    Student,
    make_prompts,
    needs_vllm,
    settings,
)
from tests.support.harness import spawn
from tests.support.layouts import Case, enter

pytestmark = needs_vllm
Stream = Iterable[tuple[str, Tensor]]
TP2 = Case("tp2", Layout(2, tp=2))
SQUARE = "model.layers.2.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def _changed(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Stream], Stream]:
    def stream(tensors: Stream) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in tensors:
            yield key, edit(tensor) if key == name else tensor

    return stream


def _dropped(condition: Callable[[str], bool]) -> Callable[[Stream], Stream]:
    return lambda tensors: ((key, tensor) for key, tensor in tensors if not condition(key))


def _swapped(tensors: Stream) -> Iterator[tuple[str, Tensor]]:
    names = {"model.layers.1.": "model.layers.2.", "model.layers.2.": "model.layers.1."}
    everything = {key: tensor.clone() for key, tensor in tensors}
    for key in everything:
        prefix = key[:15]
        yield key, everything[names.get(prefix, prefix) + key[15:]]


def _extra(tensors: Stream) -> Iterator[tuple[str, Tensor]]:
    yield from tensors
    yield "model.layers.4.input_layernorm.weight", torch.ones(128)


# Fault -> (change of the stream, what the message says). The first part is seen in the engine's
# process before anything is loaded, the second only by comparing log-probs.
STREAMS: dict[str, tuple[Callable[[Stream], Stream], str]] = {
    "half": (_dropped(lambda key: "layers.2" in key or "layers.3" in key), "did not come"),
    "one tensor missing": (_dropped(lambda key: key == NORM), "did not come"),
    "head left out": (_dropped(lambda key: key == "lm_head.weight"), "lm_head.weight"),
    "nan": (_changed(NORM, lambda x: x.clone().index_fill_(0, torch.tensor(5), torch.nan)), NORM),
    "inf": (_changed(SQUARE, lambda x: x / 0), "not finite"),
    "extra key": (_extra, "unknown to the model"),
    "bad shape": (_changed(SQUARE, lambda x: x[:-1]), "has shape"),
    "transposed": (_changed(SQUARE, lambda x: x.t()), "does not hold the student's weights"),
    "two layers swapped": (_swapped, "does not hold the student's weights"),
}


class SkippingEngine(LocalEngine):
    """An engine that reports a push and skips it."""

    def update_weights(self, tensors: Stream, policy_version: int) -> PushReport:
        self.policy_version = policy_version
        return PushReport(policy_version, 0, 0.0)


class LyingEngine(SkippingEngine):
    """An engine that also reports that its process agrees."""

    def _usable_version(self, phase: str) -> int:
        assert self.policy_version is not None
        return self.policy_version


class StaleCacheEngine(LocalEngine):
    """S3: an engine that keeps keys and values of the old weights."""

    def _reset_cache(self) -> None:
        pass


def _truncated(self: Segment) -> dict[str, Any]:
    info = original_info(self)
    os.ftruncate(self.file.fd, self._end // 2)
    return info


original_info = Segment.update_info


class Bench:
    """On a rank: a student, its engine, and the last sound push."""

    def __init__(self, folder: str, log_path: str) -> None:
        self.groups = enter(TP2)
        self.student = Student(folder, TP2, self.groups)
        self.engine = LocalEngine(settings(folder, log_path)) if self.groups.is_leader else None
        self.version = 0
        self.old: dict[str, Tensor] = {}
        self.log: dict[str, str] = {}

    def sound(self) -> None:
        """Train and push; remember the weights."""
        self.student.train()
        self.old = {key: tensor.clone() for key, tensor in self._export()}
        self._push()
        assert self._samples(True), "a sound push must bring the engine back"

    def faulty(self, name: str, prepare: Callable[[], None]) -> None:
        """Train and push with a fault; keep the message."""
        self.student.train()
        prepare()
        try:
            report = self._push()
            self.log[name] = f"NOT NOTICED: {report}"
        except EngineError as error:
            self.log[name] = str(error)
            self._honest()
            if self._samples(False):
                self.log[name] = f"STILL SAMPLES after {error}"
        finally:
            push.export_weights = export_weights
            Segment.update_info = original_info
            self._honest()

    def _honest(self) -> None:
        if self.engine is not None:
            self.engine.__class__ = LocalEngine

    def _export(self) -> Iterator[tuple[str, Tensor]]:
        return export_weights(
            self.student.model, self.student.facts, self.groups, with_tied_head=True
        )

    def _push(self) -> Any:
        self.version += 1
        return push.push(
            self.student.model,
            self.student.facts,
            self.groups,
            self.engine,
            self.version,
            score_fn=self.student.score,
            probe=push.make_probe(VOCAB, tolerance=TOLERANCE),
            attempts=1,
        )

    def _samples(self, without_engine: bool) -> bool:
        if self.engine is None:
            return without_engine
        try:
            return bool(self.engine.generate(make_prompts(2), Sampling(max_tokens=4)))
        except EngineError:
            return False


def _stream(change: Callable[[Stream], Stream]) -> Callable[[], None]:
    def prepare() -> None:
        push.export_weights = lambda *args, **options: iter(  # type: ignore[assignment]
            change(export_weights(*args, **options))
        )

    return prepare


def _become(bench: Bench, kind: type[LocalEngine]) -> Callable[[], None]:
    def prepare() -> None:
        if bench.engine is not None:
            bench.engine.__class__ = kind

    return prepare


def _truncate() -> None:
    Segment.update_info = _truncated


def _faults(folder: str, log_path: str, names: list[str]) -> dict[str, str]:
    """On a rank: return the message of each faulty push."""
    bench = Bench(folder, log_path)
    by_name: dict[str, Callable[[], None]] = {
        name: _stream(change) for name, (change, _) in STREAMS.items()
    }
    stale = lambda tensors: ((key, bench.old[key]) for key, _ in tensors)  # noqa: E731
    by_name["stale by one step"] = _stream(stale)
    by_name["skipped"] = _become(bench, SkippingEngine)
    by_name["skipped and denied"] = _become(bench, LyingEngine)
    by_name["stale cache"] = _become(bench, StaleCacheEngine)
    by_name["truncated buffer"] = _truncate
    try:
        for name in names:
            bench.sound()
            bench.faulty(name, by_name[name])
        bench.sound()
        return bench.log
    finally:
        if bench.engine is not None:
            bench.engine.close()


EXPECTED = {name: reason for name, (_, reason) in STREAMS.items()} | {
    "stale by one step": "does not hold the student's weights",
    "skipped": "it has weights",
    "skipped and denied": "does not hold the student's weights",
    "stale cache": "does not hold the student's weights",
    "truncated buffer": "truncated",
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(4))
def test_faulty_pushes_are_noticed(part: int, tmp_path: Path) -> None:
    names = list(EXPECTED)[part::4]
    folder = MODELS["qwen3-tied"].save(tmp_path)
    results = spawn(_faults, 2, str(folder), str(tmp_path / "engine.log"), names)
    for messages in results:
        assert messages.keys() == set(names)
        for name, message in messages.items():
            assert EXPECTED[name] in message, f"{name}: {message}"
            assert message == results[0][name]
    for name, message in results[0].items():
        print(f"\n{name}: {message[:200]}")
