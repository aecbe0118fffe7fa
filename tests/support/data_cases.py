"""Records and rollouts for the tests of data, and how a refusal must read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.config import Config, build_config
from megatron_vopd.errors import UserError
from megatron_vopd.types import Prompt, Rollout
from tests.support.config_cases import with_values

RECORDS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]


def config_of(**settings: Any) -> Config:
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return build_config(with_values({"data.max_prompt_tokens": 64, **dotted}))


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def refused(call: Any, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and " expected " in message and message.isascii()


def random_rollouts(num: int, seed: int, teachers: int = 1) -> list[Rollout]:
    """Make rollouts of random lengths; some are empty, some not sampled by an engine."""
    draw = random.Random(seed)
    rollouts = []
    for i in range(num):
        prompt_ids = tuple(draw.randrange(100, 200) for _ in range(draw.randint(1, 12)))
        length = draw.choice([0, 1, 2, draw.randint(3, 40)])
        ids = tuple(draw.randrange(1000 * i + 1000, 1000 * i + 1999) for _ in range(length))
        logprobs = tuple(-draw.random() for _ in ids) if draw.random() < 0.7 else None
        prompt = Prompt(f"p{i}", prompt_ids, None, f"t{draw.randrange(teachers)}")
        rollouts.append(Rollout(prompt, 0, ids, logprobs, "stop", 0))
    return rollouts
