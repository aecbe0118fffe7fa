"""What the device is, and how fast it copies and multiplies: the yardsticks of other figures."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.cuda import nccl

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "vllm", "triton")


def seconds(run: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Return the least seconds of one call, after two that are not counted."""
    times = []
    for number in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    print(f"Python {platform.python_version()}, CUDA of torch {torch.version.cuda}")
    for name in PACKAGES:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        print(f"{found.name}, {found.total_memory / 2**30:.1f} GiB, sm_{found.major}{found.minor}")
        print(f"NCCL {'.'.join(map(str, nccl.version()))}")
    size, width = (2**30, 8192) if device == "cuda" else (2**24, 512)
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds(lambda: target.copy_(source), device)
    print(f"copy: {rate / 1e12:.3f} TB/s, bytes read and written")
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    rate = 2 * width**3 / seconds(lambda: a @ b, device)
    print(f"bf16 product {width} x {width} x {width}: {rate / 1e12:.2f} TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
