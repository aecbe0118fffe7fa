"""The subcommands of `vopd`: which arguments each takes, in which order, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd import cli, train
from megatron_vopd.config import config_table_markdown
from megatron_vopd.demo import demo
from megatron_vopd.errors import MISTAKE, OK

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        (["check", "config.yaml", "--world-size=2", "train.steps=3", "--foo=1"], "--foo=1"),
        (["check", "--foo", "config.yaml"], "--foo"),
        (["report", "run", "another"], "another"),
        (["exit-code", "config.yaml", "--foo"], "--foo"),
        (["demo", "folder"], "folder"),
        (["config-table", "--csv"], "--csv"),
        (["bogus"], "bogus"),
        (["--bogus"], "--bogus"),
    ],
    ids=" ".join,
)
def test_an_unknown_argument_is_named(arguments: list[str], unknown: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == MISTAKE
    printed = capsys.readouterr()
    assert unknown in printed.err.splitlines()[-1] and printed.out == ""


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("demo --teacher-steps", "-1", "an integer >= 1"),
        ("demo --steps", "0", "an integer >= 1"),
        ("demo --steps", "1e3", "an integer >= 1"),
        ("demo --digits", "0", "an integer >= 1"),
        ("demo --seed", "-1", "an integer 0 to 4294967295"),
        ("demo --seed", "4294967296", "an integer 0 to 4294967295"),
        ("check x --world-size", "two", "an integer"),
        ("check x --gpu-memory", "-3", "a number above 0"),
        ("check x --gpu-memory", "nan", "a number above 0"),
        ("check x --gpu-memory", "much", "a number above 0"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_starts(
    option: str, value: str, expected: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_: pytest.fail("a demo was begun"))
    *words, name = option.split()
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, f"{name}={value}"])
    assert caught.value.code == MISTAKE
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"argument {name}: got '{value}', expected {expected}"), said


def test_without_a_command_there_is_help(capsys: Capture) -> None:
    assert cli.main([]) == MISTAKE
    printed = capsys.readouterr()
    assert printed.err.startswith("usage: vopd") and "vopd check CONFIG" in printed.err
    assert printed.out == ""


def test_the_table_is_printed(capsys: Capture) -> None:
    assert cli.main(["config-table"]) == OK
    assert capsys.readouterr().out == config_table_markdown()


def test_exit_code_takes_whatever_the_training_command_takes(
    tmp_path: Path, capsys: Capture
) -> None:
    """A launch script gives both the same arguments."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    options = set(re.findall(r"^ +(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert "--dry-run" in options
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"student": {"path": "a/b"}, "teacher": {"path": "a/c"}}))
    settings = ["data.train=a/d", f"run.dir={tmp_path}", "run.name=x"]
    given = [str(path), settings[0], *options, *settings[1:], "--clear"]
    assert cli.main(["exit-code", *given]) == OK, capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("before", "during"),
    [
        (signal.SIG_DFL, signal.default_int_handler),
        (signal.SIG_IGN, signal.SIG_IGN),
    ],
    ids=["interrupts", "ignored"],
)
def test_a_signal_interrupts_the_demo_unless_it_is_ignored(
    number: signal.Signals,
    before: signal.Handlers,
    during: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`nohup vopd demo` outlives its terminal."""
    seen = []

    def run_demo(*_: object) -> int:
        seen.append(signal.getsignal(number))
        return OK

    monkeypatch.setattr(demo, "run_demo", run_demo)
    kept = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(number, before)
    try:
        assert cli.main(["demo"]) == OK
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)
    assert seen == [during]
