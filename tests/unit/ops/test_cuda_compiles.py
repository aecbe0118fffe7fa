"""Every CUDA source compiles for the target architectures wherever nvcc exists, GPU or not."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from torch.utils.cpp_extension import include_paths

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


def test_bindings_compile(tmp_path):
    """It takes torch's headers, the same in its builds for the CPU but for one file."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on this machine: the headers of CUDA are missing")
    generated = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.touch()
    listing = subprocess.run(
        [nvcc, "--dryrun", "-c", str(SOURCES[0])], capture_output=True, text=True, check=True
    ).stderr
    (top,) = {line.partition("TOP=")[2].strip() for line in listing.splitlines() if "TOP=" in line}
    folders = [CSRC, *include_paths(), f"{top}/include", tmp_path]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", str(CSRC / "bindings_cuda.cpp")]
    command += [f"-I{folder}" for folder in folders]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_there_is_something_to_compile():
    assert {path.stem for path in SOURCES} >= {"stats", "merge", "gradient"}
