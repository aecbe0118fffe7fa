"""An engine that shares its trainer's GPU: who has the memory, and when the weights are there.

The engine's process is a stand-in, on a CPU; nothing has run on a GPU. The trainer's memory is one
flag: torch keeps for later what a step has used, until it is given back.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_vopd.data.stream import PromptStream
from megatron_vopd.errors import EngineError
from megatron_vopd.megatron.groups import student_groups
from megatron_vopd.rollout.engine import PushReport, Sampling
from megatron_vopd.rollout.push import make_probe
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.rollout.weights.send import Sent
from megatron_vopd.run import engines
from megatron_vopd.run.engines import Pusher
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.types import Layout, Prompt, Rollout
from tests.support import ROOT
from tests.support.harness import spawn
from tests.support.settings import step_settings

VOCAB = 99
PROMPTS = [Prompt(f"p{i}", (i, i + 1), str(i)) for i in range(11)]
WATCHED = ("load", "sleep", "wake", "finish", "generate")


class Sender:
    """A push without CUDA IPC; the engine's commands are the same."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def take_back(self) -> None:
        """Lend nothing."""

    def send(self, tensors: Any, client: Any, dtype: torch.dtype, weight_version: str) -> Sent:
        client.init_weight_transfer_engine({"packed": True})
        client.start_weight_update()
        num_tensors = len(list(tensors))
        client.finish_weight_update(weight_version)
        return Sent(0, num_tensors)


class Gpu(LocalEngine):
    """An engine on one GPU with a trainer, which logs its commands.

    Attributes:
        is_full: torch keeps the trainer's memory for later.
        log: what was done, in order.
    """

    child_module = "tests.support.fake_child"

    def __init__(self, settings: LocalSettings) -> None:
        super().__init__(settings, make_room=self.make_room)
        self.is_full, self.log = False, []

    def make_room(self) -> None:
        self.is_full = False

    def _call(self, command: str, *arguments: Any, **options: Any) -> Any:
        if command in ("load", "wake") and self.is_full:
            self.log.append(f"{command} without room")
        if command in WATCHED:
            shown = arguments if command in ("sleep", "wake") else ()
            self.log.append(" ".join([command, *map(str, shown)]))
        return super()._call(command, *arguments, **options)

    def generate(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Rollout]:
        try:
            return super().generate(prompts, sampling, progress)
        except EngineError:
            self.log.append("failed")
            raise


def _events(folder: str, model_dir: str) -> dict[str, list[str]]:
    """On the one rank: steps of every kind; return what the engine did in each."""
    groups = student_groups(Layout(1))
    settings: Any = {"max_model_len": 64, "device": "cuda", "gpu": "0", "push_seconds": 20.0}
    engine = Gpu(LocalSettings(model_dir, f"{folder}/log", **settings))
    student: Any = SimpleNamespace(
        bare=None, facts=None, groups=groups, options=SimpleNamespace(layer_spec="local")
    )

    def push(*arguments: Any) -> PushReport:
        return engine.update_weights([], arguments[4])

    found: dict[str, list[str]] = {}

    def noted(name: str) -> None:
        found[name], engine.log = engine.log, []

    with (
        mock.patch.object(engines, "push", push),
        mock.patch("megatron_vopd.rollout.weights.ipc.IpcSender", Sender),
    ):
        pusher = Pusher(student, engine, make_probe(VOCAB), 64, can_drop=True)
        step = step_settings(num_prompts=2, samples_per_prompt=1, max_staleness=0)
        stream = PromptStream(PROMPTS, seed=1)
        known = (groups, engine, stream, step, VOCAB, "cpu")
        collector = RolloutCollector(*known, push=pusher, dropped=pusher)
        sampling = Sampling(5, samples=1)

        def train(step: int, version: int, applied: bool) -> None:
            collector.take(step, 7, version)
            engine.is_full = True  # forward, backward, update
            if applied:
                collector.push(version + 1)

        train(0, 0, applied=True)
        noted("first step")
        train(1, 1, applied=True)
        noted("step")
        train(2, 2, applied=False)
        noted("skipped step")
        train(3, 2, applied=True)
        noted("step after a skipped one")
        collector.sample(PROMPTS[:2], sampling, 3)
        engine.is_full = True  # the entropy of what was sampled
        train(4, 3, applied=True)
        noted("step with held-out entropy")
        train(5, 4, applied=False)
        engine.log = []
        pusher.ensure(4)  # before an evaluation (`run.loop`)
        collector.outcomes(PROMPTS[:3], sampling, 4)
        noted("evaluation after a skipped step")
        engine.is_full = True
        train(6, 4, applied=True)
        noted("step after an evaluation")
        engine.is_full = True
        engine.refuse_weights("it died")
        train(7, 5, applied=True)
        noted("step with a restart")
        engine.close()
    return found


START, PUSH, SAMPLE = "load", "finish", "generate"
WAKE = "wake ['weights', 'kv_cache']"
WAKE_WEIGHTS, WAKE_CACHE = "wake ['weights']", "wake ['kv_cache']"
KEEP, DROP = "sleep 1", "sleep 2"


def test_memory_is_given_back_first_and_dropped_weights_are_pushed_again(tmp_path: Any) -> None:
    model_dir = str(ROOT / "tests" / "fixtures" / "models" / "Qwen3-4B")
    (found,) = spawn(_events, 1, str(tmp_path), model_dir)
    pushed = [WAKE_WEIGHTS, PUSH]
    sampled = [WAKE_CACHE, SAMPLE]
    assert found == {
        "first step": [START, PUSH, SAMPLE, DROP, *pushed],
        "step": [*sampled, DROP, *pushed],
        "skipped step": [*sampled, DROP],
        "step after a skipped one": [*pushed, *sampled, DROP, *pushed],
        "step with held-out entropy": [*sampled, KEEP, WAKE, SAMPLE, DROP, *pushed],
        "evaluation after a skipped step": [*pushed, *sampled, KEEP],
        "step after an evaluation": [WAKE, SAMPLE, DROP, *pushed],
        "step with a restart": ["failed", START, PUSH, SAMPLE, DROP, *pushed],
    }
