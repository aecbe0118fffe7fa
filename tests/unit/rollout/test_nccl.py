"""Pushes over NCCL: vLLM's own trainer and consumer, over a communicator without NCCL.

Both ends run on a CPU here, against the servers of `stub_server`; nothing has run on a GPU.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from megatron_vopd.errors import EngineError
from megatron_vopd.hf.folder import read_facts
from megatron_vopd.rollout.vllm.server import ServerEngine, ServerSettings
from megatron_vopd.rollout.weights import nccl
from megatron_vopd.rollout.weights.checked import CheckedTensors
from megatron_vopd.rollout.weights.send import expected_weights
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_nccl import FakeNccl, Worker
from tests.support.stub_server import Stub
from tests.support.tiny_models import TinyModel

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM: make engine"),
    # vLLM's remark on tensors that are larger than a chunk.
    pytest.mark.filterwarnings("ignore:Tensor .* has size"),
]
MODEL = TinyModel("qwen3", True, 160)
CHUNK_BYTES = 20_000
QKV = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


class Served(Stub):
    """A server with one worker, which receives as vLLM's workers do.

    Attributes:
        received: name -> tensor of the last push.
        chunks: names of the tensors that came together.
        worker: None: it was started (again), and nobody has joined it since.
        stops_after: chunks after which its worker does nothing more.
    """

    def __init__(self, network: FakeNccl) -> None:
        super().__init__()
        self.network, self.num_workers = network, 1
        self.worker: Worker | None = None
        self.received: dict[str, torch.Tensor] = {}
        self.chunks: list[list[str]] = []
        self.num_joined, self.stops_after = 0, 10**9
        self.hooks = {"/init_weight_transfer_engine": self.join, "/update_weights": self.receive}

    def join(self, body: Any) -> None:
        if self.mode == "refuses to join":
            raise ValueError("no such back end")
        self.num_joined += 1
        self.worker = self.network.join(body["init_info"])

    def receive(self, body: Any) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer  # pyright: ignore[reportMissingImports]

        info = body["update_info"]
        if self.worker is None or self.mode == "refuses":
            raise RuntimeError("NCCL weight transfer not initialized")
        if self.mode == "answers at once":
            return
        self.chunks = []
        triples = zip(info["names"], info["shapes"], info["dtype_names"], strict=True)
        packed_nccl_broadcast_consumer(
            iterator=((name, (shape, getattr(torch, kind))) for name, shape, kind in triples),
            group=self.worker,
            src=0,
            post_unpack_func=self.keep,
            buffer_size_bytes=CHUNK_BYTES,
            device="cpu",
        )

    def keep(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        if len(self.chunks) >= self.stops_after:
            if self.mode == "dies":
                self.worker = None
                raise RuntimeError("EngineCore died")
            self.gone.wait(20)
        self.chunks.append([name for name, _ in tensors])
        self.received |= {name: tensor.clone() for name, tensor in tensors}

    def restart(self) -> None:
        self.version, self.worker, self.mode, self.stops_after = "default", None, "sound", 10**9


class World:
    """Two servers, an engine over them, and the weights of a small model."""

    def __init__(self, folder: str, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        from vllm.distributed.weight_transfer import nccl_engine  # pyright: ignore[reportMissingImports]

        self.network, self.cuda = FakeNccl(), FakeCuda()
        self.cuda.install(monkeypatch)
        self.cuda.on_synchronize = self.synchronize
        monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", self.network.open)
        monkeypatch.setattr(nccl, "NCCL_CHUNK_BYTES", CHUNK_BYTES)
        self.servers = [Served(self.network) for _ in range(2)]
        urls = tuple(server.url for server in self.servers)
        settings = ServerSettings(
            urls, transport="nccl", model_dir=folder, push_seconds=seconds, start_seconds=5.0
        )
        self.engine = ServerEngine(settings)
        facts, _ = read_facts(f"{folder}/config.json")
        self.expected = expected_weights(facts)
        self.draws: set[tuple[str, str]] = set()

    def synchronize(self) -> None:
        """Wait as a stream does whose broadcasts have not ended."""
        if threading.current_thread().name == "weight-push":
            for wire in self.network.wires.values():
                wire.drain()

    def tensors(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield weights; q, k and v are made together, as `export_weights` makes them."""
        generator = torch.Generator().manual_seed(seed)
        made: list[tuple[str, torch.Tensor]] = []
        for name, shape in self.expected.items():
            self.draws.add((threading.current_thread().name, self.cuda.current.name))
            made.append((name, torch.randn(shape, generator=generator)))
            if not name.endswith(QKV[:2]):
                yield from made
                made = []

    def push(self, version: int) -> None:
        self.engine.update_weights(self.tensors(version), version)
        for server in self.servers:
            assert server.version == str(version) and list(server.received) == list(self.expected)
            for name, tensor in self.tensors(version):
                assert torch.equal(server.received[name], tensor), name

    @property
    def num_wires(self) -> int:
        return len(self.network.wires)

    @property
    def num_aborted(self) -> int:
        return sum(wire.is_aborted for wire in self.network.wires.values())

    def end(self) -> None:
        self.network.end()
        for server in self.servers:
            server.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(MODEL.save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def make(folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[World] = []

    def world(seconds: float = 20.0) -> World:
        made.append(World(folder, monkeypatch, seconds))
        return made[-1]

    yield world
    for one in made:
        one.end()


def test_a_push_reaches_every_worker_bit_by_bit(make: Any) -> None:
    """Chunks end between q, k and v, and one communicator serves every push."""
    world = make()
    world.push(1)
    world.push(2)
    assert world.num_wires == 1 and [server.num_joined for server in world.servers] == [1, 1]
    assert any(chunk[-1].endswith(QKV[:2]) for chunk in world.servers[0].chunks)
    assert len(world.servers[0].chunks) > 3
    assert world.draws == {("MainThread", "main")}, "collectives belong to the calling thread"
    world.engine.close()
    assert world.num_aborted == 1


def test_a_server_that_was_started_again_is_joined_again(make: Any) -> None:
    world = make()
    world.push(1)
    world.servers[1].restart()
    world.push(2)
    assert world.num_wires == 2 and [server.num_joined for server in world.servers] == [2, 2]
    assert world.num_aborted == 1, "the old communicator was kept"


def _failed(world: World, reason: str, longest: float) -> None:
    """Push to one server that fails: an error in time, and no communicator is left."""
    begin = time.monotonic()
    with pytest.raises(EngineError, match=reason) as caught:
        world.engine.update_weights(world.tensors(7), 7)
    assert time.monotonic() - begin < longest and "\n" not in str(caught.value)
    assert world.engine.policy_version is None


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("dies", "EngineCore died"), ("refuses", "NCCL weight transfer not initialized")],
)
def test_a_server_that_fails_in_a_push(mode: str, reason: str, make: Any) -> None:
    """Its answer ends the wait at once; the next push makes another communicator."""
    world = make()
    world.push(1)
    world.servers[1].mode, world.servers[1].stops_after = mode, 2
    _failed(world, reason, longest=5.0)
    assert world.num_aborted == world.num_wires == 1
    if mode == "dies":
        world.servers[1].restart()
    world.servers[1].mode, world.servers[1].stops_after = "sound", 10**9
    world.push(2)
    assert world.num_wires == 2


