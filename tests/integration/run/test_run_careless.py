"""Careless uses of a run that exists: one clear line each, and its checkpoints stay as they were.

One rank makes a small run once; each use gets a copy of its folder, edits it, and calls the
training command again. Where the command continues, what it passed over is a note.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import spawn
from tests.support.runs import save_model, save_records, save_run, without_engine

OK, MISTAKE = 0, 2
DEADLINE_SECONDS = 30.0
DONE, STEPS = "step_4", 4


@dataclass(frozen=True)
class Careless:
    """One use of a run of four steps with checkpoints after two and four.

    Attributes:
        edit: what was done to the run folder before.
        says: what the line must hold: on standard error, or, with status 0, among the notes.
        lost: checkpoints that the edit itself took; all others must stay byte for byte.
    """

    edit: Callable[[Path], Any] | None
    overrides: tuple[str, ...]
    says: tuple[str, ...]
    status: int = MISTAKE
    lost: tuple[str, ...] = ()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _shard(run_dir: Path, step: str) -> Path:
    return run_dir / "checkpoints" / step / "__0_0.distcp"


def _folder_for_file(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _another_format(run_dir: Path) -> None:
    for path in run_dir.glob("checkpoints/step_*/manifest.json"):
        path.write_text(re.sub(r'"format": \d+', '"format": 99', path.read_text()))


def _latest(text: str) -> Callable[[Path], Any]:
    return lambda run_dir: (run_dir / "checkpoints" / "latest").write_text(text)


def _lines(edit: Callable[[list[str]], list[str]]) -> Callable[[Path], Any]:
    def change(run_dir: Path) -> None:
        path = run_dir / "metrics.jsonl"
        path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))

    return change


def _drop(*names: str) -> Callable[[Path], Any]:
    return lambda run_dir: [shutil.rmtree(run_dir / name) for name in names]


def _unlink(name: str) -> Callable[[Path], Any]:
    return lambda run_dir: (run_dir / name).unlink()


def _stripped(run_dir: Path) -> None:
    for step in ("step_2", "step_4"):
        (run_dir / "checkpoints" / step / "manifest.json").unlink()


def _busy(run_dir: Path) -> ExitStack:
    """Hold the folder, as another run would."""
    from megatron_vopd.run.folder import locked

    stack = ExitStack()
    stack.enter_context(locked(run_dir))
    return stack


BOTH = ("step_2", "step_4")
GONE_ON = ("resumed: step 4",)
USES = {
    # latest is a hint
    "latest: letters": Careless(_latest("the last one\n"), (), ("latest", "step_4"), OK),
    "latest: another step": Careless(_latest("step_2\n"), (), ("latest", "step_4"), OK),
    "latest: no such step": Careless(_latest("step_900\n"), (), ("latest", "step_4"), OK),
    "latest: gone": Careless(_unlink("checkpoints/latest"), (), ("latest: missing", "step_4"), OK),
    "latest: a folder": Careless(
        lambda run: _folder_for_file(run / "checkpoints/latest"), (), ("latest", "remove it")
    ),
    # checkpoints damaged, deleted, of another version
    "a bit of the newest": Careless(
        lambda run: _flip(_shard(run, DONE)), (), ("step_4/__0_0.distcp",), OK, (DONE,)
    ),
    "all damaged": Careless(
        lambda run: [_flip(_shard(run, step)) for step in BOTH],
        (),
        ("nothing can be resumed from", "__0_0.distcp", "run.name"),
    ),
    "manifests deleted": Careless(_stripped, (), ("no manifest.json", "run.name")),
    "checkpoints deleted": Careless(
        _drop("checkpoints"), (), ("no checkpoint was saved", "run.name"), lost=BOTH
    ),
    "the newest deleted": Careless(
        _drop("checkpoints/step_4"), (), ("latest", "step_2"), OK, (DONE,)
    ),
    "another version's": Careless(_another_format, (), ("format 99", "version")),
    "exports deleted": Careless(_drop("hf"), (), GONE_ON, OK),
    "renamed to a later step": Careless(
        lambda run: (run / "checkpoints/step_4").rename(run / "checkpoints/step_9"),
        (),
        ("step_9", "another step"),
        OK,
        (DONE,),
    ),
    # what is resumed from
    "never, on a run": Careless(None, ("checkpoint.resume=never",), ("run.name", "auto")),
    "resume: no such path": Careless(
        None, ("checkpoint.resume={root}/nowhere",), ("checkpoint.resume", "auto")
    ),
    "resume: a file": Careless(
        None, ("checkpoint.resume={root}/config.yaml",), ("checkpoint.resume", "auto")
    ),
    "resume: a model folder": Careless(
        None, ("checkpoint.resume={root}/student", "run.name=fresh"), ("student", "step_N")
    ),
    "resume: a run folder": Careless(
        None, ("checkpoint.resume={run}", "run.name=fresh"), ("manifest.json", "step_N")
    ),
    "resume: an older one": Careless(
        None, ("checkpoint.resume={run}/checkpoints/step_2",), ("step_4 beside it is newer",)
    ),
    # another configuration, model or data than the checkpoint's
    "another objective": Careless(
        None, ("objective.direction=forward",), ("objective.direction", "'reverse'", "run.name")
    ),
    "another beta": Careless(None, ("optimizer.beta1=0.5",), ("optimizer.beta1", "0.9")),
    "another seed": Careless(None, ("run.seed=5",), ("run.seed", "run.name")),
    "another type": Careless(None, ("student.dtype=bf16",), ("student.dtype", "fp32")),
    "another student": Careless(None, ("student.path={root}/untied",), ("student.path", "tied")),
    "another teacher": Careless(
        None, ("teacher.path={root}/untied",), ("teacher.path", "other weights")
    ),
    "teacher gone": Careless(
        None, ("teacher.path={root}/nobody",), ("teacher.path", "existing path")
    ),
    "data gone": Careless(
        None, ("data.responses={root}/none.jsonl",), ("data.responses", "existing path")
    ),
    "other data": Careless(None, ("data.responses={root}/other.jsonl", "train.steps=6"), ("data",)),
    # metrics
    "metrics: torn": Careless(_lines(lambda t: [*t[:-1], t[-1][:20]]), (), GONE_ON, OK),
    "metrics: gone": Careless(_unlink("metrics.jsonl"), (), GONE_ON, OK),
    "metrics: a word in the middle": Careless(
        _lines(lambda t: [t[0], "word\n", *t[1:]]), (), ("metrics.jsonl:2", "remove the line")
    ),
    "metrics: out of order": Careless(
        _lines(lambda t: [t[1], t[0], *t[2:]]), (), ("metrics.jsonl:2", "ascending")
    ),
    "metrics: a folder": Careless(
        lambda run: _folder_for_file(run / "metrics.jsonl"), (), ("metrics.jsonl",)
    ),
    # the folder itself
    "status: a folder": Careless(
        lambda run: _folder_for_file(run / "status.json"), (), ("status.json",)
    ),
    "a configuration of the user's": Careless(
        lambda run: (run / "config.yaml").write_text("# mine\n"), (), ("run.name", "config.yaml")
    ),
    "two runs at once": Careless(_busy, (), ("run.name", "is going on", "process")),
    "a name with a slash": Careless(None, ("run.name=a/b",), ("run.name", "run.dir")),
    "moved": Careless(None, ("run.dir={root}/moved",), GONE_ON, OK),
    # settings that would cost something
    "keep lowered": Careless(None, ("checkpoint.keep=1",), ("checkpoint.keep", "2")),
    "fewer steps": Careless(None, ("train.steps=2",), GONE_ON, OK),
    "disk full": Careless(None, ("train.steps=5",), ("bytes free", "needed", "make room")),
    # evaluation
    "evaluation: no answers": Careless(
        None, ("data.evaluation={root}/unanswered.jsonl",), ("unanswered.jsonl:1", "answer_field")
    ),
    "evaluation: no such file": Careless(
        None, ("data.evaluation={root}/none.jsonl",), ("data.evaluation", "existing path")
    ),
    "evaluation: too long": Careless(
        None,
        ("data.evaluation={root}/train.jsonl", "evaluation.max_tokens=500"),
        ("evaluation.max_tokens", "the context of student"),
    ),
    "evaluation: k": Careless(
        None, ("evaluation.samples=2", "evaluation.k=3"), ("evaluation.k", "evaluation.samples")
    ),
}


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("step_*/**/*"))
        if path.is_file()
    }


def _called(root: Path, *overrides: str) -> tuple[int, str, str, float]:
    """Exit status, standard output, standard error, seconds."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_vopd import train
    from megatron_vopd.collectives import SPOKEN_KEY

    dist.distributed_c10d._get_default_store().delete_key(SPOKEN_KEY)
    shared = [f"train.steps={STEPS}", "checkpoint.interval=2", "logging.tensorboard=false"]
    shared += ["evaluation.interval=1", "evaluation.max_tokens=16"]
    arguments = [f"{root}/config.yaml", *without_engine(root), *shared, *overrides]
    out, err, begin = io.StringIO(), io.StringIO(), time.monotonic()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = train.main(arguments)
        except BaseException:
            traceback.print_exc()
            status = -1
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    return status, out.getvalue(), err.getvalue(), time.monotonic() - begin


