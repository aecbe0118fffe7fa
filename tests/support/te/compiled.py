"""A stand-in for TransformerEngine's compiled module, `transformer_engine_torch`.

`install` puts it into `sys.modules`, and then imports TransformerEngine. A capitalised name of the
module is an enumeration (or a class that nothing here makes), with whatever members are asked for;
every other name is a kernel: one of `kernels.KERNELS`, or one that refuses to be called.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any, cast

from tests.support.te import kernels, no_triton

NAME = "transformer_engine_torch"
# Answers to what TransformerEngine asks while it is imported or builds modules.
_ANSWERS: dict[str, Any] = {
    "get_cudnn_version": 91500,
    "get_cublasLt_version": 130000,
    "get_num_cublas_streams": 4,
}


class _Enumeration(type):
    """The type of enumerations: a member exists as soon as it is asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member: Any = int.__new__(cast(Any, cls), len(cls.__members__))
        member.name, member.value = name, int(member)
        setattr(cls, name, member)
        return member

    @property
    def __members__(cls) -> dict[str, Any]:
        return {name: value for name, value in vars(cls).items() if isinstance(value, cls)}


def _enumeration(name: str) -> type:
    return _Enumeration(name, (int,), {"__module__": NAME})


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{NAME}.{name}: no stand-in for this kernel")

    return refuse


def _counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def call(*arguments: Any, **options: Any) -> Any:
        kernels.called[kernel.__name__] += 1
        return kernel(*arguments, **options)

    return call


class _Compiled(ModuleType):
    """The module: names come into being when they are asked for."""

    # What `from transformer_engine_torch import *` hands on.
    __all__ = ("layernorm_fwd", "layernorm_bwd", "rmsnorm_fwd", "rmsnorm_bwd", *_ANSWERS)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _enumeration(name) if name[0].isupper() else _refusing(name)
        setattr(self, name, made)
        return made


def _backend_of(module: ModuleType) -> Callable[..., Any]:
    """Return a chooser of cuDNN's attention; older versions expect no reason beside it."""
    backend = module.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    is_old = tuple(map(int, version("transformer_engine").split(".")[:2])) < (2, 20)

    def get_fused_attn_backend(*_: Any, **__: Any) -> Any:
        return backend if is_old else (backend, "")

    return get_fused_attn_backend


def install() -> ModuleType:
    """Import TransformerEngine over the stand-in, and return the stand-in.

    TransformerEngine's Python must be on the path (tools/install_te.py puts it into a folder).
    """
    if NAME in sys.modules:
        return sys.modules[NAME]
    # TransformerEngine then opens none of the shared libraries that its compiled part needs.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    module = _Compiled(NAME)
    for name, answer in _ANSWERS.items():
        setattr(module, name, lambda answer=answer: answer)
    for kernel in kernels.KERNELS:
        setattr(module, kernel.__name__, _counted(kernel))
    module.get_fused_attn_backend = _counted(_backend_of(module))  # type: ignore[attr-defined]
    sys.modules[NAME] = module
    no_triton.install()

    from transformer_engine import common  # pyright: ignore[reportMissingImports]

    common.load_framework_extension = lambda _framework: None
    import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]

    return module
