"""Weights of Qwen3-4B's shapes to another process on the same GPU, by CUDA IPC.

The sender is the project's, the reader is vLLM's own function in a process of its own. Checked: the
bits, the speed beside a copy, memory that comes back, and a reader that is killed in the middle.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatron_vopd.hf.facts import facts_from_config
from megatron_vopd.rollout.weights.ipc import IpcSender
from megatron_vopd.rollout.weights.send import expected_weights
from tests.gpu.measure_device import seconds
from tests.support import ROOT

MODEL = ROOT / "tests/fixtures/models/Qwen3-4B/config.json"
NUM_LAYERS = 8
LEAST_OF_COPY = 0.5
FIRST_BUFFER = 512 << 20


def shapes() -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the weights that are sent."""
    facts = facts_from_config(json.loads(MODEL.read_text()) | {"num_hidden_layers": NUM_LAYERS})
    return expected_weights(facts)


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Make a weight that follows from its name, the same in both processes."""
    generator = torch.Generator("cuda").manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


def reader(connection: Connection, dies_after: int) -> None:
    """Read chunks until there are no more; answer how many weights were wrong."""
    from vllm.distributed.weight_transfer.packed_tensor import (  # pyright: ignore
        PackedBufferImporter,
        packed_ipc_consumer,
    )

    importer, known, wrong, chunks = PackedBufferImporter(), shapes(), 0, 0
    while (update := connection.recv()) is not None:
        handles = update.pop("ipc_handles")
        for name, tensor in packed_ipc_consumer(
            ipc_handle=handles, device_index=0, importer=importer, **update
        ):
            wrong += not torch.equal(tensor, values(name, known.pop(name)))
        chunks += 1
        if chunks == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send(wrong)
    importer.close()
    connection.send(wrong + len(known))


class Reader:
    """The other process, as vLLM's control channel."""

    def __init__(self, dies_after: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=reader, args=(other, dies_after), daemon=True)
        self._process.start()
        other.close()
        self.seconds = 0.0

    def init_weight_transfer_engine(self, _info: Mapping[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update: Mapping[str, Any]) -> None:
        self._connection.send(update)
        self._connection.recv()

    def finish_weight_update(self, _version: str) -> None: ...

    def wrong(self) -> int:
        """End the reading; return how many weights were wrong or missing."""
        self._connection.send(None)
        found = self._connection.recv()
        self._process.join()
        return found


def weights(known: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in known.items():
        yield name, values(name, shape)


def copy_rate() -> float:
    """Return the bytes that a copy on the device moves in a second, each counted once."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    return source.nbytes / seconds(lambda: target.copy_(source), "cuda")


def main() -> int:
    torch.cuda.set_device(0)
    known, failed = shapes(), 0
    largest = max(2 * torch.Size(shape).numel() for shape in known.values())
    total = sum(2 * torch.Size(shape).numel() for shape in known.values())
    values("warm up", (16,))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    sender = IpcSender(max(FIRST_BUFFER, largest))
    cases = (("first", 0), ("second", 0), ("killed", 1), ("after it", 0))
    # All start at once: what they import takes longer than what they read.
    readers: list[Any] = [Reader(dies_after) for _, dies_after in cases]
    for (name, dies_after), client in zip(cases, readers, strict=True):
        begin = time.perf_counter()
        try:
            sender.send(weights(known), client, torch.bfloat16, "1")
        except (EOFError, OSError) as error:
            print(f"{name}: {type(error).__name__}, as a dead reader should")
            failed += not dies_after
            sender.take_back()
            continue
        took = time.perf_counter() - begin
        failed += bool(dies_after)
        wrong = client.wrong()
        failed += wrong > 0
        print(f"{name}: {total / 1e9:.2f} GB in {took:.2f} s with the making and checking of the "
              f"weights, {wrong} wrong or missing")  # fmt: skip
    gc.collect()
    torch.cuda.ipc_collect()
    left = torch.cuda.memory_allocated() - before
    print(f"memory left behind: {left / 2**20:.0f} MiB")
    failed += left > 2**20
    # Last: torch keeps each buffer that was exported until a reader has released it.
    failed += not _is_fast(known, total, sender)
    print(f"{failed} failed")
    return 1 if failed else 0


class _Nobody(Reader):
    """A reader that needs no time, for the speed of the sending alone."""

    def __init__(self) -> None:
        pass

    def update_weights(self, update: Mapping[str, Any]) -> None: ...


def _is_fast(known: Mapping[str, tuple[int, ...]], total: int, sender: IpcSender) -> bool:
    """Time the packing of weights that exist already beside a copy of as many bytes."""
    ready = list(weights(known))
    client: Any = _Nobody()
    took = seconds(lambda: sender.send(iter(ready), client, torch.bfloat16, "1"), "cuda", 3)
    share = total / took / copy_rate()
    print(
        f"packing: {total / took / 1e9:.0f} GB/s, {share:.0%} of a copy (bar {LEAST_OF_COPY:.0%})"
    )
    return share >= LEAST_OF_COPY


if __name__ == "__main__":
    sys.exit(main())
