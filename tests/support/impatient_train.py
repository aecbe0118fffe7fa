"""The training command with a short wait for lost ranks: a test need not wait for minutes."""

from __future__ import annotations

import os
import sys
import warnings

warnings.filterwarnings("ignore")

from megatron_vopd import train  # noqa: E402

if __name__ == "__main__":
    train.longest_wait_seconds = lambda _: 10.0  # type: ignore[assignment]
    status = train.main()
    sys.stdout.flush()
    os._exit(status)
