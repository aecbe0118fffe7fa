"""Bars draw on a terminal and stay out of logs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.run import terminal
from megatron_vopd.run.terminal import PhaseBars, counting_bar
from megatron_vopd.types import Prompt
from tests.support.scripted import ScriptedEngine


def _drawn(is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    engine = ScriptedEngine(50)
    engine.update_weights([], 1)
    with counting_bar("responses", console) as progress:
        progress(3, 8)
        engine.generate([Prompt("a", (1,))] * 4, Sampling(max_tokens=2, samples=2), progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bar_over_responses() -> None:
    assert "responses" in _drawn(True) and "8/8" in _drawn(True)
    assert _drawn(False).strip() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "is_first", "is_drawn"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
)
def test_bars_of_phases_are_the_first_ranks_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO, is_first: bool, is_drawn: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setattr(terminal, "is_first_rank", lambda: is_first)
    with PhaseBars() as bars:
        for phase, total in (("reading", 2048), ("nothing", 0)):
            count = bars.begin(phase, total)
            count(total // 2)
            count(total - total // 2)
    text = out.getvalue()
    assert ("reading" in text and "2.0/2.0 KiB" in text and "nothing" in text) == is_drawn
    assert bool(text) == is_drawn
