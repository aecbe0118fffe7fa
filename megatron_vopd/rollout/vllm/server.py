"""vLLM servers by URL: requests spread over them, weights through vLLM's routes for RL.

The servers are started by somebody else (see examples/servers) with VLLM_SERVER_DEV_MODE=1, a
weight-transfer back end and --enable-scale-out. Token ids go in and come out by
/inference/v1/generate, so neither side needs a tokenizer; every response says which weights it was
sampled from, so a server that was started again in between is noticed.

Whoever reaches such a port can replace the model, and `--api-key` does not guard those routes:
other hosts than this one are refused unless the caller says that the network is closed.

On the CPU weights pass through shared memory, hence servers on the trainer's machine; on GPUs by
NCCL (`weights.send_gpu`, unverified).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.errors import EngineError, UserError
from megatron_vopd.rollout.engine import (
    GenerationReport,
    Progress,
    PushReport,
    Sampling,
    generation_report,
    response_seed,
)
from megatron_vopd.rollout.vllm.client import Dispatcher, RefusedByServerError, Server
from megatron_vopd.rollout.vllm.server_check import require_context
from megatron_vopd.rollout.weights.send import Sent, expected_weights, send_weights
from megatron_vopd.types import Prompt, Rollout

GENERATE = "/inference/v1/generate"
CLAMPED_LOGPROB = -9999.0  # what vLLM's JSON has in place of NaN and -inf


@dataclass(frozen=True)
class ServerSettings:
    """The servers, and how long to wait for them.

    Attributes:
        urls: servers to sample from.
        push_urls: servers to push to; None: the same. With several leaders on the same servers, one
            leader pushes to all and the others to none.
        dtype: the servers' --dtype, as torch names it.
        transport: "shm" or "nccl".
        model_dir: HF folder that the servers were started with; for nccl.
        allow_remote: the network between trainer and servers is closed to everybody else.
        concurrency: requests under way per server.
        deadline_seconds: for one call of `generate`.
        stall_seconds: until a server that does not answer is given up.
        push_seconds: for one part of a push.
        start_seconds: until all servers are up, at first use.
        max_model_len: longest prompt and response together, which the servers must take.
    """

    urls: tuple[str, ...]
    push_urls: tuple[str, ...] | None = None
    dtype: str = "float32"
    transport: str = "shm"
    model_dir: str = ""
    allow_remote: bool = False
    concurrency: int = 64
    deadline_seconds: float = 1800.0
    stall_seconds: float = 60.0
    push_seconds: float = 120.0
    start_seconds: float = 600.0
    max_model_len: int = 1


class AllServersClient:
    """A `WeightClient` whose calls go to several servers at once."""

    def __init__(self, servers: Sequence[Server], seconds: float) -> None:
        self._servers = servers
        self._seconds = seconds

    def post(self, path: str, body: Any = None) -> None:
        """POST to every server, wait for all answers, then raise the first failure."""
        self._post_each(path, [body] * len(self._servers))

    def _post_each(self, path: str, bodies: Sequence[Any]) -> None:
        with ThreadPoolExecutor(max_workers=max(1, len(self._servers))) as pool:
            pairs = zip(self._servers, bodies, strict=True)
            waiting = [
                pool.submit(server.call, "POST", path, body, self._seconds)
                for server, body in pairs
            ]
            for done in waiting:
                done.result()

    def world_sizes(self) -> list[int]:
        """Ask each server for the number of its workers."""
        answers = [s.call("GET", "/get_world_size", seconds=self._seconds) for s in self._servers]
        return [answer["world_size"] for answer in answers]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the workers of all servers to one communicator, ranks server after server."""
        sizes = self.world_sizes()
        infos = [
            init_info | {"rank_offset": init_info["rank_offset"] + sum(sizes[:number])}
            for number in range(len(sizes))
        ]
        self._post_each("/init_weight_transfer_engine", [{"init_info": info} for info in infos])

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", {"weight_version": weight_version})