def test_a_server_that_refuses_to_join(make: Any) -> None:
    world = make()
    world.servers[1].mode = "refuses to join"
    _failed(world, "no such back end", longest=5.0)


def test_a_worker_that_does_nothing_more(make: Any) -> None:
    """The deadline ends the wait in NCCL, or that of its server's answer does."""
    world = make(seconds=1.0)
    world.push(1)
    world.servers[1].stops_after = 1
    _failed(world, r"no end after 1 s|timed out", longest=8.0)
    assert world.num_aborted == 1


def test_a_worker_that_does_not_receive(make: Any) -> None:
    """No server fails: the deadline alone ends the wait."""
    world = make(seconds=1.0)
    world.push(1)
    world.servers[1].mode = "answers at once"
    _failed(world, r"no end after 1 s: a server is gone", longest=3.0)
    assert world.num_aborted == 1


def test_a_source_that_fails_leaves_no_communicator(make: Any) -> None:
    """The rest of the walk can still be drawn, as all ranks have to."""
    world = make()
    world.push(1)

    class Source:
        def __init__(self) -> None:
            self.left = world.tensors(2)

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for number, pair in enumerate(self.left):
                if number == 9:
                    raise RuntimeError("a rank is gone")
                yield pair

    source = Source()
    with pytest.raises(RuntimeError, match="a rank is gone"):
        world.engine.update_weights(source, 2)
    assert world.num_aborted == 1 and len(list(source.left)) == len(world.expected) - 10


def test_weights_are_drawn_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM draws on two streams in turn: each waits for the one that made the tensor."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer  # pyright: ignore[reportMissingImports]

    cuda = FakeCuda()
    cuda.install(monkeypatch)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        made = []
        for size in range(1, 10):
            cuda.log.append(("make", cuda.current.name, size))
            made.append((f"weight {size}", torch.ones(size)))
            if size % 3 == 0:  # three at a time, like q, k and v
                yield from made
                made = []

    class Group:
        def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
            cuda.log.append(("use", cuda.current.name, tensor.numel()))

    checked = CheckedTensors(weights(), torch.float32)
    take = partial(packed_nccl_broadcast_producer, group=Group(), src=0, buffer_size_bytes=30)
    take(iterator=iter(checked), post_iter_func=lambda item: item[1])
    assert {line[1] for line in cuda.log if line[0] == "make"} == {"main"}
    uses = {line[1] for line in cuda.log if line[0] == "use"}
    assert uses == {"side 0", "side 1"}, "this test needs chunks on both streams"
    kept = [(line[1], line[2]) for line in cuda.log if line[0] == "keep"]
    assert [size for _, size in kept] == list(range(1, 10))
    for number, (stream, size) in enumerate(kept):
        at = cuda.log.index(("keep", stream, size))
        assert cuda.log[at - 1] == ("wait", stream, "main"), number
