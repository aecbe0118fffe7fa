"""The end of a run, as the exit status of the script that started it (rule R8).

torchrun says 1 whatever its ranks said, so a launch script asks the run's `status.json` instead::

    0    done
    75   stopped and saved: start it again, and it continues
    93   do not start it again: a mistake, or the run has given up
    1    anything else: a crash, a killed process, no status at all

The file of an earlier start says nothing about this one, so the script has it removed first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_vopd.config import load_config
from megatron_vopd.errors import UserError
from megatron_vopd.files.atomic_file import replace
from megatron_vopd.run.folder import BEST_NAME, MAX_STATUS_BYTES, STATUS_NAME, hf_dir, step_dir

DONE, CRASHED, PREEMPTED, FINAL = 0, 1, 75, 93
_CODES = {"done": DONE, "preempted": PREEMPTED, "do not requeue": FINAL, "crash": CRASHED}
_MEANINGS = {
    DONE: "done",
    PREEMPTED: "stopped, nothing lost; the same command continues from there",
    FINAL: "starting it again would not help",
    CRASHED: "the same command continues from the last checkpoint",
}


def run_dir_of(config_path: str, overrides: list[str]) -> Path:
    """Return the run folder that a configuration names; raise ConfigError as `load_config` does."""
    run = load_config(config_path, overrides).run
    return Path(run.dir) / run.name


def clear(run_dir: Path) -> None:
    """Remove the status of an earlier process.

    Raises:
        UserError: the file cannot be removed.
    """
    try:
        (run_dir / STATUS_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{run_dir / STATUS_NAME}: {error.strerror}; remove it") from None


def exit_code(run_dir: Path) -> tuple[int, str]:
    """Return the exit status that `status.json` stands for, and a log line."""
    path = run_dir / STATUS_NAME
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            status = json.loads(file.read(MAX_STATUS_BYTES))
        reason, step = status["reason"], status["step"]
        code = _CODES[reason]
    except FileNotFoundError:
        return CRASHED, f"{path}: not there; the run was killed, or did not begin"
    except OSError as error:
        return CRASHED, f"{path}: {error.strerror}; how the run ended is not known"
    except (ValueError, KeyError, TypeError, RecursionError):
        return CRASHED, f"{path}: not what a run writes; how the run ended is not known"
    message = f" ({status['message']})" if status.get("message") else ""
    return code, f"{path}: {reason} after step {step}{message}; {_MEANINGS[code]}"


Reason = Literal["done", "preempted", "do not requeue", "crash"]


@dataclass(frozen=True)
class Status:
    """The end of a process (rule R8).

    Attributes:
        step: optimizer steps made; the last checkpoint may be of an earlier one.
        last_checkpoint: its name in `checkpoints`; None: there is none.
        requeue: True if starting again may help.
        message: the error in one line; empty: none.
    """

    reason: Reason
    step: int
    last_checkpoint: str | None
    requeue: bool
    message: str = ""


def write_status(run_dir: Path, status: Status) -> None:
    """Write `status.json`, which the launch script reads after the ranks have ended."""
    replace(run_dir / STATUS_NAME, json.dumps(asdict(status)) + "\n")


def write_best(run_dir: Path, metric: str, value: float, step: int) -> None:
    """Write `best.json`: the best evaluation, and its checkpoint and export in the run folder."""
    folders = {"checkpoint": step_dir(run_dir, step), "hf": hf_dir(run_dir, step)}
    found = {
        key: str(folder.relative_to(run_dir)) if folder.is_dir() else None
        for key, folder in folders.items()
    }
    best = {"metric": metric, "value": value, "step": step, **found}
    replace(run_dir / BEST_NAME, json.dumps(best) + "\n")
