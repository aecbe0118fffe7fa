"""Builds `megatron_vopd._C`: the operator's C++ kernels, and its CUDA kernels where torch has CUDA.

The metadata of the package is in pyproject.toml; this file is only the extension. One variable
decides about CUDA: MEGATRON_VOPD_CUDA = auto (default: when torch was built with CUDA and nvcc is
there) | 0 (never) | 1 (required). MEGATRON_VOPD_NVCC_FLAGS adds options for nvcc, to be timed, such
as `-DMEGATRON_VOPD_THREADS=512 -DMEGATRON_VOPD_CTAS=1` (csrc/cuda/device.cuh). No `-march=native`:
instruction sets are chosen at run time.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "megatron_vopd: torch is not importable here; install torch >= 2.11 first, then run "
        "`pip install --no-build-isolation -e .`"
    )

CUDA_ARCHS = ("80", "90")
ROOT = Path(__file__).parent


def cuda_wanted() -> bool:
    """Whether to build the CUDA kernels; exits with one line when required and impossible."""
    choice = os.environ.get("MEGATRON_VOPD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"megatron_vopd: MEGATRON_VOPD_CUDA={choice!r}; use auto, 0 or 1")
    missing = [
        reason
        for reason, absent in (
            ("this torch was built without CUDA", torch.version.cuda is None),
            ("nvcc was not found (set CUDA_HOME)", CUDA_HOME is None),
        )
        if absent
    ]
    if choice == "1" and missing:
        sys.exit(f"megatron_vopd: MEGATRON_VOPD_CUDA=1, but {' and '.join(missing)}")
    return choice != "0" and not missing


def extension():
    """The extension module: every source under csrc/ that this build can compile."""
    host = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    sources = ["csrc/bindings.cpp", *host]
    # No libgomp at link time: torch brings its own OpenMP runtime, and a second one would
    # oversubscribe the cores.
    # gcc warns about its own intrinsics headers (undefined operands of unmasked forms).
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-Wall", *quiet]
    include_dirs = [str(ROOT / "csrc")]
    if not cuda_wanted():
        return CppExtension(
            "megatron_vopd._C",
            sources,
            include_dirs=include_dirs,
            extra_compile_args={"cxx": flags},
        )
    device = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))
    archs = ",".join(CUDA_ARCHS)
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
    more = os.environ.get("MEGATRON_VOPD_NVCC_FLAGS", "").split()
    return CUDAExtension(
        "megatron_vopd._C",
        [*sources, "csrc/bindings_cuda.cpp", *device],
        include_dirs=include_dirs,
        define_macros=[("MEGATRON_VOPD_CUDA_ARCHS", f'"{archs}"')],
        extra_compile_args={
            "cxx": flags,
            "nvcc": ["-O3", "--expt-relaxed-constexpr", *gencode, *more],
        },
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