def _used(root: Path, base: Path, name: str, use: Careless) -> dict[str, Any]:
    """Use a copy of the run once."""
    moved = any("run.dir" in text for text in use.overrides)
    run_dir = (root / "moved" if moved else base.parent) / f"use_{list(USES).index(name)}"
    shutil.copytree(base, run_dir)
    before = _digests(run_dir / "checkpoints")
    held = use.edit(run_dir) if use.edit is not None else None
    status_before = _text(run_dir / "status.json")
    overrides = [text.format(root=root, run=run_dir) for text in use.overrides]
    if not any(text.startswith("run.name") for text in overrides):
        overrides.insert(0, f"run.name={run_dir.name}")
    statvfs = os.statvfs
    if name == "disk full":
        os.statvfs = lambda path: os.statvfs_result((*statvfs(path)[:4], 0, *statvfs(path)[5:]))
    status, out, err, seconds = _called(root, *overrides)
    os.statvfs = statvfs
    if isinstance(held, ExitStack):
        held.close()
        assert _text(run_dir / "status.json") == status_before, "the status is the other run's"
    after = _digests(run_dir / "checkpoints")
    kept = {path: value for path, value in before.items() if path.split("/")[0] not in use.lost}
    if name in ("all damaged", "manifests deleted", "another version's"):
        kept = {}  # every one of them was edited
    changed = [path for path, value in kept.items() if after.get(path) != value]
    shutil.rmtree(run_dir)
    return {"status": status, "out": out, "err": err, "seconds": seconds, "changed": changed}


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _all_uses(root: Path) -> Any:
    """On a rank: make the run, then every use of it."""
    import torch.distributed as dist

    from megatron_vopd.run import environment

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert dist.get_world_size() == 1
    # None of the uses gets as far as an engine.
    environment.find_spec = lambda _: object()
    first = _called(root, "run.name=base")
    assert first[0] == OK, first
    base = root / "runs" / "base"
    assert {path.name for path in base.glob("checkpoints/step_*")} == set(BOTH)
    return {name: _used(root, base, name, use) for name, use in USES.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("careless")
    save_run(root)
    save_model(root, "untied", 5)
    save_records(root / "other.jsonl", number=20, response="Odd.")
    save_records(root / "unanswered.jsonl")
    text = (root / "unanswered.jsonl").read_text().replace('"answer"', '"solution"')
    (root / "unanswered.jsonl").write_text(text)
    return root


def test_careless_uses_of_a_run(root: Path) -> None:
    (found,) = spawn(_all_uses, 1, root)
    failures = []
    for name, use in USES.items():
        seen = found[name]
        lines = seen["err"].splitlines()
        if use.status == OK:
            notes = [t for t in seen["out"].splitlines() if t.startswith(("note:", "resumed:"))]
            is_clear = not lines and all(any(text in t for t in notes) for text in use.says)
            shown = notes
        else:
            is_clear = len(lines) == 1 and all(text in lines[0] for text in use.says)
            shown = lines
        print(f"{name}: {seen['status']}, {seen['seconds']:.1f} s: {' | '.join(shown)}")
        if not is_clear or seen["status"] != use.status or seen["changed"]:
            failures.append(f"{name}: {seen}")
        if seen["seconds"] > DEADLINE_SECONDS:
            failures.append(f"{name}: {seen['seconds']:.0f} s")
    assert len(USES) >= 30 and not failures, "\n" + "\n".join(failures)
    assert not (root / "runs" / "fresh" / "checkpoints").exists()