class ServerEngine:
    """An `Engine` that consists of servers, which somebody else starts and stops."""

    def __init__(self, settings: ServerSettings) -> None:
        if not settings.urls:
            raise UserError("rollout.urls: expected at least one server, got none")
        push_urls = settings.urls if settings.push_urls is None else settings.push_urls
        by_url = {url: Server(url) for url in (*settings.urls, *push_urls)}
        for server in by_url.values():
            if not (server.is_local or settings.allow_remote):
                raise UserError(
                    f"rollout.urls: {server.url} is on another host. Whoever reaches its port can "
                    "replace the model (vLLM's routes for weights have no password): close that "
                    "network to everybody else, then set allow_remote=True"
                )
        self.settings = settings
        self.policy_version: int | None = None
        self.generation: GenerationReport | None = None
        self._servers = [by_url[url] for url in settings.urls]
        self._push_servers = [by_url[url] for url in push_urls]
        self._is_checked = False
        self._nccl: Any = None

    @property
    def num_replicas(self) -> int:
        """Servers, each of which has weights of its own."""
        return len(self._servers)

    @property
    def shared_dtype(self) -> torch.dtype | None:
        """The weights' type where they come through shared memory; else None."""
        settings = self.settings
        return getattr(torch, settings.dtype) if settings.transport == "shm" else None

    def wait_until_up(self) -> None:
        """Wait for all servers, and check that their log-probs are of the distribution sampled.

        Raises:
            EngineError: one does not come up within `start_seconds`.
            UserError: one was started without --logprobs-mode processed_logprobs, or with a
                shorter context than the run needs.
        """
        deadline = time.monotonic() + self.settings.start_seconds
        for server in self._servers:
            while not server.is_healthy():
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"server {server.url} is not up after {self.settings.start_seconds:g} s"
                    )
                time.sleep(0.2)
            require_context(server, self.settings.max_model_len, self.settings.push_seconds)
            # The only token that is left has probability 1, unless log-probs are taken before that.
            body = _body([0], {"max_tokens": 1, "top_k": 1, "logprobs": 0, "seed": 0})
            answer = server.call("POST", GENERATE, body, self.settings.push_seconds)
            if answer["choices"][0]["logprobs"]["content"][0]["logprob"] != 0.0:
                raise UserError(
                    f"server {server.url}: it reports log-probs before temperature and nucleus; "
                    "start it with --logprobs-mode processed_logprobs"
                )
        self._is_checked = True

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """Sample, as `Engine.generate` says.

        Raises:
            EngineError: no server is left, out of time, or other weights than pushed.
        """
        version = self._version_of_servers("generate")
        begin = time.monotonic()
        jobs = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples)]

        def send(server: Server, job: tuple[Prompt, int], seconds: float) -> Rollout:
            prompt, sample = job
            options = {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "stop_token_ids": list(sampling.stop_ids),
                "seed": response_seed(sampling.seed, prompt.prompt_id, sample),
                "logprobs": 0,
            }
            answer = server.call("POST", GENERATE, _body(prompt.ids, options), seconds)
            return _rollout(server, answer["choices"][0], prompt, sample, version)

        dispatcher = Dispatcher(
            self._servers,
            send,
            self.settings.concurrency,
            self.settings.deadline_seconds,
            self.settings.stall_seconds,
        )
        total = len(jobs)
        rollouts = dispatcher.run(jobs, lambda done: progress(done, total) if progress else None)
        if progress is not None:
            progress(total, total)
        self.generation = generation_report(rollouts, time.monotonic() - begin)
        return rollouts

    def _version_of_servers(self, phase: str) -> int:
        """Return the version that all servers report.

        Raises:
            EngineError: they differ, or it is not what this leader or another one pushed.
        """
        found = {
            server.url: server.call("GET", "/weight_info", seconds=self.settings.push_seconds)
            for server in self._servers
        }
        versions = {answer["weight_version"] for answer in found.values()}
        expected = None if self.policy_version is None else str(self.policy_version)
        if len(versions) > 1 or (expected is not None and versions != {expected}):
            self.policy_version = None
            raise EngineError(f"servers, {phase}: weights {found}, expected {expected}")
        (version,) = versions
        if not version.isdigit() or (expected is None and self.settings.push_urls is None):
            raise EngineError(f"servers, {phase}: no weights were pushed (they report {version!r})")
        return int(version)

    def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PushReport:
        """Replace all weights, as `Engine.update_weights` says.

        After a failure the servers stay paused until a push succeeds.

        Raises:
            EngineError: a server refused or is gone; if it holds broken weights, the next push
                replaces them.
        """
        if not self._is_checked:
            self.wait_until_up()
        self.policy_version = None
        begin = time.monotonic()
        if not self._push_servers:
            self._follow(tensors, policy_version)
            return PushReport(policy_version, 0, time.monotonic() - begin)
        client = AllServersClient(self._push_servers, self.settings.push_seconds)
        client.post("/pause?mode=wait")
        try:
            sent = self._send(tensors, client, str(policy_version))
        except BaseException:
            self._abort(client)
            raise
        client.post("/reset_prefix_cache")
        client.post("/resume")
        self.policy_version = policy_version
        self._version_of_servers("push")
        seconds = time.monotonic() - begin
        return PushReport(policy_version, sent.num_bytes, seconds, sent.num_tensors)

    def _send(
        self, tensors: Iterable[tuple[str, Tensor]], client: AllServersClient, version: str
    ) -> Sent:
        dtype = getattr(torch, self.settings.dtype)
        if self.settings.transport == "shm":
            return send_weights(tensors, client, dtype, version)
        from megatron_vopd.hf.folder import read_facts
        from megatron_vopd.rollout.weights.send_gpu import NcclSender

        if self._nccl is None:
            address, port = self._push_servers[0].own_address()
            self._nccl = NcclSender(client, address, port, sum(client.world_sizes()))
        facts, _ = read_facts(f"{self.settings.model_dir}/config.json")
        sent = self._nccl.send(tensors, expected_weights(facts), dtype)
        client.post("/update_weight_version", {"new_version": version})
        return sent

    def _follow(self, tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Wait until these servers have the weights that another leader pushes to them."""
        for _ in tensors:
            pass
        deadline = time.monotonic() + self.settings.push_seconds
        self.policy_version = policy_version
        while True:
            try:
                self._version_of_servers("push")
                return
            except EngineError:
                if time.monotonic() > deadline:
                    raise
            self.policy_version = policy_version
            time.sleep(0.1)

    def _abort(self, client: AllServersClient) -> None:
        """End an unfinished update, by a part that fails: vLLM knows no other way."""
        with suppress(EngineError):
            client.update_weights({})

    def probe_logprobs(
        self, sequences: Sequence[Sequence[int]], replica: int = 0
    ) -> list[list[float]]:
        """Score sequences by server number `replica`, as `Engine.probe_logprobs` says."""
        server = self._servers[replica]
        found = []
        for ids in sequences:
            # First the last id, by sampling, which reads the cache; see `child.Child.probe`.
            # The answer leaves out the last of the requested ids, so the id is requested twice.
            wanted = {"logprobs": 2, "logprob_token_ids": [ids[-1]] * 2, "max_tokens": 1}
            last = self._ask(server, ids[:-1], wanted)
            top = last["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            scores = {entry["token_id"]: entry["logprob"] for entry in top}
            whole = self._ask(server, ids, {"prompt_logprobs": 0, "max_tokens": 1})
            steps = zip(ids[1:-1], whole["prompt_logprobs"][1:-1], strict=True)
            scored = [step[str(token)]["logprob"] for token, step in steps]
            found.append([_unclamped(value) for value in [*scored, scores[ids[-1]]]])
        return found

    def _ask(self, server: Server, ids: Sequence[int], options: dict[str, Any]) -> Any:
        body = _body(ids, {"seed": 0, **options})
        return server.call("POST", GENERATE, body, self.settings.push_seconds)

    def refuse_weights(self, reason: str) -> None:
        """Sample no more until the next push."""
        self.policy_version = None

    def sleep(self) -> None:
        """Leave all as it is: servers have devices of their own."""

    def wake(self) -> None:
        """Leave all as it is, since `sleep` did."""

    def close(self) -> None:
        """Leave the communicator, if there is one; the servers keep running."""
        if self._nccl is not None:
            self._nccl.close()
            self._nccl = None


def _body(ids: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
    # Exactly the given ids end a response: vLLM adds those of the model's folder otherwise.
    settled = {"ignore_eos": True, "detokenize": False}
    return {"token_ids": list(ids), "sampling_params": settled | options}


def _rollout(
    server: Server, choice: dict[str, Any], prompt: Prompt, sample: int, version: int
) -> Rollout:
    spans = choice.get("weight_versions") or []
    versions = {span["version"] for span in spans}
    if versions != {str(version)}:
        raise RefusedByServerError(
            f"server {server.url}, generate: sampled from weights {sorted(versions)}, expected "
            f"{version}; was it started again?"
        )
    return Rollout(
        prompt=prompt,
        sample=sample,
        response_ids=tuple(choice["token_ids"]),
        rollout_logprobs=tuple(_unclamped(e["logprob"]) for e in choice["logprobs"]["content"]),
        finish_reason=choice["finish_reason"],
        policy_version=version,
    )


def _unclamped(value: float) -> float:
    return math.nan if value <= CLAMPED_LOGPROB else value


def servers_of_leader(
    urls: Sequence[str], leader: int, num_leaders: int
) -> tuple[tuple[str, ...], ...]:
    """Return (urls, push_urls) of one of `num_leaders` data-parallel leaders.

    With a server for each, every leader has its own; otherwise all sample from all, and the first
    one pushes to all.
    """
    if len(urls) >= num_leaders:
        own = tuple(urls[leader::num_leaders])
        return own, own
    return tuple(urls), tuple(urls) if leader == 0 else ()
