"""Careless uses of the training command: one clear line, an exit status, and nothing lost.

Two ranks live through all of them by calling the command's `main`; deaths are in test_train_deaths.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import spawn
from tests.support.runs import save_model, save_records, save_run

DEADLINE_SECONDS = 30.0
MISTAKE = 2


@dataclass(frozen=True)
class Careless:
    """One use: overrides, what its line must hold, its exit status.

    Attributes:
        config: another file than the run's, below its folder.
    """

    overrides: tuple[str, ...]
    says: tuple[str, ...]
    status: int = MISTAKE
    config: str = "config.yaml"


def _broken(root: Path) -> None:
    """Make the models, data and folders that the uses refer to."""
    (root / "bad.yaml").write_text("run: {name: x\nstudent: [")
    (root / "list.yaml").write_text("- run\n")
    (root / "empty.yaml").write_text("")
    shutil.copytree(root / "student", root / "damaged")
    weights = root / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(root / "student", root / "weightless")
    (root / "weightless" / "model.safetensors").unlink()
    shutil.copytree(root / "teacher", root / "other_eos")
    (root / "other_eos" / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    shutil.copytree(root / "teacher", root / "other_words")
    path = root / "other_words" / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(words))
    shutil.copytree(root / "student", root / "wordless")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (root / "wordless" / name).unlink(missing_ok=True)
    (root / "empty.jsonl").write_text("")
    (root / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    save_records(root / "questions.jsonl")
    text = (root / "questions.jsonl").read_text().replace('"prompt"', '"question"')
    (root / "questions.jsonl").write_text(text)
    done = root / "runs" / "done"
    done.mkdir(parents=True)
    (done / "metrics.jsonl").write_text('{"step": 1, "loss/mean": 0.5}\n')
    (root / "file").write_text("not a folder")
    (root / "runs" / "mine").mkdir()
    (root / "runs" / "mine" / "config.yaml").write_text("# mine\n")


USES = {
    "no such configuration": Careless((), ("nowhere.yaml", "no such file"), config="nowhere.yaml"),
    "bad YAML": Careless((), ("bad.yaml:", "YAML"), config="bad.yaml"),
    "a list": Careless((), ("list.yaml", "section"), config="list.yaml"),
    "an empty file": Careless((), ("empty.yaml", "start with 'student:'"), config="empty.yaml"),
    "unknown key": Careless(("train.stepz=3",), ("train.stepz", "did you mean train.steps?")),
    "unknown section": Careless(("trian.steps=3",), ("trian", "did you mean train")),
    "no value": Careless(("train.steps",), ("train.steps", "section.key=value")),
    "text for a number": Careless(("train.steps=many",), ("train.steps", "integer")),
    "biased sampling": Careless(("rollout.temperature=0.7",), ("rollout.temperature", "set")),
    "no student": Careless(("student.path={root}/nobody",), ("student.path", "existing path")),
    "no teacher": Careless(("teacher.path={root}/nobody",), ("teacher.path", "existing path")),
    "a folder that is no model": Careless(("student.path={root}/runs",), ("student.path",)),
    "damaged weights": Careless(
        ("student.path={root}/damaged",), ("student.path", "damaged/model.safetensors")
    ),
    "no weights": Careless(
        ("teacher.path={root}/weightless",), ("teacher.path", "weightless", "safetensors")
    ),
    "no tokenizer": Careless(("student.path={root}/wordless",), ("student.path", "tokenizer")),
    "another tokenizer": Careless(
        ("teacher.path={root}/other_words",), ("teacher.path", "differ", "'a'")
    ),
    "another end": Careless(
        ("teacher.path={root}/other_eos",), ("data.eos_contract", "set data.eos_contract=teacher")
    ),
    "tp that does not divide": Careless(("parallel.tp=3",), ("parallel.tp", "world of 2 ranks")),
    "teacher that does not divide": Careless(("teacher.pp=4",), ("teacher.tp", "world of 2")),
    "heads": Careless(("student.path={root}/heads", "parallel.tp=2"), ("parallel.tp", "heads")),
    "prompts over replicas": Careless(
        ("rollout.num_prompts=7",), ("rollout.num_prompts", "set rollout.num_prompts=8")
    ),
    "no data": Careless(("data.train={root}/none.jsonl",), ("data.train", "existing path")),
    "empty data": Careless(("data.train={root}/empty.jsonl",), ("data.train",)),
    "torn line": Careless(("data.train={root}/torn.jsonl",), ("torn.jsonl:2", "JSON")),
    "missing field": Careless(
        ("data.train={root}/questions.jsonl",), ("questions.jsonl:1", "prompt", "question")
    ),
    "all too long": Careless(
        ("data.max_prompt_tokens=4",), ("data.train", "raise data.max_prompt_tokens")
    ),
    "all held out": Careless(
        ("curriculum.kind=entropy_gated", "curriculum.held_out_prompts=24"),
        ("curriculum.held_out_prompts", "lower it"),
    ),
    "rows too short": Careless(
        ("train.max_tokens_per_microbatch=100",), ("train.max_tokens_per_microbatch",)
    ),
    "longer than the context": Careless(
        ("student.path={root}/short",), ("curriculum.ladder", "the context of student, 128")
    ),
    "no GPU": Careless(("parallel.device=cuda",), ("parallel.device", "set parallel.device=cpu")),
    "no TransformerEngine": Careless(
        ("parallel.backend=te",), ("parallel.backend", "set parallel.backend=auto")
    ),
    "no vLLM": Careless((), ("rollout.engine", "install")),
    "no extension": Careless((), ("parallel.device: got cpu", "not built")),
    "a run already": Careless(("run.name=done",), ("run.name", "nothing can be resumed from")),
    "a folder of the user": Careless(("run.name=mine",), ("run.name", "mine/config.yaml")),
    "a file for a folder": Careless(("run.dir={root}/file",), ("run.dir", "file")),
    "a folder that cannot be written": Careless(("run.dir=/proc/runs",), ("run.dir", "/proc")),
    "wandb that is not installed": Careless(
        ("logging.wandb=true",), ("logging.wandb", "install wandb")
    ),
    "no responses": Careless(("objective.prefix=dataset",), ("data.responses",)),
}


def _used(root: str, use: Careless) -> tuple[int, str, str, float]:
    """On a rank: exit status, standard output, standard error, seconds."""
    import torch.distributed as dist

    from megatron_vopd import train
    from megatron_vopd.collectives import SPOKEN_KEY

    dist.barrier()
    if dist.get_rank() == 0:
        dist.distributed_c10d._get_default_store().delete_key(SPOKEN_KEY)
    dist.barrier()
    overrides = [text.format(root=root) for text in use.overrides]
    out, err, begin = io.StringIO(), io.StringIO(), time.monotonic()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = train.main([f"{root}/{use.config}", *overrides])
        except BaseException:
            traceback.print_exc()
            status = -1
    return status, out.getvalue(), err.getvalue(), time.monotonic() - begin


def _all_uses(root: str, names: list[str]) -> Any:
    """On a rank: make every use, one after the other."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_vopd.ops import native
    from megatron_vopd.run import start

    loaded = native._loaded
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
    }
    found = {}
    for name in names:
        # The other uses are the same with and without vLLM, which none of them starts.
        start.find_spec = lambda _, has=name != "no vLLM": object() if has else None
        is_missing = name == "no extension"
        native._loaded = (lambda: (None, "it is not built")) if is_missing else loaded
        found[name] = _used(root, USES[name])
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("careless")
    save_run(root)
    save_model(root, "heads", 0, num_attention_heads=3, num_key_value_heads=1)
    save_model(root, "short", 0, max_position_embeddings=128)
    _broken(root)
    return root


def test_careless_uses(root: Path) -> None:
    first, second = spawn(_all_uses, 2, str(root), list(USES))
    failures = []
    for name, use in USES.items():
        (status, _, err, seconds), other = first[name], second[name]
        lines = (err + other[2]).splitlines()
        print(f"{name}: {status}, {seconds:.1f} s: {err or other[2]}", end="")
        is_clear = len(lines) == 1 and all(text in lines[0] for text in use.says)
        if not is_clear or {status, other[0]} != {use.status} or seconds > DEADLINE_SECONDS:
            failures.append(f"{name}: {(status, other[0])} {seconds:.1f} s {lines}")
    assert not failures, "\n" + "\n".join(failures)
    assert (root / "runs" / "mine" / "config.yaml").read_text() == "# mine\n"
    done = root / "runs" / "done"
    # The status says how this start ended, for whoever would start it again.
    assert {path.name for path in done.iterdir()} == {"lock", "metrics.jsonl", "status.json"}
    assert (done / "metrics.jsonl").read_text() == '{"step": 1, "loss/mean": 0.5}\n'
