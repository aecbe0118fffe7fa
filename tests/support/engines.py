"""What the tests with real vLLM engines share: models that vLLM runs on a CPU, a trained student.

A world of gloo ranks trains a student and pushes it into an engine that its leader hosts, as a run
does, only with a loss of its own (cross-entropy on random tokens).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.megatron.groups import Groups
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.types import Layout, Prompt, Rollout
from tests.support.layouts import Case, build
from tests.support.scoring import score
from tests.support.servers import with_plugin
from tests.support.settings import step_settings
from tests.support.steps import objective
from tests.support.tiny_models import TinyModel
from tests.support.training import Microbatch, forward_backward, wrap

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM: make engine"),
    pytest.mark.usefixtures("patient_world"),
]
# vLLM's attention on CPU asks for heads of 32 and more. Weights of ordinary size: with 0.15, as
# elsewhere in these tests, logits are so large that fp32 alone accounts for 1e-5.
SIZES = (
    ("initializer_range", 0.06),
    ("hidden_size", 128),
    ("intermediate_size", 192),
    ("head_dim", 32),
    ("max_position_embeddings", 512),
)
VOCAB, STOP, BLOCK = 157, 7, 32
# fp32 on both sides; sums differ in order.
TOLERANCE = 1e-5
MODELS = {
    "qwen3-tied": TinyModel("qwen3", True, VOCAB, overrides=SIZES),
    "qwen3-untied": TinyModel("qwen3", False, VOCAB, overrides=SIZES),
    "llama": TinyModel("llama", False, VOCAB, overrides=SIZES),
    "qwen3_moe": TinyModel("qwen3_moe", False, VOCAB, overrides=SIZES),
}
TP2_PP2 = Case("tp2-pp2", Layout(4, tp=2, pp=2))
EP2_PP2 = Case("pp2-ep2", Layout(4, pp=2, ep=2))


def settings(folder: str, log_path: str, **changes: Any) -> LocalSettings:
    """Return a small engine's settings; deadlines leave room for a busy machine."""
    if changes.get("tp", 1) > 1:
        # Workers are processes of vLLM's, which know our plugin by its entry point.
        os.environ.update(with_plugin(Path(log_path).parent / "plugin"))
    values: dict[str, Any] = {
        "max_model_len": 256,
        "block_size": BLOCK,
        "start_seconds": 240.0,
        "push_seconds": 60.0,
        "stall_seconds": 60.0,
        "deadline_seconds": 180.0,
    }
    return LocalSettings(folder, log_path, **(values | changes))


def make_prompts(number: int, longest: int = 60, seed: int = 0) -> list[Prompt]:
    """Make prompts of 1 to `longest` random ids; some fill blocks of the engine's cache."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (number,), generator=generator).tolist()
    return [
        Prompt(f"data:{i}", tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist()))
        for i, n in enumerate(lengths)
    ]


def make_collector(groups: Groups, engine: Any, push: Any = None) -> RolloutCollector:
    """Make the collector of a run, for `sample` with prompts of the caller's."""
    settings = step_settings(objective=objective("vopd_full"), num_prompts=1)
    return RolloutCollector(groups, engine, None, settings, VOCAB, "cpu", push=push)


class Student:
    """On a rank: a student in training, and the trainer's log-probs."""

    def __init__(
        self, folder: str, case: Case, groups: Groups, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.facts = build(folder, case, groups, dtype)
        self.groups = groups
        self._ddp = wrap(self.model, groups)
        self._steps = 0

    def train(self, learning_rate: float = 0.05) -> None:
        """Take one step of gradient descent on fresh random tokens."""
        self._steps += 1
        generator = torch.Generator().manual_seed(self._steps)
        ids = torch.randint(0, VOCAB, (2, 25), generator=generator)
        batch = Microbatch(tuple(ids[:, :-1]), tuple(ids[:, 1:]), packed=False)
        forward_backward(self._ddp, self.facts, self.groups, [batch], False)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.sub_(learning_rate * parameter.main_grad)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score sequences as `tests.support.scoring.score` does."""
        return score(self.model, self.facts, self.groups, sequences)


def worst_gap(student: Student, rollouts: list[Rollout] | None) -> tuple[float, int]:
    """Return the leader's largest |engine - trainer| log-prob, and its tokens; collective.

    Args:
        rollouts: on the one leader; None on the other ranks.
    """
    import torch.distributed as dist

    box = [rollouts]
    dist.broadcast_object_list(box, src=0)
    sampled = box[0]
    assert sampled is not None
    scored = student.score([(*r.prompt.ids, *r.response_ids) for r in sampled])
    worst, tokens = 0.0, 0
    for rollout, logprobs in zip(sampled, scored, strict=True):
        responses = logprobs[len(rollout.prompt.ids) - 1 :]
        assert rollout.rollout_logprobs is not None
        pairs = zip(responses, rollout.rollout_logprobs, strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
        tokens += len(responses)
    return worst, tokens
