"""Every example against the facts of its models: no problem, and memory that a GPU has."""

from __future__ import annotations

import pytest

from megatron_vopd.cli import main
from megatron_vopd.config.world import layouts
from megatron_vopd.hf.folder import read_model_folder
from megatron_vopd.preflight.memory import Machine, estimate
from tests.support import ROOT
from tests.support.examples import EXAMPLES, example, local_models

# What the estimate leaves out on a GPU must find room too.
USABLE = 0.9 * 80e9


def test_none_is_left_out() -> None:
    folders = {path.parent.name for path in (ROOT / "examples").glob("*/config.yaml")}
    assert folders == EXAMPLES.keys()


@pytest.mark.parametrize(("name", "ranks"), EXAMPLES.items())
def test_it_passes_the_check_and_fits(
    name: str, ranks: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path, local = str(ROOT / "examples" / name / "config.yaml"), local_models(name)
    config = example(name)
    assert main(["check", path, "--world-size", str(ranks), *local]) == 0
    output = capsys.readouterr()
    assert "no problems found" in output.out and not output.err
    assert "not checked" not in output.out and "note: memory" not in output.out
    # A GPU of a quarter of the size has not enough, and the notice says so.
    assert main(["check", path, "--world-size", str(ranks), *local, "--gpu-memory", "20"]) == 0
    assert "note: memory: rank " in capsys.readouterr().out

    facts = {key: read_model_folder(path).facts for key, path in config.model_paths.items()}
    kind = "local" if config.parallel.backend == "local" else "te"
    memory = estimate(config, facts, layouts(config, ranks), Machine(kind, 80e9))
    assert len(memory) == ranks
    assert max(one.peak for one in memory) <= USABLE
