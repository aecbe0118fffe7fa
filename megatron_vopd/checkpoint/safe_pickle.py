"""Reading pickles without running anything: names become inert stand-ins.

A pickle may call whatever it names. Here a name on the caller's list becomes a fresh class that
only keeps its arguments and its state; any other name is refused. No class of torch or of
megatron-core is ever made, so a hostile file has nothing to call and nothing to alter.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
from typing import Any, BinaryIO

# What unpickling damaged or hostile bytes raises; all of it means: not a readable file.
_FAILURES = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)


class PickleRefusedError(ValueError):
    """A pickle that names what it must not, or that cannot be read."""


class Inert:
    """A stand-in for an object: `name` is its class or function, `args` and `state` its content."""

    name = ""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, key: str) -> Any:
        """Return a field of a dataclass that was pickled by its dictionary."""
        if not isinstance(self.state, dict) or key not in self.state:
            raise PickleRefusedError(f"{self.name} has no {key}")
        return self.state[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allowed: Collection[str]) -> None:
        super().__init__(file)
        self._allowed = allowed
        self._made: dict[str, type[Inert]] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in self._allowed:
            raise PickleRefusedError(f"names {name}, which is not on the list of harmless names")
        if name not in self._made:
            self._made[name] = type("Inert", (Inert,), {"name": name})
        return self._made[name]

    def persistent_load(self, pid: Any, /) -> Any:
        return pid


def read_inert(file: BinaryIO, allowed: Collection[str]) -> Any:
    """Read the pickled object, every name in it replaced by an `Inert` class.

    Args:
        allowed: `module.name` of everything that may be named.

    Raises:
        PickleRefusedError: another name, or bytes that are no pickle.
    """
    try:
        return _Unpickler(file, allowed).load()
    except PickleRefusedError:
        raise
    except _FAILURES as error:
        raise PickleRefusedError(f"not a readable pickle ({type(error).__name__})") from None


def is_inert(value: Any, name: str) -> bool:
    """Return whether `value` stands for an object made by `name`."""
    return isinstance(value, Inert) and value.name == name


def is_named(value: Any, name: str) -> bool:
    """Return whether `value` stands for the class or constant `name` itself."""
    return isinstance(value, type) and issubclass(value, Inert) and value.name == name
