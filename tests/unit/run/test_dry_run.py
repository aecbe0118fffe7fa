"""The stand-in of a dry run has what an engine has; the configuration gets its full length."""

from __future__ import annotations

import math

import torch

from megatron_vopd.config.loading import build_config
from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.rollout.validate import check_rollouts
from megatron_vopd.run.dry_run import RandomEngine, at_full_length
from megatron_vopd.run.settings import build_curriculum
from megatron_vopd.types import Prompt

VOCAB, STOPS = 11, (3, 7)
PROMPTS = [Prompt(f"p{i}", (i, i + 1)) for i in range(3)]


def test_random_responses_pass_the_checks() -> None:
    engine = RandomEngine(VOCAB)
    sampling = Sampling(max_tokens=40, samples=2, seed=5, stop_ids=STOPS)
    rollouts = engine.generate(PROMPTS, sampling)
    check_rollouts(rollouts, PROMPTS, sampling, 0, 0, VOCAB)
    assert [len(rollout.response_ids) for rollout in rollouts] == [40] * 6
    seen = {i for rollout in rollouts for i in rollout.response_ids}
    assert seen == set(range(VOCAB)) - set(STOPS)
    assert rollouts[0].rollout_logprobs == (-math.log(VOCAB - len(STOPS)),) * 40
    # Reproducible, and different for every prompt and sample.
    assert engine.generate(PROMPTS, sampling) == rollouts
    assert len({rollout.response_ids for rollout in rollouts}) == 6
    assert engine.generation is not None and engine.generation.num_tokens == 240


def test_a_push_is_read_to_its_end() -> None:
    engine, taken = RandomEngine(VOCAB), []

    def tensors():
        for name in ("a", "b"):
            taken.append(name)
            yield name, torch.zeros(3, dtype=torch.bfloat16)

    report = engine.update_weights(tensors(), 4)
    assert taken == ["a", "b"] and report.num_bytes == 12 and engine.policy_version == 4


def test_the_longest_rung_from_the_first_step_on() -> None:
    ladder = {"kind": "entropy_gated", "ladder": [8, 16, 32]}
    models = {"student": {"path": "org/a"}, "teacher": {"path": "org/b"}}
    data = {"train": "org/c", "max_prompt_tokens": 16}
    config = build_config(models | {"curriculum": ladder, "data": data})
    curriculum = build_curriculum(at_full_length(config).curriculum)
    assert curriculum.max_response_tokens == 32 and not curriculum.due(0)
    assert build_curriculum(config.curriculum).max_response_tokens == 8
