"""A training command as a child, over stand-ins for torchrun; real ones are in other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.config import load_config
from megatron_vopd.run import launch
from megatron_vopd.run.folder import STATUS_NAME, locked, step_dir
from megatron_vopd.run.launch import Launch, remove_unsaved, started, steps_done

CONFIG = Path(__file__).parents[3] / "examples" / "math_qwen3_1.7b" / "config.yaml"
# Prints what it was given: arguments and variables.
ECHO = """
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
"""
# A launcher and a rank in a session of its own, as torchrun starts it. Neither heeds SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(60)
"""
# One that saves when it is asked to stop.
SAVING = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(launch, "TORCHRUN", (sys.executable, "-c", code))


def is_alive(pid: int) -> bool:
    """Return whether it still runs; one that nobody has waited for yet does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def echoed(made: Launch) -> tuple[list[str], dict[str, str]]:
    with started(made, subprocess.PIPE) as process:
        assert process.stdout is not None
        arguments, variables = json.loads(process.stdout.read())
    return arguments, variables


def test_the_caller_asks_before_the_shell_and_the_shell_before_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, ECHO)
    asked = {"TOKENIZERS_PARALLELISM": "asked", "ONLY_ASKED": "asked"}
    for name in launch.ONE_MACHINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "inherited")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "inherited")
    monkeypatch.setenv("ONLY_INHERITED", "inherited")
    _, variables = echoed(Launch(CONFIG, (), 1, tmp_path / "run", asked))
    assert {name: variables[name] for name in (*launch.ONE_MACHINE, *asked, "ONLY_INHERITED")} == {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "inherited",
        "TOKENIZERS_PARALLELISM": "asked",
        "ONLY_ASKED": "asked",
        "ONLY_INHERITED": "inherited",
    }


def test_the_command_names_ranks_configuration_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, ECHO)
    overrides = ("train.steps=7", "run.name=other")
    arguments, _ = echoed(Launch(CONFIG, overrides, 4, tmp_path / "runs" / "a"))
    assert arguments[:5] == ["--nproc-per-node", "4", "-m", "megatron_vopd.train", str(CONFIG)]
    config = load_config(arguments[4], arguments[5:])
    assert (config.run.dir, config.run.name) == (str(tmp_path / "runs"), "a"), "its own come last"
    assert config.train.steps == 7


def test_a_block_that_fails_lets_the_ranks_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, SAVING)
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ZeroDivisionError),
        started(Launch(CONFIG, (), 1, tmp_path / "run"), subprocess.PIPE) as process,
    ):
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        raise ZeroDivisionError
    assert process.returncode == 0 and (tmp_path / "saved").exists()


def test_ranks_that_do_not_end_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's end alone would leave them: they are in sessions of their own."""
    stand_in(monkeypatch, STUBBORN)
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.1)
    with started(Launch(CONFIG, (), 1, tmp_path / "run"), subprocess.PIPE) as process:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        assert is_alive(rank) and os.getsid(rank) == rank
    assert process.returncode == -9 and until_gone(rank)


class TestRemoval:
    """What an earlier start left, and may not be resumed."""

    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        return folder

    def test_a_run_without_a_checkpoint_is_removed_before_the_start(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(monkeypatch, f"import os; print(os.path.exists({str(run_dir)!r}))")
        with started(Launch(CONFIG, (), 1, run_dir), subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.read() == "False\n"

    def test_a_run_with_a_checkpoint_stays(self, run_dir: Path) -> None:
        step_dir(run_dir, 1).mkdir(parents=True)
        remove_unsaved(run_dir)
        assert (run_dir / "metrics.jsonl").exists()

    def test_a_run_that_is_going_on_stays(self, run_dir: Path) -> None:
        with locked(run_dir):
            remove_unsaved(run_dir)
        assert (run_dir / "metrics.jsonl").exists()

    def test_what_is_of_no_run_stays(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("my life's work")
        remove_unsaved(tmp_path)
        assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reason": "done", "step": 3}', 3),
        ('{"reason": "done", "step": 0}', 0),
        ('{"reason": "preempted", "step": 3}', None),
        ('{"reason": "done"}', None),
        ('["done", 3]', None),
        ('{"reason": "do', None),
        (None, None),
    ],
)
def test_steps_of_a_run_that_is_done(tmp_path: Path, text: Any, expected: int | None) -> None:
    if text is not None:
        (tmp_path / STATUS_NAME).write_text(text)
    assert steps_done(tmp_path) == expected
