"""Import one package in a process of its own, and print what it is as one line of JSON.

Run as a file by `examine.probe`. A package that crashes the interpreter, never returns or ends
the process harms nobody here. Only the standard library is imported at the top: whatever else is
broken, this file starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MARK = "vopd-doctor: "
Facts = dict[str, Any]


def torch_facts() -> Facts:
    """Import torch; return versions, whether CUDA can be used and why not, and the GPUs."""
    torch = importlib.import_module("torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    reason = str(caught[-1].message) if caught else ""
    facts: Facts = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "has_gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        "has_cuda": has_cuda,
        "reason": reason.strip().partition("\n")[0],
        "gpus": [_gpu(torch, index) for index in range(torch.cuda.device_count() * has_cuda)],
    }
    if torch.version.cuda:
        facts["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def _gpu(torch: Any, index: int) -> Facts:
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return {"name": name, "capability": capability, "free": free, "total": total}


def megatron_facts() -> Facts:
    """Import megatron-core as far as the model builder does."""
    core = importlib.import_module("megatron.core")
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    return {"version": _version(core), "has_te": bool(getattr(specs, "HAVE_TE", False))}


def transformers_facts() -> Facts:
    """Import transformers, and torchvision where it is: one for another torch breaks it."""
    package = importlib.import_module("transformers")
    for name in ("AutoConfig", "AutoTokenizer"):
        getattr(package, name)
    if find_spec("torchvision") is not None:
        importlib.import_module("torchvision")
    return {"version": _version(package)}


def extension_facts() -> Facts:
    """Load the compiled kernels; return what they were built for."""
    importlib.import_module("torch")
    module = importlib.import_module("megatron_vopd._C")
    return dict(module.build_info())


def te_facts() -> Facts:
    """Import TransformerEngine's layers for torch."""
    if find_spec("transformer_engine") is None:
        return {"missing": True}
    package = importlib.import_module("transformer_engine")
    importlib.import_module("transformer_engine.pytorch")
    return {"version": _version(package)}


def apex_facts() -> Facts:
    """Import apex; `is_nvidia` tells the kernels from the index's project of the same name."""
    spec = find_spec("apex")
    if spec is None:
        return {"missing": True}
    folders = list(spec.submodule_search_locations or [])
    is_nvidia = any(Path(folder, "multi_tensor_apply").is_dir() for folder in folders)
    if is_nvidia:
        importlib.import_module("apex")
    fused = find_spec("fused_weight_gradient_mlp_cuda") is not None
    return {"is_nvidia": is_nvidia, "has_fused_gradient": fused}


def vllm_facts() -> Facts:
    """Import vLLM as far as the engine's process does before it reads a model."""
    if find_spec("vllm") is None:
        return {"missing": True}
    package = importlib.import_module("vllm")
    for name in ("LLM", "SamplingParams"):
        getattr(package, name)
    importlib.import_module("vllm.config")
    return {"version": _version(package)}


def network_facts() -> Facts:
    """Return this machine's interfaces, its name, and the address of that name ("": none)."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        address = ""
    interfaces = [interface for _, interface in socket.if_nameindex()]
    return {"hostname": name, "address": address, "interfaces": interfaces}


PROBES: dict[str, Callable[[], Facts]] = {
    "torch": torch_facts,
    "megatron-core": megatron_facts,
    "transformers": transformers_facts,
    "extension": extension_facts,
    "transformer-engine": te_facts,
    "apex": apex_facts,
    "vllm": vllm_facts,
    "network": network_facts,
}


def _version(package: Any) -> str:
    return str(getattr(package, "__version__", "of unknown version"))


def _said(error: BaseException) -> str:
    """Return kind and first line of an error; of an import error also what caused it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    cause = error.__cause__ or error.__context__
    return f"{text} (after {_said(cause)})" if isinstance(cause, ImportError) else text


def main(name: str) -> int:
    """Print the facts of the probe `name`, or `error`; return 0."""
    # A package that prints at import, or its C++, writes beside the answer and not into it.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Behind everything: a package that is installed, or set by PYTHONPATH, comes first.
    sys.path.append(str(Path(__file__).parents[3]))
    try:
        facts = PROBES[name]()
    except BaseException as error:  # SystemExit and KeyboardInterrupt of a package too
        facts = {"error": _said(error)}
    print(MARK + json.dumps(facts), file=answer, flush=True)
    # Not through the interpreter's end: a broken library may crash in its destructors.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
