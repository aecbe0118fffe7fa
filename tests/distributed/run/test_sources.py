"""F24: a world of two nodes asks the hub once for each, and reads and tokenizes its data once."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from huggingface_hub.errors import LocalEntryNotFoundError

from megatron_vopd.config.loading import build_config
from megatron_vopd.data.prompts import (
    PromptTokenizer,
    load_evaluation_prompts,
    load_training_prompts,
    training_prompts,
)
from megatron_vopd.data.responses import load_responses
from megatron_vopd.errors import UserError
from megatron_vopd.megatron.groups import init_world
from megatron_vopd.run.build import build, sound_models
from megatron_vopd.run.dry_run import RandomEngine
from tests.support.harness import spawn
from tests.support.layouts import destroy_groups
from tests.support.runs import save_model, save_records
from tests.support.tiny_tokenizer import IM_END

RANKS, RANKS_OF_A_NODE = 4, 2


class Hub:
    """A hub at `root`/hub and a cache for each node, in the place of `snapshot_download`."""

    def __init__(self, root: Path, node: int) -> None:
        self.asked = Counter[str]()
        self._hub, self._cache = root / "hub", root / f"cache{node}"

    def __call__(self, name: str, local_files_only: bool = False, **_: Any) -> str:
        folder = self._cache / name
        if local_files_only:
            if not folder.is_dir():
                raise LocalEntryNotFoundError(f"{name} is not in the cache")
            return str(folder)
        self.asked[name] += 1
        if not (self._hub / name).is_dir():
            raise OSError(f"no connection for {name}")
        time.sleep(0.3)
        shutil.copytree(self._hub / name, folder, dirs_exist_ok=True)
        return str(folder)


def _settings(root: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "student": {"path": "org/student", "dtype": "fp32"},
        "teacher": {"path": "org/teacher", "dtype": "fp32"},
        "parallel": {"device": "cpu"},
        "logging": {"console": False},
        "rollout": {"num_prompts": 4, "dtype": "fp32"},
        "curriculum": {"kind": "entropy_gated", "ladder": [8, 16], "held_out_prompts": 5},
        "data": {
            "train": "org/prompts",
            "responses": str(root / "responses.jsonl"),
            "evaluation": {"sums": str(root / "sums.jsonl")},
            "max_prompt_tokens": 128,
        },
        "objective": {"estimator": "exact", "prefix": {"student": 0.5, "dataset": 0.5}},
        "evaluation": {"max_tokens": 64},
        "train": {"steps": 3, "max_tokens_per_microbatch": 512},
    }
    return settings | changes


def _enter(root: Path, patch: pytest.MonkeyPatch) -> Hub:
    """On a rank: take a place on one of two nodes."""
    init_world("cpu")
    node, local_rank = divmod(dist.get_rank(), RANKS_OF_A_NODE)
    patch.setitem(os.environ, "LOCAL_RANK", str(local_rank))
    patch.setitem(os.environ, "LOCAL_WORLD_SIZE", str(RANKS_OF_A_NODE))
    hub = Hub(root, node)
    patch.setattr("huggingface_hub.snapshot_download", hub)
    return hub


def _built(root: Path) -> dict[str, Any]:
    """Build a run; return what this rank asked for, tokenized and holds."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        hub, texts = _enter(root, patch), [0]
        encoded, encoded_response = PromptTokenizer.encoded, PromptTokenizer.encoded_response

        def counted(own: PromptTokenizer, batch: Any) -> Any:
            texts[0] += len(batch)
            return encoded(own, batch)

        def counted_response(own: PromptTokenizer, text: str) -> Any:
            texts[0] += 1
            return encoded_response(own, text)

        patch.setattr(PromptTokenizer, "encoded", counted)
        patch.setattr(PromptTokenizer, "encoded_response", counted_response)
        config = build_config(_settings(root))
        models = sound_models(config, "cpu")
        parts = build(config, models, "cpu", lambda _, ids: (RandomEngine(ids), None), stack)
        found, asked, num_texts = parts.sources, dict(hub.asked), texts[0]
        # What each rank would have read by itself.
        tokenizer = PromptTokenizer.of(models["student"].path, config.student)
        read = load_training_prompts(config.data, tokenizer, ["teacher"], False)
        own = training_prompts(read, 5, config.run.seed)
        given = load_responses(config.data, tokenizer, ["teacher"], (IM_END,), 512)
        destroy_groups()
        return {
            "asked": asked,
            "texts": num_texts,
            "node": Path(models["teacher"].path).parents[1].name,
            "stream": found.prompts.stream.state_dict() == own.stream.state_dict(),
            "held out": found.prompts.held_out == own.held_out,
            "num_too_long": found.prompts.num_too_long == own.num_too_long == 1,
            "given": list(found.given) == given.rollouts,
            "problems": found.problems == load_evaluation_prompts(config.data, tokenizer),
            "summary": found.summary,
        }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nodes")
    (root / "hub" / "org" / "prompts").mkdir(parents=True)
    for name, seed in (("student", 0), ("teacher", 1)):
        save_model(root / "hub" / "org", name, seed, num_hidden_layers=1)
    prompts = save_records(root / "hub" / "org" / "prompts" / "train.jsonl", 30)
    with prompts.open("a") as file:
        file.write('{"prompt": "' + "long " * 100 + '", "answer": null}\n')
    save_records(root / "responses.jsonl", 12, response="The sum is even.")
    save_records(root / "sums.jsonl", 7)
    return root


