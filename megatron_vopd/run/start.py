"""The start of a run on disk: its folder, what it resumes from, its configuration.

Configuration, metrics and checkpoints of an earlier start are not changed before its checkpoint was
loaded: a start that is refused loses nothing.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vopd.checkpoint.random_states import (
    seed_random_states,
)
from megatron_vopd.collectives import all_ranks, rank_0
from megatron_vopd.errors import UserError, refusal
from megatron_vopd.hf.mapping import LayerSpec
from megatron_vopd.megatron import transformer_engine
from megatron_vopd.megatron.transformer_engine import OLDEST
from megatron_vopd.run.environment import local_ranks, require_vllm
from megatron_vopd.run.folder import (
    STATUS_NAME,
    checkpoints_dir,
    latest_remark,
    locked,
    newest_valid,
    remove_stale,
    saved_steps,
    step_of,
    verify_checkpoint,
)

_HEADER = "# The resolved configuration of a run of megatron_vopd.train.\n"


def enter_folder(
    run_dir: Path, resume: str, engine_device: str | None, seed: int, stack: ExitStack
) -> Resume:
    """Make and lock the folder, choose what to resume from, seed. Every rank calls it.

    Args:
        resume: `checkpoint.resume`.
        engine_device: "cpu" or "cuda", where engines will be started; None: there are none.
        seed: seed of the run, which Python's, numpy's and torch's random states start from.
        stack: holds the lock on the folder.

    Raises:
        UserError: on every rank: nothing to resume from where there should be something, another
            run's folder, or one that cannot be written.
    """
    if engine_device is not None:
        all_ranks(require_vllm, engine_device)
    rank_0(_make_folder, run_dir)
    rank_0(stack.enter_context, locked(run_dir))
    chosen = choose_resume(run_dir, resume)
    # How an earlier process ended; should this one be killed, there must be no status.
    rank_0((run_dir / STATUS_NAME).unlink, missing_ok=True)
    seed_random_states(seed)
    return chosen


def _make_folder(run_dir: Path) -> None:
    remedy = "choose another run.name or run.dir"
    own = run_dir / "config.yaml"
    try:
        if own.exists() and _HEADER not in own.read_text("utf-8", "replace"):
            got = f"{own}, which is not of a run"
            raise refusal("run.name", got, "a folder for this run alone", remedy)
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{error.filename} ({error.strerror})"
        raise refusal("run.dir", got, "a folder that can be written", remedy) from None


def record_config(run_dir: Path, text: str) -> None:
    """Write the resolved configuration into the folder; for one rank.

    Args:
        text: what `config.table.resolved_yaml` returned.
    """
    (run_dir / "config.yaml").write_text(_HEADER + text, encoding="utf-8")


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a start resumes from; `folder` None: it begins with step 0.

    Attributes:
        step: steps made at that point.
        remarks: log lines about what was passed over.
    """

    folder: Path | None
    step: int
    remarks: tuple[str, ...]


def choose(run_dir: Path, resume: str) -> Resume:
    """Return what `resume` (`auto`, `never`, a checkpoint folder) means for this run folder.

    A checkpoint of another run starts this one once; later starts resume from this run's.

    Raises:
        UserError: steps were made here and no checkpoint of them verifies, or two runs would mix.
        FileError: the given folder is no checkpoint that verifies; the file is named.
    """
    remove_stale(run_dir)
    steps, has_metrics = saved_steps(run_dir), _has_step(run_dir / "metrics.jsonl")
    if resume == "never":
        if steps or has_metrics:
            raise UserError(
                f"run.name: got {run_dir}, which holds a run already, expected a new folder for "
                "checkpoint.resume=never; choose another run.name, or set checkpoint.resume=auto"
            )
        return Resume(None, 0, ())
    given = None if resume == "auto" else Path(resume)
    if given is not None and given.resolve().parent == checkpoints_dir(run_dir).resolve():
        return _own_checkpoint(given, steps)
    chosen, refused = newest_valid(run_dir)
    remarks = (*refused, *latest_remark(run_dir, chosen))
    if chosen is not None:
        if given is not None:
            remarks = (*remarks, f"checkpoint.resume={given}: {run_dir} has checkpoints of its own")
        return Resume(chosen, step_of(chosen.name) or 0, remarks)
    if steps or has_metrics:
        reasons = "; ".join(refused) or "no checkpoint was saved"
        raise UserError(
            f"{run_dir}: steps were made here, but nothing can be resumed from ({reasons}); "
            "restore a checkpoint, choose another run.name, or remove the folder"
        )
    if given is None:
        return Resume(None, 0, remarks)
    return Resume(given, verify_checkpoint(given), remarks)


