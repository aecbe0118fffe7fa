"""The command-line tools, called in this process as a user's shell would."""

from __future__ import annotations

import functools
import importlib.util
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from types import ModuleType

from tests.support import ROOT

TOOLS = ROOT / "tools"


@dataclass(frozen=True)
class Ran:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


@functools.cache
def load_tool(name: str) -> ModuleType:
    """Import tools/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)  # where pydantic looks up names of annotations
    spec.loader.exec_module(module)
    return module


def reuse_groups() -> None:
    """Let several runs of tools in one process share the groups of a layout."""
    from megatron_vopd.megatron import groups

    if not hasattr(groups.student_groups, "cache_clear"):
        groups.student_groups = functools.cache(groups.student_groups)  # type: ignore[assignment]


def run(name: str, *arguments: object) -> Ran:
    """Run a tool's `main` in this process, which must be a rank of a world."""
    reuse_groups()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = load_tool(name).main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
    return Ran(status, out.getvalue(), err.getvalue())