def test_a_node_asks_the_hub_once_and_the_world_tokenizes_once(root: Path) -> None:
    """F24: counts of requests and of tokenized texts on four ranks of two nodes."""
    ranks = spawn(_built, RANKS, root)
    for rank, found in enumerate(ranks):
        node, is_first = rank // RANKS_OF_A_NODE, rank % RANKS_OF_A_NODE == 0
        print(f"\nrank {rank}: asked {found['asked']}, tokenized {found['texts']} texts")
        assert found["node"] == f"cache{node}"
        # Config and tokenizer first, then the weights; the data set on rank 0 alone.
        expected = {"org/student": 2, "org/teacher": 2} if is_first else {}
        assert found["asked"] == (expected | {"org/prompts": 1} if rank == 0 else expected)
        assert found["texts"] == (31 + 12 + 12 + 7 if rank == 0 else 0)
        for part in ("stream", "held out", "num_too_long", "given", "problems"):
            assert found[part] is True, part
        assert found["summary"] == ranks[0]["summary"] and len(found["summary"]) == 2


def _refused(root: Path) -> list[str]:
    """Return the message of each run that cannot begin, on this rank."""
    messages = []
    data = _settings(root)["data"]
    for changes in (
        {"data": data | {"responses": str(root / "bad.jsonl")}},
        {"data": data | {"train": "org/absent"}},
        {"teacher": {"path": "org/nowhere", "dtype": "fp32"}},
    ):
        with (
            pytest.MonkeyPatch.context() as patch,
            ExitStack() as stack,
            pytest.raises(UserError) as caught,
        ):
            _enter(root, patch)
            config = build_config(_settings(root, **changes))
            models = sound_models(config, "cpu")
            build(config, models, "cpu", lambda _, ids: (RandomEngine(ids), None), stack)
        messages.append(str(caught.value))
    return messages


def test_what_one_rank_meets_all_ranks_say(root: Path) -> None:
    (root / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    ranks = spawn(_refused, RANKS, root)
    assert all(messages == ranks[0] for messages in ranks)
    for message, words in zip(
        ranks[0],
        ("bad.jsonl:2 response: got no such field", "data.train: ", "teacher.path: "),
        strict=True,
    ):
        assert words in message and "\n" not in message, message
