"""The training command, in which a chosen rank comes to harm while it writes a checkpoint.

`FAULT_RANK`, `FAULT_STEP` say which rank and which checkpoint; `FAULT` what happens: `KILL`, `STOP`
(signals to itself), `LIMIT` (its files may grow no further), `SLOW` (three seconds are lost). Ranks
wait for one another 30 s at most.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")

from megatron_vopd import train  # noqa: E402
from megatron_vopd.checkpoint import sharded  # noqa: E402


def _harm(fault: str) -> None:
    if fault == "SLOW":
        time.sleep(3)
    elif fault == "LIMIT":
        # Python ignores the signal; writing says EFBIG, as it says ENOSPC on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{fault}"))


def _armed(add: Any) -> Any:
    done = []

    def harmed(file: Any, shard: Any) -> None:
        add(file, shard)
        step = f"step_{os.environ['FAULT_STEP']}.tmp-"
        is_mine = os.environ["RANK"] == os.environ["FAULT_RANK"]
        if is_mine and step in str(file._staging.path) and not done:
            done.append(True)
            _harm(os.environ["FAULT"])

    return harmed


if __name__ == "__main__":
    sharded.ShardFile.add = _armed(sharded.ShardFile.add)  # type: ignore[method-assign]
    train.longest_wait_seconds = lambda _: 30.0  # type: ignore[assignment]
    status = train.main()
    sys.stdout.flush()
    os._exit(status)
