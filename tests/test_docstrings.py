"""Docstrings are sentences: a function's begins with a verb, and none speaks a private idiom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCES = sorted([*(ROOT / "megatron_vopd").rglob("*.py"), *(ROOT / "tools").glob("*.py")])
VERBS = set((ROOT / "tests" / "support" / "verbs.txt").read_text().split())
NOT_A_START = ("Of ", "Those ", "Nothing", "The same ", "See ", "What ", "Whether ")
IDIOM = re.compile(r"\b(told|anew|goes on|go on|gone on|objections?)\b", re.IGNORECASE)


def documented(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Yield (module, class or function, its docstring) of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text


def is_property(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any("property" in ast.unparse(decorator) for decorator in decorators)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_are_sentences(path: Path) -> None:
    for node, text in documented(path):
        where = f"{getattr(node, 'name', 'module')}: {text.splitlines()[0]}"
        assert not text.startswith(NOT_A_START), where
        assert text.rstrip().endswith((".", ":", "`", '"', ")")) or "::" in text, where
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node):
            first = re.split(r"\W+", text.strip("(`"))[0]
            assert first.lower() in VERBS and first[0].isupper(), f"no verb first: {where}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_idiom(path: Path) -> None:
    found = IDIOM.findall(path.read_text())
    assert not found, found
