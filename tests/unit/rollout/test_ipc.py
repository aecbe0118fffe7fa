"""Pushes by CUDA IPC: vLLM's own producer over tensors of a CPU, or without data.

The buffer, its export and the GPU's allocator are stood in for; nothing has run on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vopd.config import load_config
from megatron_vopd.errors import EngineError
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.hf.folder import read_facts
from megatron_vopd.hf.push_buffers import MIN_IPC_BYTES, ipc_buffer_bytes
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.rollout.weights import checked
from megatron_vopd.rollout.weights.ipc import IpcSender
from megatron_vopd.rollout.weights.send import expected_weights
from tests.support import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM: make engine"
)
MODELS = ROOT / "tests" / "fixtures" / "models"
EXAMPLES = sorted(path.parent.name for path in ROOT.glob("examples/*/config.yaml"))
EXPANDABLE = "max_split_size_mb:512,expandable_segments:True"
# What opens the buffer: device, counter of readers and its place are where torch has them.
HANDLE = (*["-"] * 6, 0, *["-"] * 4, "counter", 5, "-", "-")


class Memory:
    """The GPU's memory in a process: settings of torch's allocator, pools, and what was made.

    Attributes:
        made: (bytes, settings, pool) of every buffer.
        buffer: the last one.
        log: settings and pool at each draw of a tensor.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.settings, self.pool = EXPANDABLE, ""
        self.made: list[tuple[int, str, str]] = []
        self.draws: list[tuple[str, str]] = []
        self.num_pools = self.num_collected = 0
        self.released: list[tuple[Any, ...]] = []
        self.buffer = torch.empty(0)

    def new_pool(self) -> str:
        self.num_pools += 1
        return f"pool {self.num_pools}"

    @contextmanager
    def use(self, pool: str) -> Iterator[None]:
        self.pool = pool
        try:
            yield
        finally:
            self.pool = ""

    def empty(self, size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cuda"
        self.made.append((size, self.settings, self.pool))
        self.buffer = torch.empty(size, dtype=dtype, device=self.device)
        return self.buffer

    def set(self, settings: str) -> None:
        self.settings = settings

    def collect(self) -> None:
        self.num_collected += 1

    def watched(self, tensors: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for pair in tensors:
            self.draws.append((self.settings, self.pool))
            yield pair

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.device_allocator import alloc_conf  # pyright: ignore[reportMissingImports]
        from vllm.distributed.weight_transfer import packed_tensor  # pyright: ignore[reportMissingImports]

        stream = SimpleNamespace(synchronize=lambda: None)
        cuda = SimpleNamespace(current_stream=lambda: stream)
        stand_in = SimpleNamespace(empty=self.empty, uint8=torch.uint8, cuda=cuda)
        monkeypatch.setattr(packed_tensor, "torch", stand_in)
        monkeypatch.setattr(packed_tensor, "reduce_tensor", lambda tensor: (None, HANDLE))
        monkeypatch.setattr(alloc_conf, "current_alloc_conf", lambda: self.settings)
        monkeypatch.setattr(alloc_conf, "set_alloc_conf", self.set)
        monkeypatch.setattr(torch.cuda, "MemPool", self.new_pool)
        monkeypatch.setattr(torch.cuda, "use_mem_pool", self.use)
        monkeypatch.setattr(torch.cuda, "ipc_collect", self.collect)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        release = lambda *counter, device: self.released.append((*counter, device))  # noqa: E731
        monkeypatch.setattr(torch.UntypedStorage, "_release_ipc_counter", release)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1")
        )


class Receiver:
    """The engine's side, which reads the buffer as vLLM's consumer does."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.received: dict[str, torch.Tensor] = {}
        self.num_chunks, self.fails_at, self.version = 0, -1, ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        assert init_info == {"packed": True}

    def start_weight_update(self) -> None:
        self.received = {}

    def update_weights(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor  # pyright: ignore[reportMissingImports]

        if self.num_chunks == self.fails_at:
            raise EngineError("engine, update: its process died")
        self.num_chunks += 1
        assert info["ipc_handles"] == {"GPU-1": HANDLE}
        kinds = [getattr(torch, kind) for kind in info["dtype_names"]]
        packed = self.memory.buffer[: sum(info["tensor_sizes"])]
        known = (info["names"], info["shapes"], kinds, info["tensor_sizes"])
        self.received |= {name: tensor.clone() for name, tensor in unpack_tensor(packed, *known)}

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.version = weight_version or ""


class FakeEngine(LocalEngine):
    child_module = "tests.support.fake_child"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_first_push_of_every_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the local engine, in the example's type, tensors without data: it is complete."""
    config = load_config(str(ROOT / "examples" / name / "config.yaml"), [])
    folder = MODELS / config.student.path.split("/")[1]
    facts, _ = read_facts(f"{folder}/config.json")
    expected = expected_weights(facts)
    dtype = CONFIG_DTYPES[config.rollout.dtype].name
    memory = Memory("meta")
    memory.install(monkeypatch)
    monkeypatch.setattr(checked, "is_finite", lambda tensor: True)  # there are no values
    settings = LocalSettings(
        str(folder), str(tmp_path / "log"), 64, dtype=dtype, device="cuda", push_seconds=20.0
    )
    engine = FakeEngine(settings, make_room=lambda: None)
    tensors = ((key, torch.empty(shape, device="meta")) for key, shape in expected.items())
    report = engine.update_weights(tensors, 1)
    updates = engine._call("received")
    engine.close()
    assert report.policy_version == 1 and report.num_tensors == len(expected)
    arrived = [
        (key, tuple(shape))
        for update in updates
        for key, shape in zip(update["names"], update["shapes"], strict=True)
    ]
    assert arrived == list(expected.items())
    assert {kind for update in updates for kind in update["dtype_names"]} == {dtype}
    size = ipc_buffer_bytes(facts, getattr(torch, dtype).itemsize)
    assert memory.made == [(size, EXPANDABLE.replace("True", "False"), "pool 1")]
    assert all(sum(update["tensor_sizes"]) <= size for update in updates)
    assert size > MIN_IPC_BYTES, "the embedding of every example is larger than the least buffer"


def test_sizes_of_buffers() -> None:
    """The embeddings of 1.7B, 4B and 8B in bf16: 594, 742 and 1187 MiB."""
    found = {}
    for name in ("Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B"):
        facts, _ = read_facts(f"{MODELS / name}/config.json")
        found[name] = ipc_buffer_bytes(facts, 2) / 2**20
        assert ipc_buffer_bytes(facts, 4) == 2 * ipc_buffer_bytes(facts, 2)
    assert {name: round(size) for name, size in found.items()} == {
        "Qwen3-1.7B": 594,
        "Qwen3-4B": 742,
        "Qwen3-8B": 1187,
    }


def _tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"w{i}", torch.randn(i + 1, 7, generator=generator)) for i in range(9)]


