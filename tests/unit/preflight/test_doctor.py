"""`vopd doctor` in broken environments: a line for what is broken, exit status 2, no traceback."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.cli import main
from megatron_vopd.errors import MISTAKE, OK
from megatron_vopd.preflight.doctor import machine
from megatron_vopd.preflight.doctor.examine import ROWS, examine, probe
from megatron_vopd.preflight.doctor.line import Seen
from tests.support.broken_installs import (
    ABORT,
    SEGFAULT,
    copy_of_package,
    cuda_torch,
    run_doctor,
    write_metadata,
    write_package,
)

needs_bare = pytest.mark.skipif(
    sys.prefix == sys.base_prefix, reason="needs a venv, so that its base has no packages"
)
GPU_ROWS = "torch,gpu,nccl,extension,te,apex,megatron-core,vllm"


def one_problem(ran: tuple[int, dict[str, str], str], part: str, *texts: str) -> None:
    """Assert that `part` alone is a problem, in a line that holds all of `texts`."""
    status, lines, errors = ran
    bad = {name: line for name, line in lines.items() if line.startswith("problem ")}
    assert status == MISTAKE and errors == "", (status, lines, errors)
    assert list(bad) == [part], lines
    assert bad[part].startswith("problem got ") and ", expected " in bad[part], bad
    assert "; " in bad[part] and "Traceback" not in bad[part], bad
    assert all(text in bad[part] for text in texts), bad


TORCHES = {
    "absent": ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
    "a library is missing": (
        "raise OSError('libcudart.so.13: cannot open shared object file')",
        "OSError: libcudart.so.13",
    ),
    "an old file of another version": (
        "raise ImportError('cannot import name x from partially initialized torch')",
        "cannot import name",
    ),
    "crashes": (SEGFAULT, "got an import that ended the process with SIGSEGV, expected"),
    "aborts": (ABORT, "ended the process with SIGABRT"),
    "ends the process": ("import os; os._exit(7)", "ended the process with status 7"),
    "asks to exit": ("raise SystemExit('no licence')", "SystemExit: no licence"),
}


@pytest.mark.parametrize("name", TORCHES)
def test_torch_that_does_not_import(name: str, tmp_path: Path) -> None:
    """Torch is one line; what needs torch is not tried, and is no second problem."""
    source, says = TORCHES[name]
    write_package(tmp_path, "torch", source)
    ran = run_doctor(tmp_path, "--only", GPU_ROWS)
    one_problem(ran, "torch", says, "make install")
    assert ran[1]["extension"] == "note not tried, because torch does not work"
    assert ran[1]["vllm"] == "note not tried, because torch does not work"


def test_a_package_that_never_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "torch", "import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe("torch", 0.5) == {"error": "no end of its import within 0 seconds"}


@pytest.mark.parametrize("broken", ["pydantic", "yaml", "rich", "packaging", "numpy"])
def test_the_doctor_needs_no_package(broken: str, tmp_path: Path) -> None:
    write_package(tmp_path, broken, "raise RuntimeError('broken on purpose')")
    status, lines, errors = run_doctor(tmp_path, "--only", "python,ranks,apex")
    assert (status, errors) == (OK, ""), lines
    assert len(lines) == 3 and lines["apex"].startswith("ok ")


@needs_bare
def test_an_interpreter_without_packages(tmp_path: Path) -> None:
    status, lines, errors = run_doctor(tmp_path, "--only", "package,torch,vllm", bare=True)
    assert (status, errors) == (MISTAKE, "")
    assert lines["package"].startswith("problem got ") and "pip install" in lines["package"]
    assert "No module named 'torch'" in lines["torch"]


# As megatron-core does: an absent package is fine, one whose import fails is not.
IMPORTS_WHAT_IS_THERE = """
for name in ("transformer_engine.pytorch", "apex"):
    try:
        __import__(name)
    except ImportError:
        pass
