"""The writers beside metrics.jsonl: TensorBoard events, W&B calls, lines and bars on a terminal."""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vopd.errors import UserError
from megatron_vopd.files.metrics_file import read_metrics
from megatron_vopd.run.log import MetricsWriter
from megatron_vopd.run.terminal import Eta

METRICS = {
    "reward/mean": -0.25,
    "kl/reverse": 0.5,
    "entropy/student": 1.25,
    "rollout/length_mean": 100.0,
    "curriculum/max_response_tokens": 128,
    "perf/tokens_per_second": 1234.5,
    "mismatch/kl": math.nan,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def writer(run_dir: Path, out: io.StringIO | None = None, **changes: Any) -> MetricsWriter:
    settings = {"tensorboard": False, "wandb": False, "console": out is not None, "total_steps": 10}
    return MetricsWriter(run_dir, **{**settings, **changes}, out=out)


def test_one_line_a_step_where_there_is_no_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with writer(tmp_path / "runs" / "a", out) as log:
        log.record(1, METRICS)
        log.say("checkpoint saved: [step_1]")
        log.record(2, {"eval/math/avg@8": 0.649, "eval/math/pass@8": 0.8})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith(
        "step 1/10  reward -0.2500  kl 0.5000  entropy 1.250  length 100.0  of 128  tokens/s 1234"
    )
    assert " eta 0:00:0" in lines[0]
    assert lines[1] == "checkpoint saved: [step_1]" and lines[2].startswith("step 2/10  eta")
    assert lines[3] == "evaluation at step 2  math/avg@8 0.649  math/pass@8 0.8"
    assert "\x1b" not in out.getvalue()
    assert [line["step"] for line in read_metrics(tmp_path / "runs/a/metrics.jsonl").lines] == [
        1,
        2,
    ]


def test_a_live_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    with writer(tmp_path, out, last_step=4) as log:
        log.record(5, METRICS)
        log.say("saved [/x]")
    text = out.getvalue()
    assert "\x1b[" in text and "5/10" in text and "kl 0.5000" in text and "saved [/x]" in text
    assert "tokens/s 1234" in text and "eta 0:00:0" in text
    assert text.rstrip("\n").endswith("\x1b[?25h"), "the cursor is back"


def test_silent_and_closed_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = writer(tmp_path)
    log.record(1, METRICS)
    log.say("nothing")
    log.close()
    log.close()
    assert capsys.readouterr() == ("", "")


def test_tensorboard_events_over_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, last_step, offset in ((range(1, 6), 0, 0.0), (range(4, 7), 3, 100.0)):
        with writer(tmp_path, tensorboard=True, last_step=last_step) as log:
            for step in steps:
                log.record(step, {"kl/reverse": step + offset, "kl/forward": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("kl/reverse")]
    assert seen == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0)]
    assert events.Tags()["scalars"] == ["kl/reverse"]


def test_wandb_when_installed_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )

    def init(**settings: Any) -> Any:
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with writer(tmp_path / "trial", wandb=True) as log:
        log.record(1, {"kl/reverse": 0.5, "kl/forward": math.nan})
    settings, logged, end = calls
    assert settings["id"] == settings["name"] == "trial" and settings["resume"] == "allow"
    assert logged == (1, {"kl/reverse": 0.5}) and end == "finish"


def test_wandb_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb: got true.*logging\.wandb=false"):
        writer(tmp_path, wandb=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_time_left_follows_the_last_steps() -> None:
    now = [0.0]
    eta = Eta(100, clock=lambda: now[0])
    for step in range(1, 51):
        now[0] += 3600 if step == 1 else 2
        left = eta.after(step)
    assert left == "0:01:40", "50 steps of 2 s; the slow first one is forgotten"
    now[0] += 3600
    eta.restart()
    now[0] += 2
    assert eta.after(51) == "0:01:38", "an evaluation is no step"
    assert eta.after(200) == "0:00:00"


def test_an_evaluation_is_shown_and_recorded_with_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = io.StringIO()
    with writer(tmp_path, out, tensorboard=True, last_step=-1) as log:
        with log.progress("evaluation") as progress:
            assert progress is None, "no bar in a log file"
        log.record_evaluation(0, {"eval/math/avg@8": 0.25, "time/evaluation_seconds": 3.0})
        log.record(1, METRICS)
        log.record_evaluation(1, {"eval/math/avg@8": 0.5, "time/evaluation_seconds": 2.0})
    lines = out.getvalue().splitlines()
    assert lines[0] == "evaluation at step 0  math/avg@8 0.25"
    assert lines[1].startswith("step 1/10") and lines[2] == "evaluation at step 1  math/avg@8 0.5"
    assert len(lines) == 3
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("eval/math/avg@8")]
    assert seen == [(0, 0.25), (1, 0.5)]
    recorded = read_metrics(tmp_path / "metrics.jsonl").lines
    assert [line["eval/math/avg@8"] for line in recorded] == [0.25, 0.5]


def test_a_second_bar_while_an_evaluation_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    with writer(tmp_path, out) as log, log.progress("evaluation") as progress:
        assert progress is not None
        progress(3, 77)
        deadline = time.monotonic() + 20
        while "3/77" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "3/77" in out.getvalue() and "evaluation" in out.getvalue()
