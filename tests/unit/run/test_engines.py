"""A configuration's rollout section becomes the engine of each leader."""

from __future__ import annotations

from typing import Any

from megatron_vopd.config import build_config
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.rollout.vllm.server import ServerEngine
from megatron_vopd.run.engines import make_engine
from tests.support.config_cases import problems_of, with_values

URLS = ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]


def _make(settings: dict[str, Any], leader: int, device: str = "cpu") -> Any:
    config = build_config(with_values(settings))
    return make_engine(
        config.rollout, "model", "run/engines", leader, 2, 512, device, config.run.seed, str(leader)
    )


def test_local_engines_have_logs_and_devices_of_their_own() -> None:
    engine = _make({"rollout.deadline_seconds": 60, "rollout.dtype": "fp32"}, 1, "cuda")
    assert isinstance(engine, LocalEngine)
    found = engine.settings
    assert found.log_path == "run/engines/engine_1.log" and found.gpu == "1"
    assert (found.dtype, found.deadline_seconds, found.max_model_len) == ("float32", 60, 512)
    assert found.seed == 7 and found.tp == 1 and found.cpu_threads == 0
    assert _make({"rollout.cpu_threads": 3}, 0).settings.environment({})["OMP_NUM_THREADS"] == "3"


def test_servers_are_shared_out() -> None:
    for leader in range(2):
        engine = _make({"rollout.engine": "server", "rollout.urls": URLS}, leader)
        assert isinstance(engine, ServerEngine) and engine.num_replicas == 1
        assert engine.settings.urls == engine.settings.push_urls == (URLS[leader],)
        assert engine.settings.transport == "shm" and engine.settings.dtype == "bfloat16"
        assert engine.settings.max_model_len == 512, "not what the run needs"
    one = {"rollout.engine": "server", "rollout.urls": URLS[:1]}
    assert _make(one, 0).settings.push_urls == (URLS[0],)
    assert _make(one, 1).settings.push_urls == ()
    assert _make(one, 0, "cuda").settings.transport == "nccl"


def test_servers_on_other_hosts_need_a_word() -> None:
    remote = {"rollout.engine": "server", "rollout.urls": ["http://10.0.0.7:8000"]}
    (problem,) = problems_of(remote)
    assert problem.startswith("rollout.urls: ") and "rollout.allow_remote=true" in problem
    assert _make(remote | {"rollout.allow_remote": True}, 0).settings.allow_remote
