"""Broken installations: packages that stand before the real ones on PYTHONPATH, one folder each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.support import ROOT

# The interpreter without the packages of the environment that runs the tests.
BARE_PYTHON = getattr(sys, "_base_executable", sys.executable)
SEGFAULT = "import ctypes\nctypes.string_at(0)\n"
ABORT = "import os\nos.abort()\n"

# A torch as the doctor asks it: 13.0 of CUDA, and the GPUs that `capability` and `free` describe.
CUDA_TORCH = """
import types, warnings
__version__ = "{version}"
version = types.SimpleNamespace(cuda="13.0")
class distributed:
    is_available = is_gloo_available = staticmethod(lambda: True)
class cuda:
    nccl = types.SimpleNamespace(version=lambda: (2, 29, 7))
    device_count = staticmethod(lambda: 2)
    get_device_capability = staticmethod(lambda index: {capability})
    get_device_name = staticmethod(lambda index: "GPU H")
    mem_get_info = staticmethod(lambda index: ({free} * 2**30, 80 * 2**30))
    @staticmethod
    def is_available():
        {available}
backends = types.SimpleNamespace(cudnn=types.SimpleNamespace(version=lambda: {cudnn}))
"""


def cuda_torch(
    capability: tuple[int, int] = (9, 0),
    free: int = 79,
    cudnn: int = 92000,
    available: str = "return True",
    version: str = "2.13.0",
) -> str:
    """Return the source of a torch that says it has two GPUs."""
    return CUDA_TORCH.format(
        capability=capability, free=free, cudnn=cudnn, available=available, version=version
    )


def write_package(folder: Path, name: str, source: str) -> None:
    """Write a package NAME whose import runs `source`."""
    path = folder.joinpath(*name.split("."), "__init__.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def write_metadata(folder: Path, name: str, version: str, *requires: str) -> None:
    """Write the metadata of a distribution, as pip leaves it beside a package."""
    path = folder / f"{name}-{version}.dist-info" / "METADATA"
    path.parent.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    path.write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]) + "\n")


def copy_of_package(folder: Path) -> None:
    """Link this package into `folder`, less its compiled extension."""
    (folder / "megatron_vopd").mkdir()
    for path in (ROOT / "megatron_vopd").iterdir():
        if not path.name.startswith(("_C", "__pycache__", "preflight")):
            (folder / "megatron_vopd" / path.name).symlink_to(path)
    # Files of its own: the doctor looks for the extension beside itself.
    (folder / "megatron_vopd" / "preflight" / "doctor").mkdir(parents=True)
    for path in (ROOT / "megatron_vopd" / "preflight").rglob("*.py"):
        place = folder / path.relative_to(ROOT)
        place.write_text(path.read_text())


def run_doctor(
    folder: Path,
    *arguments: str,
    bare: bool = False,
    prefix: tuple[str, ...] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, dict[str, str], str]:
    """Run `vopd doctor` as a process with `folder` first on PYTHONPATH.

    Args:
        bare: in an interpreter without packages.
        prefix: words before the command, as `taskset -c 0`.
        variables: environment of the process, over that of this one.

    Returns:
        The exit status; `state text` by part, from the printed report; standard error.
    """
    kept = {name: text for name, text in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    program = "import sys; from megatron_vopd.cli import main; sys.exit(main())"
    python = BARE_PYTHON if bare else sys.executable
    run = subprocess.run(
        [*prefix, python, "-P", "-c", program, "doctor", *arguments],
        env={**kept, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    rows = [line.split(maxsplit=2) for line in run.stdout.splitlines()[:-1]]
    return run.returncode, {name: f"{state} {text}" for state, name, text in rows}, run.stderr