"""


def gpu_machine(folder: Path, **torch: Any) -> None:
    """Write a sound torch for CUDA 13, an extension for sm_80 and sm_90, TE and vLLM."""
    write_package(folder, "torch", cuda_torch(**torch))
    copy_of_package(folder)
    extension = "def build_info(): return {'isa': 'avx2', 'cuda_archs': '80,90'}"
    (folder / "megatron_vopd" / "_C.py").write_text(extension)
    write_package(folder, "transformer_engine", "__version__ = '2.20.2'")
    write_package(folder, "transformer_engine.pytorch", "")
    for name in ("transformer_engine", "transformer_engine_cu13", "transformer_engine_torch"):
        write_metadata(folder, name, "2.20.2")
    write_package(folder, "megatron", "")
    write_package(folder, "megatron.core", "__version__ = '0.16.1'")
    write_package(folder, "megatron.core.models.gpt.gpt_layer_specs", IMPORTS_WHAT_IS_THERE)
    write_package(folder, "vllm", "__version__ = '0.32.0'\nLLM = SamplingParams = None")
    write_package(folder, "vllm.config", "")
    write_metadata(folder, "vllm", "0.32.0", "torch==2.13.0")


def gpu_doctor(
    folder: Path, bare: bool = False, **variables: str
) -> tuple[int, dict[str, str], str]:
    asked = ("--for", "gpu", "--only", GPU_ROWS)
    return run_doctor(folder, *asked, bare=bare, variables=variables)


def test_a_sound_gpu_machine(tmp_path: Path) -> None:
    gpu_machine(tmp_path)
    status, lines, errors = gpu_doctor(tmp_path)
    assert (status, errors) == (OK, ""), lines
    assert {line.split()[0] for line in lines.values()} == {"ok"}, lines
    assert "2 x GPU H (sm_90)" in lines["gpu"] and "79 GiB free" in lines["gpu"]
    assert lines["extension"].endswith("CUDA kernels 80,90")


def test_a_driver_too_old(tmp_path: Path) -> None:
    said = "The NVIDIA driver on your system is too old (found version 12040)."
    gpu_machine(tmp_path, available=f"warnings.warn('{said}'); return False")
    one_problem(gpu_doctor(tmp_path), "gpu", "too old (found version 12040)", "nvidia-smi")


def test_gpus_that_are_hidden(tmp_path: Path) -> None:
    gpu_machine(tmp_path, available="return False")
    ran = gpu_doctor(tmp_path, CUDA_VISIBLE_DEVICES="")
    one_problem(ran, "gpu", "CUDA_VISIBLE_DEVICES=''", "unset it")


def test_gpus_of_another_generation(tmp_path: Path) -> None:
    gpu_machine(tmp_path, capability=(12, 0))
    one_problem(gpu_doctor(tmp_path), "extension", "80,90", "sm_120", "CUDA_ARCHS in setup.py")


def test_a_gpu_that_is_taken(tmp_path: Path) -> None:
    gpu_machine(tmp_path, free=30)
    status, lines, _ = gpu_doctor(tmp_path)
    assert status == OK and lines["gpu"].startswith("note ") and "38%" in lines["gpu"]


def test_a_cudnn_too_old_for_te(tmp_path: Path) -> None:
    gpu_machine(tmp_path, cudnn=91002)
    one_problem(gpu_doctor(tmp_path), "te", "cuDNN 91002", "91200 or newer")


def test_the_bare_metapackage_of_te(tmp_path: Path) -> None:
    """`pip install transformer-engine` brings Python without core and bindings."""
    gpu_machine(tmp_path)
    said = "raise FileNotFoundError('Could not find shared object file for core lib.')"
    write_package(tmp_path, "transformer_engine", said)
    for name in ("transformer_engine_cu13", "transformer_engine_torch"):
        shutil.rmtree(tmp_path / f"{name}-2.20.2.dist-info")
    says = ("Could not find shared object", "without its core and transformer_engine_torch")
    for target in ("gpu", "cpu"):  # megatron-core does not import either, on any machine
        ran = run_doctor(tmp_path, "--for", target, "--only", GPU_ROWS)
        one_problem(ran, "te", *says, "pip uninstall transformer_engine")
        assert ran[1]["megatron-core"].startswith("note does not import while te does not")


def test_te_that_crashes(tmp_path: Path) -> None:
    gpu_machine(tmp_path)
    write_package(tmp_path, "transformer_engine.pytorch", SEGFAULT)
    one_problem(gpu_doctor(tmp_path), "te", "SIGSEGV")


def test_apex_of_the_index(tmp_path: Path) -> None:
    gpu_machine(tmp_path)
    write_package(tmp_path, "apex", "raise ImportError('a web framework')")
    write_metadata(tmp_path, "apex", "0.9.10")
    one_problem(gpu_doctor(tmp_path), "apex", "0.9.10", "not NVIDIA's", "pip uninstall apex")


def test_an_apex_that_does_not_import(tmp_path: Path) -> None:
    gpu_machine(tmp_path)
    write_package(tmp_path, "apex", "raise RuntimeError('amp_C was built for another torch')")
    write_package(tmp_path, "apex.multi_tensor_apply", "")
    ran = gpu_doctor(tmp_path)
    one_problem(ran, "apex", "amp_C was built for another torch", "pip uninstall apex")
    assert "while apex does not" in ran[1]["megatron-core"]


def test_vllm_for_another_torch(tmp_path: Path) -> None:
    gpu_machine(tmp_path, version="2.12.0")
    ran = gpu_doctor(tmp_path)
    one_problem(ran, "vllm", "vllm 0.32.0 for torch==2.13.0, and torch 2.12.0")


def test_vllm_that_does_not_import(tmp_path: Path) -> None:
    gpu_machine(tmp_path)
    write_package(tmp_path, "vllm", "raise ImportError('_C.so: undefined symbol: _ZN3c10')")
    one_problem(gpu_doctor(tmp_path), "vllm", "undefined symbol", "rollout.engine=server")


@needs_bare
def test_no_vllm(tmp_path: Path) -> None:
    write_package(tmp_path, "torch", cuda_torch())
    asked = ("--for", "cpu", "--only", "vllm")
    one_problem(run_doctor(tmp_path, *asked, bare=True), "vllm", "got nothing", "make engine")
    status, lines, _ = run_doctor(tmp_path, *asked, "--engine", "server", bare=True)
    assert status == OK and lines["vllm"].startswith("ok not installed")


def test_a_torch_for_cpus_on_a_gpu_machine(tmp_path: Path) -> None:
    source = cuda_torch(available="return False", version="2.13.0+cpu")
    write_package(tmp_path, "torch", source.replace('cuda="13.0"', "cuda=None"))
    ran = run_doctor(tmp_path, "--for", "gpu", "--only", "torch,gpu,nccl,nvcc")
    one_problem(ran, "torch", "2.13.0+cpu, built without CUDA", "docs/guide/installing.md")


@pytest.mark.parametrize("part", ["gpu", "nvcc", "extension,variables"])
def test_a_part_that_cannot_be_tried_is_not_taken_for_sound(part: str, tmp_path: Path) -> None:
    """Asked for that part alone, the doctor shows the fault of torch too, and its exit status."""
    source = cuda_torch(available="return False", version="2.13.0+cpu")
    write_package(tmp_path, "torch", source.replace('cuda="13.0"', "cuda=None"))
    if part.startswith("extension"):
        write_package(tmp_path, "torch", "raise ImportError('broken')")
    status, lines, _ = run_doctor(tmp_path, "--for", "gpu", "--only", part)
    assert status == MISTAKE and lines["torch"].startswith("problem got "), lines
    assert lines[part.split(",")[0]].startswith("note not tried, because torch")


EXTENSIONS = {
    "of another Python": (
        "_C.cpython-39-x86_64-linux-gnu.so",
        "",
        "only _C.cpython-39-x86_64-linux-gnu.so",
    ),
    "torn": (f"_C.{sysconfig.get_config_var('SOABI')}.so", "torn", "file too short"),
    "for another torch": (
        "_C.py",
        "raise ImportError('_C.so: undefined symbol: _ZN2at')",
        "it was built for another torch",
    ),
    "without CUDA": (
        "_C.py",
        "def build_info(): return {'isa': 'avx2', 'cuda_archs': ''}",
        "without CUDA kernels",
    ),
    "of an older version": ("_C.py", "def build_info(): return {}", "KeyError"),
}


@needs_bare
@pytest.mark.parametrize("name", ["not built", *EXTENSIONS])
def test_an_extension_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    gpu_machine(tmp_path)
    folder = tmp_path / "megatron_vopd"
    (folder / "_C.py").unlink()
    says = "no extension for cpython"
    if name in EXTENSIONS:
        file, text, says = EXTENSIONS[name]
        (folder / file).write_text(text)
    ran = gpu_doctor(tmp_path, bare=True)
    one_problem(ran, "extension", says, "" if says == "KeyError" else "MEGATRON_VOPD_CUDA=1 pip")


def test_a_dependency_of_another_version(tmp_path: Path) -> None:
    write_metadata(tmp_path, "transformers", "4.9.0")
    ran = run_doctor(tmp_path, "--only", "package")
    one_problem(ran, "package", "transformers 4.9.0 (<5.20,>=5.16.1)", "pip install")


def test_a_torch_of_another_version(tmp_path: Path) -> None:
    write_package(tmp_path, "torch", cuda_torch(version="2.14.1"))
    status, lines, _ = run_doctor(tmp_path, "--for", "cpu", "--only", "torch")
    assert (status, lines["torch"]) == (OK, "note 2.14.1, CUDA 13.0, tested with 2.13.0")


INTERFACES = [
    ("GLOO_SOCKET_IFNAME", "eth99", "problem"),
    ("NCCL_SOCKET_IFNAME", "eth99,ib", "problem"),
    ("NCCL_SOCKET_IFNAME", "=l", "problem"),
    ("NCCL_SOCKET_IFNAME", "l", "ok"),
    ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
    ("GLOO_SOCKET_IFNAME", "lo", "ok"),
]


@pytest.mark.parametrize(("variable", "value", "state"), INTERFACES)
def test_interfaces(variable: str, value: str, state: str) -> None:
    facts = {"network": {"hostname": "h", "address": "10.0.0.7", "interfaces": ["lo", "eth0"]}}
    line = machine.network_line(Seen(True, "local", facts, {variable: value}))
    assert line.state == state, line
    if state == "ok":
        return
    assert line.text.startswith(f"got {variable}={value}, expected one of lo, eth0; ")


def test_an_interface_that_is_not_there(tmp_path: Path) -> None:
    ran = run_doctor(tmp_path, "--only", "network", variables={"GLOO_SOCKET_IFNAME": "eth99"})
    one_problem(ran, "network", "GLOO_SOCKET_IFNAME=eth99", "lo")


def test_a_hostname_that_does_not_resolve() -> None:
    facts = {"network": {"hostname": "node7", "address": "", "interfaces": ["lo"]}}
    line = machine.network_line(Seen(False, "local", facts, {}))
    assert line.state == "problem" and "hostname node7" in line.text
    named = Seen(False, "local", facts, {"GLOO_SOCKET_IFNAME": "lo"})
    assert machine.network_line(named).state == "ok"


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "first"},
        {"RANK": "", "WORLD_SIZE": "8"},
        {"RANK": "8", "WORLD_SIZE": "8"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "8", "MASTER_PORT": "tcp://10.0.0.1:29500"},
    ],
    ids=str,
)
def test_variables_of_ranks_that_make_no_sense(variables: dict[str, str], tmp_path: Path) -> None:
    line = machine.ranks_line(Seen(True, "local", {}, variables))
    assert line.state == "problem" and next(iter(variables)) in line.text and "unset" in line.text


def test_nonsense_in_the_environment(tmp_path: Path) -> None:
    variables = {"RANK": "nonsense", "WORLD_SIZE": "4"}
    ran = run_doctor(tmp_path, "--only", "ranks,apex", variables=variables)
    one_problem(ran, "ranks", "RANK=nonsense", "unset RANK WORLD_SIZE")


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_one_core_for_two_ranks(tmp_path: Path) -> None:
    write_package(tmp_path, "torch", cuda_torch())
    bound = ("taskset", "-c", "0")
    ran = run_doctor(tmp_path, "--for", "gpu", "--only", "cores", prefix=bound)
    one_problem(ran, "cores", "1 of ", "for 2 ranks", "--cpu-bind=none")


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(False, "local", {}, {})
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable:    1048576 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", meminfo)
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "none")
    line = machine.memory_line(seen)
    assert line.state == "problem" and line.text.startswith("got 1.0 GiB free, expected 5 GiB")
    meminfo.write_text("MemAvailable: 67108864 kB\n")
    assert machine.memory_line(seen).text == "64.0 GiB free"
    # A container of 3 GiB on that machine, of which 2 are used, 1 of them by files.
    (tmp_path / "none").mkdir()
    for name, text in (
        ("memory.max", f"{3 * 2**30}\n"),
        ("memory.current", f"{2 * 2**30}\n"),
        ("memory.stat", f"anon 1\ninactive_file {2**30}\n"),
    ):
        (tmp_path / "none" / name).write_text(text)
    line = machine.memory_line(seen)
    assert line.state == "problem" and "2.0 GiB free" in line.text


def test_shared_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(2**26, 0, 2**26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for judge, remedy in ((machine.shm_line, "--shm-size=16g"), (machine.disk_line, "run.dir")):
        line = judge(Seen(True, "local", {}, {}))
        assert line.state == "problem" and remedy in line.text


def test_settings_of_cuda() -> None:
    known = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    line = machine.settings_line(Seen(True, "local", {}, known))
    assert line.state == "note" and "expandable_segments" in line.text
    line = machine.settings_line(Seen(True, "local", {}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}))
    assert line.state == "note" and "CUDA_DEVICE_MAX_CONNECTIONS=8: unset it" in line.text
    for known in ({}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}):
        assert machine.settings_line(Seen(True, "local", {}, known)).state == "ok"


def test_this_environment_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    """The packages that run these tests, really imported."""
    parts = "python,torch,gpu,nccl,extension,megatron-core,transformers,network,settings"
    parts = parts.replace("settings", "variables")
    assert main(["doctor", "--for", "cpu", "--only", parts]) == OK, capsys.readouterr().out
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(parts.split(",")) + 1
    assert printed[-1].startswith("for tests and demo on a CPU: no problems, ")


def test_the_report_fits_one_screen_and_json_has_it_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(ROWS) + 1 <= 24
    monkeypatch.setenv("RANK", "x")
    assert main(["doctor", "--only", "python,ranks", "--json"]) == MISTAKE
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == MISTAKE and said["parts"]["python"]["state"] in ("ok", "note")
    assert said["parts"]["ranks"]["state"] == "problem"


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--only", "torhc"])
    assert caught.value.code == MISTAKE
    assert "got 'torhc', expected some of python, package" in capsys.readouterr().err


def test_a_line_that_fails_is_a_problem_of_its_own() -> None:
    _, lines = examine("cpu", "local", ("python", "ranks"))
    assert lines.keys() == {"python", "ranks"} and sys.executable in lines["python"].text
