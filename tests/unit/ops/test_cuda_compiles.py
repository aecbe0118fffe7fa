"""Every CUDA source compiles for the target architectures wherever nvcc exists, GPU or not."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.support import ROOT

CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_source_compiles(source, arch, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on this machine: the CUDA kernels are not compiled here")
    virtual = arch.replace("sm", "compute")
    command = [nvcc, "-std=c++17", "-O1", "--expt-relaxed-constexpr", f"-I{CSRC}"]
    command += [f"-gencode=arch={virtual},code={arch}", "-Werror", "all-warnings"]
    command += ["-c", str(source), "-o", str(tmp_path / "object.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_there_is_something_to_compile():
    assert {path.stem for path in SOURCES} >= {"stats", "merge", "gradient"}
