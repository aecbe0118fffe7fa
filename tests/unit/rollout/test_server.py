"""Requests over servers that fail, hang, refuse or lie; against small HTTP servers of this test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from megatron_vopd.errors import EngineError, UserError
from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.rollout.validate import check_rollouts
from megatron_vopd.rollout.vllm import client
from megatron_vopd.rollout.vllm.client import RefusedByServerError, Server
from megatron_vopd.rollout.vllm.server import (
    AllServersClient,
    ServerEngine,
    ServerSettings,
    servers_of_leader,
)
from megatron_vopd.types import Prompt

PROMPTS = [Prompt(f"data:{i}", (i, 2)) for i in range(12)]
SAMPLING = Sampling(max_tokens=3, samples=2)


class Stub(ThreadingHTTPServer):
    """A server that answers like vLLM; `mode` says how it misbehaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "sound"
        self.version = "default"
        self.context: Any = 4096
        self.calls: list[str] = []
        self.last_body: Any = None
        self.hang_after = 10**9
        self.gone = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def num_generated(self) -> int:
        return sum(path.endswith("/generate") for path in self.calls)


class Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.server.mode == "hung":
            self.server.gone.wait(20)
        if self.path == "/get_world_size":
            self.answer({"world_size": 2})
        elif self.path == "/v1/models":
            self.answer({"data": [{"id": "model", "max_model_len": self.server.context}]})
        elif self.path == "/weight_info":
            self.answer({"weight_version": self.server.version})
        else:
            self.answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
        self.server.calls.append(self.path)
        self.server.last_body = body
        if self.server.num_generated > self.server.hang_after:
            self.server.mode = "hung"
        mode = self.server.mode
        if mode == "hung":
            self.server.gone.wait(20)
        if self.path == "/finish_weight_update":
            self.server.version = body["weight_version"]
        if not self.path.endswith("/generate"):
            self.answer({}, 500 if mode == "no push" and self.path == "/update_weights" else 200)
        elif mode in ("failing", "refusing"):
            self.answer({"error": mode}, 500 if mode == "failing" else 400)
        else:
            self.answer(self.response(body["sampling_params"], mode))

    def response(self, params: dict[str, Any], mode: str) -> dict[str, Any]:
        length = params["max_tokens"]
        logprob = -9999.0 if mode == "nan" else -1.5
        if params.get("top_k") == 1:
            logprob = -0.3 if mode == "raw log-probs" else 0.0
        version = "0" if mode == "restarted" else self.server.version
        ids = [params["seed"] % 50 + i for i in range(length)]
        choice = {
            "token_ids": ids,
            "finish_reason": "length",
            "logprobs": {"content": [{"token_id": i, "logprob": logprob} for i in ids]},
            "weight_versions": [{"version": version, "start": 0, "end": length}],
        }
        return {"choices": [choice]}

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    servers = [Stub(), Stub()]
    yield servers
    for server in servers:
        server.gone.set()
        server.shutdown()
        server.server_close()


def _engine(stubs: list[Stub], **changes: Any) -> ServerEngine:
    values = {"deadline_seconds": 20.0, "stall_seconds": 1.0, "concurrency": 4} | changes
    engine = ServerEngine(ServerSettings(tuple(stub.url for stub in stubs), **values))
    report = engine.update_weights([("a", torch.ones(2))], 3)
    assert report.num_bytes == 8
    return engine


def test_requests_are_spread_and_come_back_in_order(stubs: list[Stub]) -> None:
    seen: list[tuple[int, int]] = []
    engine = _engine(stubs)
    rollouts = engine.generate(PROMPTS, SAMPLING, lambda done, total: seen.append((done, total)))
    check_rollouts(rollouts, PROMPTS, SAMPLING, 3, 0, vocab_size=99)
    assert seen[-1] == (24, 24)
    assert min(stub.num_generated for stub in stubs) > 1
    alone = _engine(stubs[:1])
    assert alone.generate(PROMPTS, SAMPLING) == rollouts, "samples depend on the spread"


def test_a_push_pauses_loads_drops_the_cache_and_resumes(stubs: list[Stub]) -> None:
    engine = _engine(stubs)
    for stub in stubs:
        assert [path for path in stub.calls if not path.endswith("generate")] == [
            "/pause?mode=wait",
            "/start_weight_update",
            "/update_weights",
            "/finish_weight_update",
            "/reset_prefix_cache",
            "/resume",
        ]
    stubs[1].mode = "no push"
    with pytest.raises(EngineError, match="/update_weights: status 500"):
        engine.update_weights([("a", torch.ones(2))], 4)
    assert engine.policy_version is None and stubs[0].calls[-1] != "/resume"
    with pytest.raises(EngineError, match="no weights"):
        engine.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("mode", ["failing", "hung"])
