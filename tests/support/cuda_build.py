"""A CUDA build of torch, and of the extension against it, on a machine without a GPU.

`python -m tests.support.cuda_build FOLDER` makes both in FOLDER (about 5 GB) and prints what
`cuda_trace` finds; a second call uses what is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support import ROOT

NEEDED_BYTES = 8 * 10**9


def missing(folder: Path) -> str | None:
    """Return why nothing can be built here, else None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on this machine"
    if shutil.disk_usage(folder).free < NEEDED_BYTES:
        return f"{folder} has less than {NEEDED_BYTES // 10**9} GB free"
    return None


def install_torch(folder: Path) -> str | None:
    """Install the CUDA build of this version of torch in `folder`; return pip's last words, if any.

    `===` takes the very version of the package index, not one with a suffix such as `+cpu`.
    """
    if (folder / "torch").is_dir():
        return None
    version = torch.__version__.partition("+")[0]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    run = subprocess.run([*command, f"torch==={version}"], capture_output=True, text=True)
    return None if run.returncode == 0 else (run.stderr.strip().splitlines() or ["pip failed"])[-1]


def toolkit() -> Path:
    """Return the folder of the CUDA toolkit that nvcc uses."""
    source = str(ROOT / "csrc/cuda/merge.cu")
    listing = subprocess.run(
        ["nvcc", "--dryrun", "-c", source], capture_output=True, text=True, check=True
    ).stderr
    found = re.search(r"TOP=(\S+)", listing)
    assert found is not None, listing
    return Path(found[1]).resolve()


def environment(tree: Path, site: Path) -> dict[str, str]:
    """Return the variables with which Python sees the tree and the CUDA build of torch."""
    paths = {"PYTHONPATH": f"{tree}:{site}", "CUDA_HOME": str(toolkit())}
    return os.environ | paths | {"MEGATRON_VOPD_CUDA": "1", "MAX_JOBS": "2"}


def build(tree: Path, site: Path) -> None:
    """Copy the sources to `tree` and build the extension there against the torch of `site`."""
    if any((tree / "megatron_vopd").glob("_C*.so")):
        return
    built = shutil.ignore_patterns("_C*.so", "__pycache__")
    for name in ("csrc", "megatron_vopd", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=built, dirs_exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run = subprocess.run(
        command, cwd=tree, env=environment(tree, site), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def trace(tree: Path, site: Path) -> dict[str, Any]:
    """Return what `cuda_trace` prints in a process with both builds."""
    command = [sys.executable, "-m", "tests.support.cuda_trace"]
    run = subprocess.run(
        command, cwd=tree, env=environment(tree, site), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    reason = missing(where) or install_torch(where / "site")
    if reason is not None:
        sys.exit(f"no CUDA build here: {reason}")
    (where / "tree").mkdir(exist_ok=True)
    build(where / "tree", where / "site")
    print(json.dumps(trace(where / "tree", where / "site"), indent=1))
