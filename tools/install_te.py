"""Put TransformerEngine's Python into folders of its own, for the tests that need no GPU.

Its compiled part needs CUDA; the tests have a stand-in for it (tests/support/te). The wheel of the
metapackage holds all of the Python. It goes into FOLDER/VERSION, and what it imports besides into
FOLDER/common: nothing of it is seen by a process that does not name these folders.

Run it as `.venv/bin/python tools/install_te.py .venv/te`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_vopd.megatron.transformer_engine import NEWEST, OLDEST

# What TransformerEngine imports when it is imported, and this package does not depend on.
COMMON = ("onnxscript==0.7.2", "onnx==1.23.2", "onnx-ir==1.1.0", "ml_dtypes==0.6.0")
COMMON += ("nvdlfw-inspect==0.2.2",)


def install(target: Path, *packages: str) -> None:
    """Install packages (NAME==VERSION) without their dependencies into a folder, if not there."""
    missing = [package for package in packages if not _metadata(target, package).is_dir()]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(target), *missing], check=True)


def _metadata(target: Path, package: str) -> Path:
    name, version = package.replace("-", "_").split("==")
    return target / f"{name}-{version}.dist-info"


def main() -> int:
    folder = Path(sys.argv[1])
    install(folder / "common", *COMMON)
    for version in (OLDEST, NEWEST):
        install(folder / version, f"transformer-engine=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
