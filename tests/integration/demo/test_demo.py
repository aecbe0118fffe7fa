"""`vopd demo` with all its stages, a few steps each: what it leaves, and its honesty."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vopd.demo import demo
from tests.support.engines import needs_vllm
from tests.support.runs import environment

pytestmark = [*needs_vllm, pytest.mark.timeout(1800)]

CODE = """
import sys
from pathlib import Path
from megatron_vopd.demo.demo import DemoSettings, run_demo
settings = DemoSettings(Path(sys.argv[1]), digits=2, num_training=600, num_evaluation=20,
                        teacher_steps=2, start_steps=2, steps=3, compare=True)
sys.exit(run_demo(settings))
"""


def _demo(out: Path) -> tuple[int, list[str]]:
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(out)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    print(run.stdout, run.stderr)
    return run.returncode, run.stdout.splitlines()


def test_all_stages_once_and_bars_that_are_not_met(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    status, lines = _demo(out)
    assert status == demo.FAILED, "nobody learns to add in two steps"
    marks = [line.split("  ")[0] for line in lines if line.startswith(("ok", "NOT MET"))]
    assert marks == ["NOT MET", "NOT MET", "NOT MET", "ok"], "the export is sound nevertheless"

    results = json.loads((out / demo.RESULTS_NAME).read_text())
    for name in ("vopd", "opd"):
        assert list(results["accuracies"][name]) == ["0", "3"]
        steps = [json.loads(x) for x in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps] == [0, 1, 2, 3]
        assert all(line["weight_sync/probe_gap"] <= 1e-4 for line in steps[1:])
        assert (out / name / "hf" / "step_3" / "model.safetensors").is_file()
    ratios = {
        name: json.loads((out / name / "metrics.jsonl").read_text().splitlines()[-1])[
            "variance/advantage_over_reward"
        ]
        for name in ("vopd", "opd")
    }
    assert ratios["opd"] == pytest.approx(1, abs=1e-6) and ratios["vopd"] < 1
    assert (out / demo.PLOT_NAME).read_bytes().startswith(b"\x89PNG")

    # Again: nothing is trained a second time, and the verdict is the same.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    status, lines = _demo(out)
    assert status == demo.FAILED and len(before) == 4
    assert sum(line.startswith("complete, ") for line in lines) == 6
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")} == before
