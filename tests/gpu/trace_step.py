"""One training step under the profiler: where the host waits for the device, the top kernels."""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tests.gpu.training import FULL, SMALL, enter, make, setup_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--small", action="store_true", help="a model for any machine")
    options = parser.parse_args()
    size, device = SMALL if options.small else FULL, options.device
    enter(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(setup_of("bf16", size, Path(folder), device), [size.rollouts(0)], size.row)
    trainer.train_step()
    syncs: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        trainer.train_step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for warning in seen:
        if "synchroniz" in str(warning.message):
            syncs[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    print(f"host waits in one step: {sum(syncs.values())}")
    for place, count in syncs.most_common():
        print(f"  {count:4} {place}")
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=activities) as profiler:
        trainer.train_step()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
    return 0


if __name__ == "__main__":
    sys.exit(main())
