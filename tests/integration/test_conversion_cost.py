"""H6: memory and time of both tools on a synthetic model of 2 GiB."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import pytest

from tests.integration.big_model import LARGEST_TENSOR_BYTES, run_measured, write_big_model

TOOLS = Path(__file__).parents[2] / "tools"
REPEATS = 5
# Twice the largest tensor and 200 MiB, of which the interpreter with torch takes most.
LIMIT_MIB = 2 * LARGEST_TENSOR_BYTES / 2**20 + 200
LARGEST_RATIO = 3.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files and flush them to the disk."""
    begin = time.monotonic()
    target.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.name
            shutil.copyfile(path, copy)
            descriptor = os.open(copy, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.monotonic() - begin


def test_memory_and_speed(tmp_path: Path) -> None:
    """Each round copies the model, converts it, and converts it back; the medians are compared.

    Anonymous memory is RssAnon of the process and its children, sampled every 10 ms: pages mapped
    from files do not count, pages shared after a fork count in each process (none is forked).
    """
    source = write_big_model(tmp_path / "hf")
    python, copies, imports, exports = sys.executable, [], [], []
    for _ in range(REPEATS):
        copies.append(_copy(source, tmp_path / "copy"))
        shutil.rmtree(tmp_path / "copy")
        to_megatron = [python, str(TOOLS / "convert_hf_to_megatron.py")]
        imports.append(run_measured([*to_megatron, str(source), str(tmp_path / "megatron")]))
        to_hf = [python, str(TOOLS / "convert_megatron_to_hf.py")]
        exports.append(run_measured([*to_hf, str(tmp_path / "megatron"), str(tmp_path / "back")]))
        shutil.rmtree(tmp_path / "megatron")
        shutil.rmtree(tmp_path / "back")
    copying = statistics.median(copies)
    print(f"\ncopying with fsync: {copying:.1f} s")
    for name, runs in (("HF to Megatron", imports), ("Megatron to HF", exports)):
        ratio = statistics.median(run.seconds for run in runs) / copying
        peak = max(run.anonymous_mib for run in runs)
        print(
            f"{name}: {ratio * copying:.1f} s, {ratio:.2f} x copying, anonymous memory {peak:.0f} "
            f"MiB (limit {LIMIT_MIB:.0f})"
        )
        assert peak <= LIMIT_MIB
        assert ratio <= LARGEST_RATIO
