"""The layer spec of a run beside every kind of TransformerEngine, and what refuses a broken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.errors import ConfigError
from megatron_vopd.megatron import transformer_engine
from megatron_vopd.megatron.transformer_engine import NEWEST, OLDEST, TransformerEngine
from megatron_vopd.run.start import resolved_layer_spec
from tests.support import ROOT
from tests.support.te.states import ASKED, write_package
from tests.support.te.worlds import python_path, spawn

LIBRARY = "libcudart.so.13: cannot open shared object file: No such file or directory"
EXPECTED = f"expected TransformerEngine {OLDEST} or newer"


def _run(*arguments: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("te")
    folders = {
        "metapackage": Path(python_path(NEWEST)[0]),
        "old": write_package(root / "old", "1.13.0", ""),
        "broken": write_package(root / "broken", "2.15.0", f"raise OSError({LIBRARY!r})"),
        "useless": write_package(root / "useless", "2.15.0", ""),
    }
    lines = _run("tests.support.te.states", *map(str, folders.values())).splitlines()
    return dict(zip(folders, map(json.loads, lines), strict=True))


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "found", lambda: TransformerEngine(None, None))
    found = {resolved_layer_spec(*asked) for asked in ASKED if asked[0] != "te"}
    assert found == {"local"}
    with pytest.raises(ConfigError) as error:
        resolved_layer_spec("te", "cuda")
    line = "parallel.backend: got te, but TransformerEngine is not installed, "
    assert str(error.value) == line + f"{EXPECTED}; set parallel.backend=local"


@pytest.mark.parametrize(
    ("state", "version", "reason"),
    [
        ("metapackage", NEWEST, "RuntimeError: Found empty `transformer-engine` meta package"),
        ("old", "1.13.0", f"it is older than {OLDEST}"),
        ("broken", "2.15.0", f"OSError: {LIBRARY}"),
        (
            "useless",
            "2.15.0",
            "ModuleNotFoundError: No module named 'transformer_engine.pytorch.fp8'",
        ),
    ],
)
def test_one_that_cannot_be_used(
    state: str, version: str, reason: str, answers: dict[str, Any]
) -> None:
    """It is refused where a GPU would use it, by one line; local layers work beside it."""
    found = answers[state]
    assert found["auto cpu"] == found["local cpu"] == found["local cuda"] == "local"
    assert found["te cpu"].startswith("parallel.backend: got te, expected a GPU")
    for asked in ("auto", "te"):
        line = found[f"{asked} cuda"]
        start = f"parallel.backend: got {asked}, but TransformerEngine {version} cannot be used: "
        assert line.startswith(start) and "\n" not in line and len(line) < 500
        assert reason in line and EXPECTED in line
        assert line.endswith("install it again, or set parallel.backend=local")


def test_a_broken_one_does_not_keep_the_commands_from_starting() -> None:
    """megatron-core would raise what TransformerEngine raises, whatever the configuration says."""
    path = os.pathsep.join([python_path(NEWEST)[0], str(ROOT)])
    assert "--dry-run" in _run("megatron_vopd.train", "--help", PYTHONPATH=path)


def _usable() -> tuple[Any, ...]:
    from megatron_vopd.megatron.transformer_engine import found, hide_if_broken
    from megatron_vopd.run.start import resolved_layer_spec

    hide_if_broken()
    return found(), resolved_layer_spec("auto", "cuda"), resolved_layer_spec("te", "cuda")


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_one_that_works_is_used(version: str) -> None:
    engine, automatic, asked = spawn(version, _usable, 1)[0]
    assert engine.is_usable and engine.version == version
    assert automatic == asked == "te"


def _without_layers() -> str:
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_vopd.errors import UserError
    from megatron_vopd.run.start import resolved_layer_spec

    gpt_layer_specs.HAVE_TE = False
    try:
        return resolved_layer_spec("auto", "cuda")
    except UserError as error:
        return str(error)


def test_one_that_megatron_core_takes_no_layers_from() -> None:
    line = spawn(NEWEST, _without_layers, 1)[0]
    assert "makes no layers of it" in line and line.endswith("or set parallel.backend=local")


def test_the_tests_name_what_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.support.te.worlds.WHEELS", tmp_path)
    with pytest.raises(AssertionError, match="run: make install"):
        python_path(NEWEST)
