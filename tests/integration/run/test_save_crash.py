"""C1, C2: a save that ends at any of its file operations loses no checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.resumable import VOCAB
from tests.support.tiny_models import TinyModel

SMALL = TinyModel("qwen3", True, VOCAB, overrides=(("num_hidden_layers", 1),))


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario",
    ["new-kill", "new-torn", "new-fail", "again-kill", "again-fail", "damaged-kill"],
)
def test_every_file_operation_of_a_save(scenario: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "runs").mkdir()
    SMALL.save(tmp_path / "models")
    module = "tests.support.save_crash_points"
    command = [sys.executable, "-m", module, tmp_path / "models", tmp_path / "runs", scenario]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)[scenario]
    print(f"\n{scenario}: {found['points']} points, newest afterwards: {found['newest']}")
    assert found["points"] >= (4 if scenario.startswith("again") else 30)
    assert not found["unseen"], "an operation on the run folder that the enumeration does not see"
    assert not found["problems"]
    if not scenario.startswith("again"):
        assert found["newest"].keys() == {"step_1", "step_2"}
