"""A run from its first step to its last: checkpoints on the way, and how it ended in `status.json`.

Checkpoints come every `checkpoint.interval` steps, after the last step, and when a stop is
requested; with `export_hf` each also becomes a HuggingFace folder beside it. All functions here but
`ending_noted` are collectives.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from megatron_vopd.assembly import Run
from megatron_vopd.grading import GradingError
from megatron_vopd.guard import SkipLimitError
from megatron_vopd.parallel import in_step, in_step_all
from megatron_vopd.publish_together import on_rank_0
from megatron_vopd.run_folder import (
    Reason,
    Status,
    saved_steps,
    step_of,
    write_status,
)
from megatron_vopd.student_export import export_student
from megatron_vopd.types import UserError


def train(run: Run) -> Reason:
    """All steps that are left; then, or when a stop is requested, the state is saved.

    Returns:
        done, or preempted: then every whole step is in the last checkpoint.
    """
    section, trainer = run.config.checkpoint, run.trainer
    last = run.config.train.steps

    def after_step(step: int) -> bool:
        if section.interval and step % section.interval == 0 and step < last:
            save(run)
        return trainer.stop is None or not trainer.stop.anywhere()

    trainer.fit(last, after_step)
    is_done = trainer.step >= last
    save(run, has_time=is_done)
    return "done" if is_done else "preempted"


def save(run: Run, has_time: bool = True) -> None:
    """A checkpoint of the last whole step; exported as well where that is configured.

    Args:
        has_time: False: a launcher waits for this process to end, and will kill it; an export has
            to wait for the next start.
    """
    folder = run.checkpoints.save(run.extra)
    run.say(f"saved: {folder}")
    if not run.config.checkpoint.export_hf or not has_time:
        return
    step = run.trainer.step
    out_dir = run.run_dir / "hf" / f"step_{step}"
    if not in_step_all(lambda: out_dir.exists())[0]:
        export_student(run.student, run.student_dir, out_dir)
        run.say(f"the student is in {out_dir}")
    in_step(lambda: on_rank_0(lambda: _remove_exports(run.run_dir, step)))


def _remove_exports(run_dir: Path, newest: int) -> None:
    """Exports go with the checkpoints of their steps."""
    kept = saved_steps(run_dir)
    for path in (run_dir / "hf").iterdir():
        step = step_of(path.name)
        if step is not None and step < newest and step not in kept:
            shutil.rmtree(path)


@contextmanager
def ending_noted(run: Run) -> Iterator[list[Reason]]:
    """Write `status.json` (rule R8) on rank 0 when the block ends, however it does.

    Yields:
        a list to put the reason into.
    """
    reasons: list[Reason] = []
    try:
        yield reasons
    except BaseException as error:
        final = isinstance(error, (UserError, SkipLimitError, GradingError))
        _note(run, "do not requeue" if final else "crash", f"{type(error).__name__}: {error}")
        raise
    _note(run, reasons[-1] if reasons else "crash", "")


def _note(run: Run, reason: Reason, message: str) -> None:
    if dist.get_rank() != 0:
        return
    step = run.trainer.step
    names = [f"step_{saved}" for saved in saved_steps(run.run_dir) if saved <= step]
    last_checkpoint = names[0] if names else None
    requeue = reason in ("preempted", "crash")
    line = message.strip().partition("\n")[0].encode("ascii", "backslashreplace").decode()[:500]
    # A full disk is no reason to hide what ended the run.
    with suppress(OSError, UserError):
        write_status(run.run_dir, Status(reason, step, last_checkpoint, requeue, line))
