"""How a run ended, as the exit status of the script that started it (rule R8).

torchrun says 1 whatever its ranks said, so a launch script asks the run's `status.json` instead::

    0    done
    75   stopped and saved: start it again, and it goes on
    93   do not start it again: a mistake, or the run has given up
    1    anything else: a crash, a killed process, no word at all

The file of an earlier start must not speak for this one, so the script has it removed first.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vopd.config import load_config
from megatron_vopd.run_folder import MAX_STATUS_BYTES, STATUS_NAME
from megatron_vopd.types import UserError

DONE, CRASHED, PREEMPTED, FINAL = 0, 1, 75, 93
_CODES = {"done": DONE, "preempted": PREEMPTED, "do not requeue": FINAL, "crash": CRASHED}
_MEANINGS = {
    DONE: "done",
    PREEMPTED: "stopped, nothing lost; the same command goes on from there",
    FINAL: "starting it again would not help",
    CRASHED: "the same command goes on from the last checkpoint",
}


def run_dir_of(config_path: str, overrides: list[str]) -> Path:
    """The run folder that a configuration names; raises ConfigError."""
    run = load_config(config_path, overrides).run
    return Path(run.dir) / run.name


def clear(run_dir: Path) -> None:
    """Forget how an earlier process ended."""
    try:
        (run_dir / STATUS_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{run_dir / STATUS_NAME}: {error.strerror}; remove it") from None


def exit_code(run_dir: Path) -> tuple[int, str]:
    """The exit status that `status.json` stands for, and a line for the reader."""
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
