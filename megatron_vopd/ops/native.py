"""The choice of kernels: `impl` is resolved here, once, and what is missing raises.

``auto`` takes the compiled kernels of the tensor's device (fp32 and bf16) and the reference for
fp64, which only the reference computes. An implementation asked for by name is never replaced.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from megatron_vopd.ops import reference

Impl = Literal["auto", "cpu", "cuda", "reference"]
IMPLS = ("auto", "cpu", "cuda", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
OPERATORS = (
    "local_stats",
    "merge_stats",
    "merge_topk",
    "logits_gradient",
    "logits_gradient_",
    "logits_gradient_narrow_",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operator; the signatures are those of `ops.reference`.

    `logits_gradient_narrow_` has no compiled twin on the CPU, where no product takes its result.
    """

    name: str
    local_stats: Callable
    merge_stats: Callable
    merge_topk: Callable
    logits_gradient: Callable
    logits_gradient_: Callable
    logits_gradient_narrow_: Callable


@functools.cache
def extension() -> ModuleType | None:
    """Return the compiled module, or None where it was not built (only the reference exists)."""
    try:
        module = importlib.import_module("megatron_vopd._C")
    except ModuleNotFoundError:
        return None
    importlib.import_module("megatron_vopd.ops.fake")
    return module


def build_info() -> dict[str, str]:
    """Return `isa` in use, `detected_isa`, `cuda_archs` ("" without CUDA) and `compiler`.

    Raises:
        ValueError: the extension is not built.
    """
    module = extension()
    if module is None:
        raise ValueError(f"the extension is not built; {BUILD_REMEDY}")
    return module.build_info()


BUILD_REMEDY = "build it with `pip install --no-build-isolation -e .`"


def _why_missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the compiled kernels `name` (cpu, cuda) cannot take such logits, else None."""
    module = extension()
    if module is None:
        return f"the extension is not built; {BUILD_REMEDY}"
    if device.type != name:
        return f"the tensors are on {device.type}; move them, or use impl='auto'"
    if name == "cuda" and not module.build_info()["cuda_archs"]:
        return "the extension was built without CUDA; rebuild with MEGATRON_VOPD_CUDA=1"
    if dtype not in NATIVE_DTYPES:
        return f"the logits are {dtype}; cast to float32, or use impl='reference'"
    return None


@functools.cache
def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the kernels for logits of `dtype` on `device`; logged once per distinct request.

    Raises:
        ValueError: `impl` is unknown, or names an implementation that is missing here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    name = impl
    if impl == "auto":
        name = "reference" if dtype == torch.float64 else device.type
    if name not in IMPLS:
        raise ValueError(f"impl: no kernels for device {device.type}; use impl='reference'")
    if name == "reference":
        source = reference
    else:
        reason = _why_missing(name, device, dtype)
        if reason:
            raise ValueError(f"impl: {name!r} is not available: {reason}")
        source = torch.ops.megatron_vopd
    logger.info("distillation kernels for %s on %s: %s", dtype, device, name)
    return Kernels(name, *(getattr(source, operator) for operator in OPERATORS))