def _own_checkpoint(given: Path, steps: list[int]) -> Resume:
    """Return the start from a checkpoint of this very run, unless it has a newer one."""
    step = verify_checkpoint(given)
    newer = [other for other in steps if other > step]
    if newer:
        raise UserError(
            f"checkpoint.resume: got {given}, but step_{newer[0]} beside it is newer; move the "
            "newer ones away, or choose another run.name"
        )
    return Resume(given, step, ())


def _has_step(path: Path) -> bool:
    """Return True if a step was recorded; an evaluation before the first one (step 0) is none."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
            if re.match(rb'\{"step": 0[,}]', line):
                line = file.readline()
            return line.endswith(b"\n")
    except FileNotFoundError:
        return False


# Ranks without an engine wait in a collective while a leader's engine starts (LocalSettings.
# start_seconds) or answers (rollout.deadline_seconds), and a while longer for a busy machine.
START_SECONDS, MARGIN_SECONDS = 600.0, 300.0


def longest_wait_seconds(deadline_seconds: float) -> float:
    """Return the seconds after which a rank that waits for the others reports one as gone.

    Args:
        deadline_seconds: `rollout.deadline_seconds`.
    """
    return max(deadline_seconds, START_SECONDS) + MARGIN_SECONDS


def resolved_device(asked: str) -> str:
    """Return cpu or cuda for `parallel.device`.

    Raises:
        ConfigError: on every rank of a machine that has no GPU, or fewer than ranks.
    """
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        remedy = "set parallel.device=cpu"
        raise refusal("parallel.device", "cuda", "a GPU that torch can use", remedy)
    device = asked if asked != "auto" else "cuda" if has_gpu else "cpu"
    gpus, ranks = torch.cuda.device_count() if device == "cuda" else 0, local_ranks(os.environ)
    if device == "cuda" and gpus < ranks:
        got = f"{asked}, and GPUs: {gpus} for the {ranks} ranks of this machine"
        remedy = f"start --nproc-per-node {gpus} with smaller layouts, or set parallel.device=cpu"
        raise refusal("parallel.device", got, "a GPU for each", remedy)
    return device


def resolved_layer_spec(asked: str, device: str) -> LayerSpec:
    """Return te or local for `parallel.backend`.

    Raises:
        ConfigError: `te` without a GPU or TransformerEngine; `te` or `auto` with one that is
            installed and cannot be used, for the reason in the line.
    """
    key, local = "parallel.backend", "set parallel.backend=local"
    if asked == "local" or (asked == "auto" and device == "cpu"):
        return "local"
    if device == "cpu":
        raise refusal(key, asked, "a GPU, which TransformerEngine needs", local)
    expected = f"TransformerEngine {OLDEST} or newer"
    engine = transformer_engine.found()
    if engine.version is None:
        if asked == "auto":
            return "local"
        raise refusal(key, f"{asked}, but TransformerEngine is not installed", expected, local)
    problem = engine.problem or transformer_engine.megatron_problem()
    if problem is not None:
        got = f"{asked}, but TransformerEngine {engine.version} cannot be used: {problem}"
        raise refusal(key, got, expected, f"install it again, or {local}")
    return "te"


def choose_resume(run_dir: Path, resume: str) -> Resume:
    """Choose on rank 0 what to resume from; return it on every rank.

    Raises:
        UserError: on every rank.
    """
    return rank_0(choose, run_dir, resume)
