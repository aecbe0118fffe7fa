"""Put TransformerEngine's Python into folders of its own, for the tests that need no GPU.

Its compiled part needs CUDA; the tests have a stand-in for it (tests/support/te). The wheel of the
metapackage holds all of the Python. It goes into FOLDER/VERSION, and what it imports besides into
FOLDER/common: nothing of it is seen by a process that does not name these folders.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vopd.megatron.transformer_engine import NEWEST, OLDEST

# What TransformerEngine imports when it is imported, and this package does not depend on.
COMMON = ("onnxscript==0.7.2", "onnx==1.23.2", "onnx-ir==1.1.0", "ml_dtypes==0.6.0")
COMMON += ("nvdlfw-inspect==0.2.2", "einops==0.8.2")

EXAMPLE = """\
example:
  .venv/bin/python tools/install_te.py .venv/te     # `make test` does this

Exit status: 0 installed, 1 pip failed; its message is above the last line."""


def install(target: Path, *packages: str) -> None:
    """Install packages (NAME==VERSION) without their dependencies into a folder, if not there."""
    missing = [package for package in packages if not _metadata(target, package).is_dir()]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(target), *missing], check=True)


def _metadata(target: Path, package: str) -> Path:
    name, version = package.replace("-", "_").split("==")
    return target / f"{name}-{version}.dist-info"


def main(arguments: Sequence[str] | None = None) -> int:
    """Install what is not there yet; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    folder = parser.parse_args(arguments).folder
    try:
        install(folder / "common", *COMMON)
        for version in (OLDEST, NEWEST):
            install(folder / version, f"transformer-engine=={version}")
    except subprocess.CalledProcessError as error:
        what = f"pip ended with status {error.returncode}"
        print(f"{folder}: {what}; see its message above, then repeat", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
