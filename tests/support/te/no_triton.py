"""A stand-in for triton, where it is not installed: TransformerEngine's kernels are only defined.

torch for CPUs comes without triton. TransformerEngine imports it to decorate kernels that run on a
GPU; none of them is called in the tests.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

_MODULES = ("triton", "triton.language", "triton.language.core", "triton.language.standard")


class _Anything(ModuleType):
    """A module whose names are all it again; as a decorator it leaves the function as it is."""

    __path__: Any = ()
    __version__ = "3.6.0"  # of torch 2.11; TransformerEngine chooses by it how a kernel is written

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", self)

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        is_decorator = len(arguments) == 1 and isinstance(arguments[0], FunctionType)
        return arguments[0] if is_decorator else self


def install() -> None:
    """Let `import triton` succeed in this process; nothing changes where triton is installed."""
    if "triton" not in sys.modules and find_spec("triton") is None:
        # torch asks for triton while its compiler is imported, and remembers that there is none.
        import torch._dynamo  # noqa: F401

        sys.modules.update({name: _Anything(name) for name in _MODULES})
