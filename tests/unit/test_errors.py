"""Errors that a user meets: their one line, and the exit status that each kind ends in."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_vopd import errors, train
from megatron_vopd.errors import (
    FAILED,
    INTERRUPTED,
    MISTAKE,
    EngineError,
    GradingError,
    LayoutError,
    RunFailure,
    SkipLimitError,
    StopRequested,
    UserError,
    refusal,
)

CASES: list[tuple[BaseException, int, str]] = [
    (refusal("train.steps", "0", "integer >= 1", "raise it"), MISTAKE, "train.steps: got 0, "),
    (LayoutError("tp: got 3"), MISTAKE, "tp: got 3"),
    (EngineError("push: gone"), FAILED, "EngineError: push: gone"),
    (GradingError("worker: gone"), FAILED, "GradingError: worker: gone"),
    (SkipLimitError("6 in a row"), FAILED, "SkipLimitError: 6 in a row"),
    (OSError(28, "No space left on device", "w"), FAILED, "rank 0: w: No space left on device;"),
    (RuntimeError("[a:1] Connection closed by peer"), FAILED, "rank 0: another rank is gone"),
    (KeyboardInterrupt(), INTERRUPTED, "interrupted; "),
]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("error", "status", "line"), CASES, ids=lambda x: type(x).__name__)
@pytest.mark.usefixtures("rank")
def test_training_ends_in_one_line_and_the_status_of_the_kind(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(train, "load_config", fail)
    assert train.main(["config.yaml"]) == status
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == 1, printed


@pytest.mark.usefixtures("rank")
def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(train, "load_config", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train.main(["config.yaml"])


def test_every_error_is_a_mistake_or_a_failure_of_the_run() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    raised = [kind for kind in kinds if issubclass(kind, Exception) and kind is not StopRequested]
    assert len(raised) > 5
    for kind in raised:
        assert issubclass(kind, UserError) != issubclass(kind, RunFailure), kind
