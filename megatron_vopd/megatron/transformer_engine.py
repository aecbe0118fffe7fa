"""TransformerEngine as it is installed here, tried by importing it.

Its metapackage alone, a build for another CUDA or torch, a cuDNN that is too old: all of them look
installed and fail on import, often with another error than ImportError. megatron-core expects no
other, so that a broken TransformerEngine keeps even the local layers from being imported.
`hide_if_broken` runs before megatron-core is imported and lets it see none; the layer spec is then
chosen by what `found` says (`run.start.resolved_layer_spec`).
"""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

PACKAGE = "transformer_engine"
# Tested at both ends (tests/distributed/megatron/test_transformer_engine.py); newer is not refused.
OLDEST, NEWEST = "2.9.0", "2.20.2"
# Modules of it from which megatron-core imports without a guard.
_NEEDED = ("pytorch", "pytorch.fp8", "pytorch.tensor", "pytorch.optimizers")
_LONGEST_MESSAGE = 240


@dataclass(frozen=True)
class TransformerEngine:
    """The TransformerEngine of this Python.

    Attributes:
        version: as installed; None: not installed.
        problem: why it cannot be used, one line; None: it can be, or there is none.
    """

    version: str | None
    problem: str | None

    @property
    def is_usable(self) -> bool:
        """True where it is installed and imports."""
        return self.version is not None and self.problem is None


@functools.cache
def found() -> TransformerEngine:
    """Import TransformerEngine once, if it is installed, and say how that went.

    It takes seconds where it works, and nothing where it is not installed. Whether megatron-core
    can use what imports is another question: `megatron_problem`.
    """
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return TransformerEngine(None, None)
    if Version(installed) < Version(OLDEST):
        return TransformerEngine(installed, f"it is older than {OLDEST}")
    problems = (import_problem(f"{PACKAGE}.{module}") for module in _NEEDED)
    return TransformerEngine(installed, next(filter(None, problems), None))


def import_problem(module: str) -> str | None:
    """Import a module that may be missing or broken; return why it fails, on one line, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # packages check themselves with asserts, OSErrors, RuntimeErrors
        text = " ".join(str(error).split()).encode("ascii", "backslashreplace").decode("ascii")
        if len(text) > _LONGEST_MESSAGE:
            text = text[: _LONGEST_MESSAGE - 3] + "..."
        return f"{type(error).__name__}: {text}"
    return None


def hide_if_broken() -> None:
    """Let megatron-core be imported without a TransformerEngine that cannot be used.

    Called before the first import of megatron-core. Where TransformerEngine works or is not
    installed, nothing changes.
    """
    if found().problem is None:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.modules[PACKAGE] = None  # pyright: ignore[reportArgumentType]  (imports raise ImportError)


def megatron_problem() -> str | None:
    """Return why megatron-core makes no layers of a TransformerEngine that imports, or None."""
    from megatron.core.models.gpt import gpt_layer_specs

    if gpt_layer_specs.HAVE_TE:
        return None
    problem = import_problem("megatron.core.extensions.transformer_engine_spec_provider")
    reason = problem or "it lacks what megatron-core's layers are made of"
    return f"megatron-core {version('megatron-core')} makes no layers of it ({reason})"
