"""The training step as a text."""

from __future__ import annotations

import ast
import inspect
import textwrap

from megatron_vopd.trainer import trainer


def test_the_step_reads_like_the_paper() -> None:
    """It has at most 20 statements, the docstring not counted; the file at most 350 lines."""
    source = textwrap.dedent(inspect.getsource(trainer.Trainer.train_step))
    function = ast.parse(source).body[0]
    statements = [n for n in ast.walk(function) if isinstance(n, ast.stmt)][2:]
    assert len(statements) <= 20
    assert len(inspect.getsource(trainer).splitlines()) <= 350
