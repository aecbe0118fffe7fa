"""Let pip resolve the set of packages for GPUs, without installing it.

For each Python a new venv asks pip for what a user would install, `.[gpu,engine]` and the tools of
the build, as `pip install --dry-run`, from the index that pip is configured for. Metadata of wheels
is read without the wheels. Two packages have no wheel: this one, and transformer_engine_torch,
whose setup.py asks torch for its CUDA version. Their own setup.py runs here beside a stand-in for
torch that answers what torch 2.13.0 of CUDA 13.0 answers, so that no GPU, CUDA or torch is needed.

It proves that the declared requirements agree, and shows the versions. It does not compile
TransformerEngine's bindings, and nothing is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints" / "gpu.txt"
OK, FAILED = 0, 1
ASKED = (".[gpu,engine]", "setuptools", "wheel", "ninja", "pybind11")
# What pip needs to read the metadata of the two source packages.
BUILD_TOOLS = ("pip>=24", "setuptools>=77,<81", "wheel", "ninja", "pybind11", "packaging")
# A CPU build of torch, where an index has one, satisfies torch==2.13.0 too. vLLM wants
# setuptools<81 from Python 3.12 on; one version for all.
RULES = "torch!=2.13.0+cpu\nsetuptools<81\n"
STAND_IN = {
    "__init__.py": 'from . import version\n__version__ = "2.13.0+cu130"\n',
    "version.py": 'cuda = "13.0"\n',
    "utils/__init__.py": "",
    "utils/cpp_extension.py": "from setuptools import Extension\n"
    "from setuptools.command.build_ext import build_ext as BuildExtension\n"
    "CUDA_HOME = None\n"
    "def CppExtension(name, sources, **given): return Extension(name, sources)\n"
    "CUDAExtension = CppExtension\n",
}
EPILOG = """\
examples:
  python tools/resolve_gpu_set.py
  python tools/resolve_gpu_set.py --python python3.11 --python python3.12 --write

Exit status: 0 resolved, 1 not; pip's message is above the last line."""

Versions = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Resolve, print or write the versions, and return the exit status."""
    options = _parser().parse_args(arguments)
    pythons = options.python or [sys.executable]
    resolved: dict[str, Versions] = {}
    for python in pythons:
        try:
            version, found = resolve(python, None if options.write else CONSTRAINTS)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{python}: not resolved: {error}", file=sys.stderr)
            return FAILED
        resolved[version] = found
        print(f"Python {version}: {len(found)} packages, torch {found['torch']}", flush=True)
    if options.write:
        CONSTRAINTS.parent.mkdir(exist_ok=True)
        CONSTRAINTS.write_text(constraints_text(resolved))
        print(f"wrote {CONSTRAINTS}")
    return OK


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=plain)
    parser.add_argument(
        "--python",
        action="append",
        metavar="PYTHON",
        help="interpreter to resolve for, several times (default: this one)",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="resolve afresh and write constraints/gpu.txt (default: check that it resolves)",
    )
    return parser


def resolve(python: str, constraints: Path | None) -> tuple[str, Versions]:
    """Let pip resolve the set for an interpreter.

    Args:
        python: path or name of the interpreter; a venv is made from it.
        constraints: file of versions; None: the newest that fit together.

    Returns:
        "3.11" and the like; version by normalised name, without this package.

    Raises:
        CalledProcessError: pip found no set, or the interpreter makes no venv.
        OSError: there is no such interpreter.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
        inner = str(folder / "venv" / "bin" / "python")
        install = [inner, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *BUILD_TOOLS], check=True)
        rules = folder / "rules.txt"
        rules.write_text(RULES)
        flags = ["--dry-run", "--ignore-installed", "--no-build-isolation", "--report", "-"]
        limits = ["--constraint", str(constraints or rules)]
        run = subprocess.run(
            [*install, *flags, *limits, *ASKED],
            cwd=_source_copy(folder / "source"),
            env={**os.environ, "PYTHONPATH": str(_stand_in(folder / "stand_in"))},
            stdout=subprocess.PIPE,
            check=True,
        )
    report = json.loads(run.stdout)
    version = report["environment"]["python_version"]
    metadata = [one["metadata"] for one in report["install"]]
    found = {normalised(one["name"]): one["version"] for one in metadata}
    del found["megatron-vopd"]
    return version, found


def normalised(name: str) -> str:
    """Return the one spelling of a distribution's name."""
    return name.lower().replace("_", "-").replace(".", "-")


def constraints_text(resolved: dict[str, Versions]) -> str:
    """Write a line for each package, and for each Python where they differ."""
    lines = [
        "# Written by tools/resolve_gpu_set.py --write: the set for GPUs (extras gpu, engine) as",
        f"# pip resolved it on Linux x86_64, Python {' and '.join(resolved)}. Not run on a GPU.",
        "# A CPU build of torch, where your index has one, would satisfy torch==2.13.0 too.",
        "torch!=2.13.0+cpu",
    ]
    for name in sorted(set().union(*resolved.values())):
        versions = {python: found.get(name) for python, found in resolved.items()}
        if len(set(versions.values())) == 1:
            lines.append(f"{name}=={next(iter(versions.values()))}")
        else:
            lines += [
                f'{name}=={version}; python_version == "{python}"'
                for python, version in versions.items()
                if version is not None
            ]
    return "\n".join(lines) + "\n"


def _stand_in(folder: Path) -> Path:
    """Write the stand-in for torch, and return the folder to put on PYTHONPATH."""
    for name, text in STAND_IN.items():
        path = folder / "torch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def _source_copy(folder: Path) -> Path:
    """Copy what the metadata of this package is made from: reading it writes into the folder."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "megatron_vopd").mkdir()
    shutil.copy(ROOT / "megatron_vopd" / "__init__.py", folder / "megatron_vopd")
    return folder


if __name__ == "__main__":
    sys.exit(main())
