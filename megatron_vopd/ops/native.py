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
def _loaded() -> tuple[ModuleType | None, str]:
    """Import the compiled module; return it, or None and why there is none."""
    try:
        module = importlib.import_module("megatron_vopd._C")
    except ModuleNotFoundError:
        return None, f"the extension is not built; {BUILD_REMEDY}"
    except ImportError as error:  # compiled against another torch or Python, most often
        reason = " ".join(str(error).split())
        return None, f"the extension cannot be loaded ({reason}); {BUILD_REMEDY} again"
    importlib.import_module("megatron_vopd.ops.fake")
    return module, ""


def extension() -> ModuleType | None:
    """Return the compiled module, or None where it was not built or cannot be loaded."""
    return _loaded()[0]


def missing_kernels(device: str) -> str | None:
    """Return why there are no compiled kernels for `device` ("cpu", "cuda"); None: there are."""
    return _why_missing(device, torch.device(device), torch.float32)


def build_info() -> dict[str, str]:
    """Return `isa` in use, `detected_isa`, `cuda_archs` ("" without CUDA) and `compiler`.

    Raises:
        ValueError: the extension is not built, or cannot be loaded.
    """
    module, reason = _loaded()
    if module is None:
        raise ValueError(reason)
    return module.build_info()


BUILD_REMEDY = "build it with `pip install --no-build-isolation -e .`"


def _why_missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the compiled kernels `name` (cpu, cuda) cannot take such logits, else None."""
    module, reason = _loaded()
    if module is None:
        return reason
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
