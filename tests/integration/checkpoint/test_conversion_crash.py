"""H5: a conversion that ends at any of its file operations leaves no output or all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.harness import spawn
from tests.support.tiny_models import TinyModel, add_tokenizer
from tests.support.tools import run

SMALL = TinyModel("qwen3", True, 40, overrides=(("num_hidden_layers", 1),))


def _convert(source: Path, out: Path) -> None:
    ran = run("convert_hf_to_megatron", source, out)
    assert ran.status == 0, ran.err


def _strike(tool: str, source: Path, root: Path, modes: tuple[str, ...]) -> dict:
    root.mkdir()
    command = [sys.executable, "-m", "tests.support.crash_points", tool, str(source), str(root)]
    done = subprocess.run([*command, *modes], cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.mark.parametrize(
    "modes",
    [("kill",), pytest.param(("torn", "fail"), marks=pytest.mark.slow)],
    ids=["killed", "torn-and-failing"],
)
@pytest.mark.parametrize("tool", ["convert_hf_to_megatron", "convert_megatron_to_hf"])
def test_every_file_operation(tool: str, modes: tuple[str, ...], tmp_path: Path) -> None:
    source = add_tokenizer(SMALL.save(tmp_path), 30)
    if tool == "convert_megatron_to_hf":
        spawn(_convert, 1, source, tmp_path / "meg")
        source = tmp_path / "meg"
    for mode, found in _strike(tool, source, tmp_path / "runs", modes).items():
        print(f"\n{tool} {mode}: {found['points']} points, {found['states']}")
        assert not found["unseen"], "an operation on the output that the enumeration does not see"
        assert not found["problems"]
        assert found["states"].keys() <= {"absent", "complete"}
        # Only what follows the rename can leave the folder visible.
        assert found["states"]["absent"] >= found["points"] - 2
