"""What a launch script ends with, for every way in which a run ends; the scripts themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_vopd.cli import main
from megatron_vopd.errors import UserError
from megatron_vopd.run import loop
from megatron_vopd.run.status import Status, write_status
from tests.support import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*/launch.*"))
CASES = {"done": 0, "preempted": 75, "do not requeue": 93, "crash": 1}


def write_config(folder: Path, name: str = "r") -> Path:
    settings = {
        "run": {"dir": str(folder / "runs"), "name": name},
        "student": {"path": "org/a"},
        "teacher": {"path": "org/b"},
        "data": {"train": "org/c"},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(("reason", "code"), CASES.items())
def test_each_reason_has_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: str, code: int
) -> None:
    config = write_config(tmp_path)
    run_dir = tmp_path / "runs" / "other"
    run_dir.mkdir(parents=True)
    write_status(run_dir, Status(reason, 7, "step_5", code in (1, 75)))  # pyright: ignore
    asked = ["exit-code", str(config), "--dry-run", "run.name=other"]
    assert main(asked) == code
    assert f"{reason} after step 7" in capsys.readouterr().err
    assert main([*asked, "--clear"]) == 0
    assert main(asked) == 1 and "not there" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"reason": "x", "step": 1}', '{"reason": []}'])
def test_a_status_that_no_run_wrote_is_a_crash(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "status.json").write_text(text)
    assert main(["exit-code", str(write_config(tmp_path))]) == 1


def test_a_mistake_in_the_configuration_is_not_started_again(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    for arguments in ([], ["--clear"]):
        assert main(["exit-code", str(path), "train.stepz=3", *arguments]) == 93
    assert main(["exit-code", str(tmp_path / "none.yaml")]) == 93


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (KeyboardInterrupt(), 75), (UserError("x"), 93), (RuntimeError("x"), 1)],
    ids=["done", "stopped before the first step", "mistake", "crash"],
)
def test_what_ends_a_run_is_what_the_script_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int
) -> None:
    monkeypatch.setattr(loop.dist, "get_rank", lambda: 0)
    run_dir = tmp_path / "runs" / "r"
    run_dir.mkdir(parents=True)
    with suppress(BaseException), loop.ending_noted(run_dir) as ending:
        ending.reason = "done"
        if error is not None:
            raise error
    assert main(["exit-code", str(write_config(tmp_path))]) == code


# Stand-ins on PATH: what they were called with goes to `calls`, in order. The status is a number.
VOPD = """#!/bin/bash
echo "vopd $*" >>calls
[ "$2" != --clear ] || { rm -f "$RUN/status.json"; exit; }
exit "$(cat "$RUN/status.json" || echo 1)"
"""
TORCHRUN = """#!/bin/bash
echo "torchrun $*" >>calls
trap 'echo "torchrun TERM" >>calls; echo "$AT_TERM" >"$RUN/status.json"; exit 1' TERM
mkdir -p "$RUN"
[ -z "$AT_ONCE" ] || { echo "$AT_ONCE" >"$RUN/status.json"; exit "${RC:-0}"; }
[ -z "$NOTHING" ] || exit 1
echo ready >>calls
while :; do sleep 0.05; done
"""
SRUN = """#!/bin/bash
echo "srun $*" >>calls
while [ "${1#-}" != "$1" ]; do shift; done
case $1 in *start.sh) trap 'exit 0' TERM; while :; do sleep 0.05; done ;; esac
echo $$ >step
exec "$@"
"""
# Slurm signals the step's processes, which is what `exec` above makes of torchrun.
SCANCEL = """#!/bin/bash
echo "scancel $*" >>calls
[ "$1" != --signal=TERM ] || kill -TERM "$(cat step)"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>calls
[ "$1" != show ] || printf 'node1\\nnode2\\n'
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Copy the examples, and write stand-ins for every program that they call."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "bin").mkdir()
    programs = {"vopd": VOPD, "torchrun": TORCHRUN, "srun": SRUN}
    for name, text in (programs | {"scancel": SCANCEL, "scontrol": SCONTROL}).items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(workplace: Path, script: Path, **variables: str) -> subprocess.Popen[str]:
    name = script.parent.name
    relative = str(script.relative_to(ROOT))
    model = ["./model"] if "32b" in name else []
    (workplace / "model").mkdir(exist_ok=True)
    inherited = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    environment = inherited | {
        "PATH": f"{workplace / 'bin'}:{os.environ['PATH']}",
        "RUN": f"runs/{name}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "8",
        "SLURM_CPUS_ON_NODE": "96",
        "SERVER_HEAD_START": "0.2",
    }
    return subprocess.Popen(
        ["bash", relative, *model],
        cwd=workplace,
        env=environment | {"AT_ONCE": "", "AT_TERM": "", "NOTHING": ""} | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> int:
    """Return its exit status; end servers that a stand-in leaves running with its session."""
    try:
        return process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def calls(workplace: Path) -> list[str]:
    return (workplace / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
class TestScripts:
    def test_it_is_bash_and_short(self, script: Path) -> None:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK)
        lines = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
        assert len(lines) <= 20
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", str(script)], check=True)

    def test_a_stop_is_passed_on_and_ends_with_75(self, workplace: Path, script: Path) -> None:
        process = start(workplace, script, AT_TERM="75")
        deadline = time.monotonic() + 60
        while not (workplace / "calls").exists() or "ready" not in calls(workplace):
            assert process.poll() is None and time.monotonic() < deadline, process.stdout
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert ended(process) == 75
        called = calls(workplace)
        first, last = (line for line in called if line.startswith("vopd exit-code"))
        assert "--clear" in first and last == first.replace("--clear ", "")
        assert called.count("torchrun TERM") == 1
        assert ("scontrol requeue 7" in called) == script.name.endswith("sbatch")

    def test_other_endings(self, workplace: Path, script: Path) -> None:
        # What an earlier start left must not speak for one that says nothing.
        run_dir = workplace / "runs" / script.parent.name
        run_dir.mkdir(parents=True)
        (run_dir / "status.json").write_text("75")
        assert ended(start(workplace, script, NOTHING="1")) == 1
        for code, returned in (("0", "0"), ("93", "1")):
            process = start(workplace, script, AT_ONCE=code, RC=returned)
            assert ended(process) == int(code)
        assert "scontrol requeue 7" not in calls(workplace)
