"""The progress bar draws on a terminal and stays out of logs."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.run.terminal import progress_bar
from megatron_vopd.types import Prompt
from tests.support.scripted import ScriptedEngine


def _drawn(is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    engine = ScriptedEngine(50)
    engine.update_weights([], 1)
    with progress_bar("responses", console) as progress:
        progress(3, 8)
        engine.generate([Prompt("a", (1,))] * 4, Sampling(max_tokens=2, samples=2), progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bar_over_responses() -> None:
    assert "responses" in _drawn(True) and "8/8" in _drawn(True)
    assert _drawn(False).strip() == ""