def test_the_other_server_takes_over(
    mode: str, stubs: list[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "HEALTH_SECONDS", 1.0)
    engine = _engine(stubs)
    sound = engine.generate(PROMPTS, SAMPLING)
    if mode == "hung":
        # It hangs once the call is under way: before that, the check of versions would see it.
        stubs[0].hang_after = stubs[0].num_generated + 2
        begin = time.monotonic()
        assert engine.generate(PROMPTS, SAMPLING) == sound
        assert stubs[0].mode == "hung" and 1 < time.monotonic() - begin < 15
    else:
        stubs[0].mode = mode
        assert engine.generate(PROMPTS, SAMPLING) == sound


def test_no_server_left(stubs: list[Stub]) -> None:
    engine = _engine(stubs, deadline_seconds=1.5)
    stubs[0].mode = stubs[1].mode = "failing"
    begin = time.monotonic()
    with pytest.raises(EngineError, match="out of time with 0 of 24"):
        engine.generate(PROMPTS, SAMPLING)
    assert time.monotonic() - begin < 6


@pytest.mark.parametrize(
    ("mode", "reason"), [("refusing", "status 400"), ("restarted", "was it started again")]
)
def test_faults_that_another_try_would_not_mend(mode: str, reason: str, stubs: list[Stub]) -> None:
    engine = _engine(stubs)
    stubs[0].mode = stubs[1].mode = mode
    begin = time.monotonic()
    with pytest.raises(RefusedByServerError, match=reason):
        engine.generate(PROMPTS, SAMPLING)
    assert time.monotonic() - begin < 5


def test_a_restarted_server_is_noticed_before(stubs: list[Stub]) -> None:
    engine = _engine(stubs)
    stubs[1].version = "default"
    with pytest.raises(EngineError, match="expected 3"):
        engine.generate(PROMPTS, SAMPLING)


def test_clamped_logprobs_are_not_numbers(stubs: list[Stub]) -> None:
    """vLLM's JSON has -9999 for NaN."""
    engine = _engine(stubs)
    stubs[0].mode = stubs[1].mode = "nan"
    rollouts = engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(EngineError, match="24 log-prob not finite"):
        check_rollouts(rollouts, PROMPTS, SAMPLING, 3, 0, vocab_size=99)


def test_servers_that_report_other_logprobs_are_refused(stubs: list[Stub]) -> None:
    stubs[1].mode = "raw log-probs"
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        _engine(stubs)


def test_servers_with_too_short_a_context_are_refused(stubs: list[Stub]) -> None:
    """vLLM would end every longer response there, and say that it is complete."""
    _engine(stubs, max_model_len=4096)
    with pytest.raises(UserError, match="got --max-model-len 4096, expected 5120 or more") as seen:
        _engine(stubs, max_model_len=5120)
    assert "vopd server-commands CONFIG" in str(seen.value) and "\n" not in str(seen.value)
    stubs[1].context = None
    with pytest.raises(EngineError, match="no max_model_len in"):
        _engine(stubs)


def test_servers_that_are_not_there() -> None:
    engine = ServerEngine(ServerSettings(("http://127.0.0.1:1",), start_seconds=0.5))
    with pytest.raises(EngineError, match="not up after"):
        engine.update_weights([], 1)
    with pytest.raises(UserError, match="expected at least one server"):
        ServerEngine(ServerSettings(()))
    with pytest.raises(UserError, match="expected http://host:port"):
        Server("127.0.0.1:8000")


def test_other_hosts_need_a_word() -> None:
    with pytest.raises(UserError, match="close that network"):
        ServerEngine(ServerSettings(("http://10.0.0.7:8000",)))
    ServerEngine(ServerSettings(("http://10.0.0.7:8000",), allow_remote=True))


def test_workers_of_all_servers_have_ranks_of_their_own(stubs: list[Stub]) -> None:
    servers = AllServersClient([Server(stub.url) for stub in stubs], 5.0)
    servers.init_weight_transfer_engine({"rank_offset": 1, "world_size": 5})
    assert [stub.last_body["init_info"]["rank_offset"] for stub in stubs] == [1, 3]


def test_leaders_share_servers() -> None:
    assert servers_of_leader(["a", "b", "c"], 0, 2) == (("a", "c"), ("a", "c"))
    assert servers_of_leader(["a", "b", "c"], 1, 2) == (("b",), ("b",))
    assert servers_of_leader(["a"], 0, 2) == (("a",), ("a",))
    assert servers_of_leader(["a"], 1, 2) == (("a",), ())


def test_a_leader_that_does_not_push_follows_the_servers(stubs: list[Stub]) -> None:
    engine = _engine(stubs)
    settings = ServerSettings(engine.settings.urls, push_urls=(), push_seconds=5.0)
    follower = ServerEngine(settings)
    tensors = ((name, torch.ones(1)) for name in "abc")
    later = threading.Timer(0.5, engine.update_weights, ([("a", torch.ones(2))], 4))
    later.start()
    assert follower.update_weights(tensors, 4).policy_version == 4
    later.join()
    assert not list(tensors), "a walk that others take part in was not finished"
    assert {r.policy_version for r in follower.generate(PROMPTS, SAMPLING)} == {4}