def test_bits_arrive_through_one_plain_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushes share one pool of plain memory; tensors are drawn with the allocator as it was."""
    memory = Memory("cpu")
    memory.install(monkeypatch)
    receiver, sender = Receiver(memory), IpcSender(300)
    for version in ("1", "2"):
        sent = sender.send(memory.watched(_tensors()), receiver, torch.bfloat16, version)
        assert receiver.version == version and sent.num_tensors == 9
        assert list(receiver.received) == [name for name, _ in _tensors()]
        for name, tensor in _tensors():
            assert torch.equal(receiver.received[name], tensor.bfloat16())
    plain = EXPANDABLE.replace("True", "False")
    assert memory.made == [(300, plain, "pool 1")] * 2 and receiver.num_chunks > 4
    assert set(memory.draws) == {(EXPANDABLE, "")}
    assert (memory.settings, memory.pool, memory.num_collected) == (EXPANDABLE, "", 2)


def test_a_push_that_fails_leaves_the_allocator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory("cpu")
    memory.install(monkeypatch)
    receiver, sender = Receiver(memory), IpcSender(300)
    receiver.fails_at = 1
    with pytest.raises(EngineError, match="its process died"):
        sender.send(_tensors(), receiver, torch.float32, "1")
    bad = [("w", torch.full((2,), torch.inf))]
    with pytest.raises(EngineError, match="weight w is not finite"):
        sender.send(bad, receiver, torch.float32, "1")
    with pytest.raises(ValueError, match="exceeds buffer_size_bytes=300"):
        sender.send([("w", torch.ones(99))], receiver, torch.float32, "1")

    def no_memory(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(memory, "empty", no_memory)
    memory.install(monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        sender.send(_tensors(), receiver, torch.float32, "1")
    assert (memory.settings, memory.pool) == (EXPANDABLE, "") and receiver.version == ""
    assert memory.num_pools == 1 and memory.num_collected == 4


def test_the_buffer_comes_back_from_an_engine_that_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed reader does not count itself off: the sender does, once for each failed push."""
    memory = Memory("cpu")
    memory.install(monkeypatch)
    folder = MODELS / "Qwen3-1.7B"
    settings = LocalSettings(str(folder), str(tmp_path / "log"), 64, device="cuda", push_seconds=20)
    engine = FakeEngine(settings, make_room=lambda: None)
    monkeypatch.setattr("megatron_vopd.rollout.vllm.local.ipc_buffer_bytes", lambda *_: 300)
    engine.update_weights(iter(_tensors()), 1)
    engine.refuse_weights("")
    assert memory.released == [], "its push was finished: it has counted itself off"
    with pytest.raises(EngineError, match="not finite"):
        engine.update_weights(iter([*_tensors(), ("w", torch.full((2,), torch.inf))]), 2)
    assert memory.released == [("counter", 5, 0)]
    engine.close()
    assert len(memory.released) == 1
