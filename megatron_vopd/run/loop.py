"""A run from its first step to its last: checkpoints on the way, and how it ended in `status.json`.

Evaluations come before the first step, every `evaluation.interval` steps and after the last one;
checkpoints every `checkpoint.interval` steps, after an evaluation that is the best so far, after
the last step, and when a stop is requested; with `export_hf` each also becomes a HuggingFace folder
beside it. All functions here but `ending_noted` are collectives.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_vopd.checkpoint.export import export_student
from megatron_vopd.collectives import all_ranks, rank_0
from megatron_vopd.errors import GradingError, SkipLimitError, StopRequested, UserError
from megatron_vopd.run.folder import RunBusyError, hf_dir, saved_steps, step_of
from megatron_vopd.run.run import Run
from megatron_vopd.run.status import Reason, Status, write_best, write_status
from megatron_vopd.trainer import evaluation
from megatron_vopd.trainer.evaluation import best_of


def train(run: Run) -> Reason:
    """Make all steps that are left; after them, or when a stop is requested, save the state.

    Returns:
        "done", or "preempted": stopped, with every whole step in the last checkpoint.
    """
    section, trainer = run.config.checkpoint, run.trainer
    last = run.config.train.steps

    def after_step(step: int) -> bool:
        is_best = evaluate(run)
        is_due = section.interval > 0 and step % section.interval == 0
        if (is_due or is_best) and step < last:
            save(run)
        return not _is_stopped(run)

    # Before the first step, or where a stop had cut an evaluation short.
    if evaluate(run):
        save(run)
    trainer.fit(last, after_step)
    is_done = trainer.step >= last
    save(run, has_time=is_done)
    return "done" if is_done else "preempted"


def evaluate(run: Run) -> bool:
    """Evaluate when it is due, and record the result.

    A stop cuts an evaluation short; the next start makes it again.

    Returns:
        True if it is the best so far, and the student was trained before it.
    """
    evaluator, trainer = run.evaluator, run.trainer
    if evaluator is None or not evaluator.is_due(trainer.step) or _is_stopped(run):
        return False
    version = trainer.policy_version
    trainer.collector.settle(version)
    assert run.pusher is not None, "an evaluation without engines"
    run.pusher.ensure(version)
    try:
        with run.progress("evaluation") as progress:
            values = evaluator(trainer.step, version, progress)
    except StopRequested:
        return False
    run.extra[evaluation.KEY] = evaluator.state_dict()
    all_ranks(lambda: run.writer and run.writer.record_evaluation(trainer.step, values))
    return evaluator.best is not None and evaluator.best.step == trainer.step > 0


def _is_stopped(run: Run) -> bool:
    stop = run.trainer.stop
    return stop is not None and stop.anywhere()


def save(run: Run, has_time: bool = True) -> None:
    """Save a checkpoint of the last whole step; export it as well where that is configured.

    Args:
        has_time: False leaves the export to the next start: a launcher waits for this process to
            end, and will kill it.
    """
    best = best_of(run.extra)
    folder = run.checkpoints.save(run.extra, keep_also=() if best is None else {best.step})
    run.say(f"saved: {folder}")
    if run.config.checkpoint.export_hf and has_time:
        step = run.trainer.step
        out_dir = hf_dir(run.run_dir, step)
        if not rank_0(out_dir.exists):
            export_student(run.student, run.student_dir, out_dir)
            run.say(f"the student is in {out_dir}")
        rank_0(_remove_exports, run.run_dir, step)
    evaluator = run.evaluator
    if best is not None and evaluator is not None:
        named = (evaluator.metric, best.value, best.step)
        rank_0(lambda: write_best(run.run_dir, *named))


def _remove_exports(run_dir: Path, newest: int) -> None:
    """Remove the exports of steps whose checkpoints were removed."""
    kept = saved_steps(run_dir)
    for path in (run_dir / "hf").iterdir():
        step = step_of(path.name)
        if step is not None and step < newest and step not in kept:
            shutil.rmtree(path)


@dataclass
class Ending:
    """The contents of the `status.json` to come; the block of `ending_noted` fills them in."""

    run_dir: Path
    run: Run | None = None
    reason: Reason = "crash"


@contextmanager
def ending_noted(run_dir: Path) -> Iterator[Ending]:
    """Write `status.json` (rule R8) on rank 0 when the block ends, however it does."""
    ending = Ending(run_dir)
    try:
        yield ending
    except RunBusyError:
        raise  # the status belongs to the run that holds the folder
    except BaseException as error:
        final = isinstance(error, (UserError, SkipLimitError, GradingError))
        ending.reason = "do not requeue" if final else "crash"
        if isinstance(error, KeyboardInterrupt):  # before the first step: nothing new to save
            ending.reason = "preempted"
        _note(ending, f"{type(error).__name__}: {error}")
        raise
    _note(ending, "")


def _note(ending: Ending, message: str) -> None:
    """Write `status.json` on rank 0, with the first line of `message`."""
    if dist.get_rank() != 0:
        return
    steps = saved_steps(ending.run_dir)
    if ending.run is not None:
        made = ending.run.trainer.step
        steps = [saved for saved in steps if saved <= made]
    else:
        made = steps[0] if steps else 0
    last_checkpoint = f"step_{steps[0]}" if steps else None
    requeue = ending.reason in ("preempted", "crash")
    line = message.strip().partition("\n")[0].encode("ascii", "backslashreplace").decode()[:500]
    # Where nothing can be written, the exception still says what ended the run.
    with suppress(OSError, UserError):
        write_status(ending.run_dir, Status(ending.reason, made, last_checkpoint, requeue, line))
