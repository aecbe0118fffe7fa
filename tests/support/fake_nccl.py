"""A communicator without NCCL, in one process: it waits for its peers as NCCL does, without end."""

from __future__ import annotations

import threading
from typing import Any

import torch


class Wire:
    """One communicator: a sender, which vLLM takes for its own, and workers.

    Attributes:
        sent: what was broadcast.
        is_aborted: the sender was destroyed.
    """

    def __init__(self, num_workers: int) -> None:
        self.changed = threading.Condition()
        self.sent: list[torch.Tensor] = []
        self.is_aborted = False
        self.num_workers = num_workers
        self.workers: list[Worker] = []

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Send a tensor, without waiting for the workers."""
        with self.changed:
            if not self.is_aborted:
                self.sent.append(tensor.clone())
                self.changed.notify_all()

    def drain(self) -> None:
        """Wait until every worker has taken everything, or the communicator is aborted."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.is_aborted or all(w.taken == len(self.sent) for w in self.workers)
            )

    def destroy(self) -> None:
        """Abort; workers that wait fail, so that a test's threads end."""
        with self.changed:
            self.is_aborted = True
            self.changed.notify_all()


class Worker:
    """A worker's end of a wire; a server that was started again has none."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.taken = 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Receive the next tensor."""
        wire = self._wire
        with wire.changed:
            wire.changed.wait_for(lambda: wire.is_aborted or self.taken < len(wire.sent))
            if wire.is_aborted:
                raise RuntimeError("the communicator was aborted")
            tensor.copy_(wire.sent[self.taken])
            self.taken += 1
            wire.changed.notify_all()


class FakeNccl:
    """All communicators of a test, by the port at which their members meet."""

    def __init__(self) -> None:
        self.wires: dict[int, Wire] = {}
        self._changed = threading.Condition()
        self._is_over = False

    def open(self, info: Any) -> Wire:
        """Return the sender's end once all workers have joined, as `ncclCommInitRank` does."""
        wire = Wire(info.world_size - 1)
        with self._changed:
            self.wires[info.master_port] = wire
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_over or len(wire.workers) == wire.num_workers)
        return wire

    def join(self, init_info: dict[str, Any]) -> Worker:
        """Return a worker's end once the sender has opened its own."""
        port = init_info["master_port"]
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or port in self.wires)
            wire = self.wires[port]
            worker = Worker(wire)
            wire.workers.append(worker)
            self._changed.notify_all()
        return worker

    def end(self) -> None:
        """Let go of everybody who waits."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for wire in self.wires.values():
            wire.destroy()
