"""Records for the tests of data, and how a refusal must read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.config import Config, build_config
from megatron_vopd.errors import UserError
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
