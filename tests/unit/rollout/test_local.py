"""The trainer's end of the pipe: every death and every silence of the engine is an error in time.

The engine's process is a stand-in here, which takes no time to start; tests/integration does the
same with vLLM.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.errors import EngineError, UserError
from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.rollout.validate import check_rollouts
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.rollout.vllm.supervisor import session_pids
from megatron_vopd.types import Prompt
from tests.support import ROOT

PROMPTS = [Prompt(f"data:{i}", (1, 2, 3)) for i in range(4)]
SAMPLING = Sampling(max_tokens=5, samples=2)
WEIGHTS = [("a", torch.ones(2))]


class FakeEngine(LocalEngine):
    child_module = "tests.support.fake_child"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[FakeEngine] = []

    def engine(mode: str = "sound", **changes: Any) -> FakeEngine:
        seconds = {"start_seconds": 2.0, "push_seconds": 2.0, "stall_seconds": 1.0}
        values: Any = {"max_model_len": 16} | seconds | changes
        made.append(FakeEngine(LocalSettings(mode, str(tmp_path / "logs" / "engine"), **values)))
        return made[-1]

    yield engine
    for one in made:
        one.close()
        assert not one.processes()


def test_pushes_and_samples(make: Any) -> None:
    engine, seen = make(), []
    with pytest.raises(EngineError, match="it has no weights"):
        engine.generate(PROMPTS, SAMPLING)
    report = engine.update_weights(WEIGHTS, 3)
    assert (report.policy_version, report.num_bytes, report.num_tensors) == (3, 8, 1)
    rollouts = engine.generate(PROMPTS, SAMPLING, lambda *counts: seen.append(counts))
    check_rollouts(rollouts, PROMPTS, SAMPLING, 3, 0, vocab_size=99)
    assert seen[0] == (0, 8) and seen[-1] == (8, 8)
    assert engine.generation.num_tokens == 40 and engine.num_starts == 1
    engine.sleep()
    engine.wake()
    assert engine.probe_logprobs([(1, 2, 3)]) == [[-1.0, -1.0]]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("hangs at start", "load: no answer for 2.0 s"),
        ("dies at start", "load: its process died; last error: OSError: no such model"),
        ("refuses", "update: ValueError: weight a has shape"),
        ("dies in a push", "update: its process died"),
        ("keeps old weights", "push: it has weights '0', expected 3"),
        ("cache in use", "cache of the old weights"),
    ],
)
def test_failures_of_a_push(mode: str, reason: str, make: Any) -> None:
    engine = make(mode)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=reason) as caught:
        engine.update_weights(WEIGHTS, 3)
    assert time.monotonic() - begin < 6
    if mode != "hangs at start":
        assert "a warning while it starts" not in str(caught.value)
    assert engine.policy_version is None and not engine.processes()


@pytest.mark.parametrize(("mode", "reason"), [("hangs", "no answer for 1"), ("dies", "died")])
def test_failures_while_generating(mode: str, reason: str, make: Any) -> None:
    engine = make(mode)
    engine.update_weights(WEIGHTS, 3)
    with pytest.raises(EngineError, match=f"generate: .*{reason}"):
        engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(EngineError, match="it has no weights"):
        engine.generate(PROMPTS, SAMPLING)
    assert engine.update_weights(WEIGHTS, 4).policy_version == 4 and engine.num_starts == 2


def test_progress_is_no_stall_but_has_a_deadline(make: Any) -> None:
    engine = make("slow", deadline_seconds=9.0)
    engine.update_weights(WEIGHTS, 1)
    assert len(engine.generate(PROMPTS[:2], SAMPLING)) == 4, "2 s in all, never 1 s of silence"
    hasty = make("slow", deadline_seconds=1.2)
    hasty.update_weights(WEIGHTS, 1)
    with pytest.raises(EngineError, match=r"generate: no answer for 1\.2 s"):
        hasty.generate(PROMPTS, SAMPLING)


def test_an_engine_that_stops_within_a_message(make: Any) -> None:
    engine = make()
    engine.update_weights(WEIGHTS, 1)
    os.kill(max(engine.processes()), signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(EngineError, match="probe: no answer in time"):
        engine._call("probe", [[1] * 10**6], seconds=1.0)
    assert time.monotonic() - begin < 8 and not engine.processes()


def test_a_source_that_fails_ends_the_engine(make: Any) -> None:
    """Half-loaded weights do not survive, whoever failed."""

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield WEIGHTS[0]
        raise RuntimeError("a rank is gone")

    engine = make()
    with pytest.raises(RuntimeError, match="a rank is gone"):
        engine.update_weights(failing(), 3)
    assert engine.policy_version is None and not engine.processes()


def test_the_engine_does_not_see_torchrun(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # the trainer's choice
    engine = make()
    engine.start()
    found = engine._call("environment")
    assert not {key for key in found if key.startswith(("TORCHELASTIC", "MASTER_"))}
    assert not {"RANK", "WORLD_SIZE", "CUDA_DEVICE_MAX_CONNECTIONS"} & set(found)
    assert found["GLOO_SOCKET_IFNAME"] == "lo" and found["VLLM_HOST_IP"] == "127.0.0.1"
    session = min(engine.processes())
    assert session != os.getsid(0) and len(session_pids(session)) == 2


def test_prompts_that_leave_no_room(make: Any) -> None:
    with pytest.raises(UserError, match="12 tokens and a response of 5 exceed max_model_len=16"):
        make().generate([Prompt("long", (1,) * 12)], SAMPLING)


def test_gpu_engines_have_one_gpu() -> None:
    with pytest.raises(UserError, match=r"rollout\.tp: got 2"):
        LocalSettings("model", "log", 16, device="cuda", tp=2)
    one = LocalSettings("model", "log", 16, device="cuda", gpu="3")
    assert one.environment({})["CUDA_VISIBLE_DEVICES"] == "3"
    assert one.engine_arguments()["transfer_backend"] == "ipc"


def test_prompts_are_read_whole_on_a_cpu() -> None:
    """Seeded samples fail there otherwise; the real engine is in `test_engine_lifecycle`."""
    on_cpu = LocalSettings("model", "log", 16, device="cpu").engine_arguments()
    assert on_cpu["enable_chunked_prefill"] is False
    on_gpu = LocalSettings("model", "log", 16, device="cuda").engine_arguments()
    assert "enable_chunked_prefill" not in on_gpu


def test_a_vllm_that_does_not_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real child beside a vLLM for another torch: one line, before anything is sampled."""
    (tmp_path / "vllm").mkdir()
    library = "libcudart.so.12: cannot open shared object file"
    (tmp_path / "vllm" / "__init__.py").write_text(f"raise ImportError({library!r})")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    engine = LocalEngine(LocalSettings("model", str(tmp_path / "log"), max_model_len=16))
    with pytest.raises(EngineError) as error:
        engine.update_weights(WEIGHTS, 0)
    line = str(error.value)
    assert line.startswith(
        "engine, load: ImportError: vLLM does not import (ImportError: libcudart"
    )
    assert "install it again" in line and "\n" not in line
