"""Stand-ins for torch's CUDA streams on a CPU: which is current where, and which waited for which.

They let the code of a GPU run, and record an order; they compute nothing and order nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class FakeStream:
    """A stream that records who waited for it."""

    def __init__(self, name: str, cuda: FakeCuda) -> None:
        self.name, self._cuda = name, cuda

    def synchronize(self) -> None:
        self._cuda.on_synchronize()

    def wait_stream(self, other: FakeStream) -> None:
        self._cuda.log.append(("wait", self.name, other.name))


class FakeCuda:
    """The streams of one GPU.

    Attributes:
        log: ("wait", stream, stream waited for), ("keep", stream, tensor's size) and whatever a
            test adds.
        on_synchronize: called when a thread waits for a stream.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.on_synchronize: Callable[[], None] = lambda: None
        self._default = FakeStream("main", self)
        self._here = threading.local()

    @property
    def current(self) -> FakeStream:
        """The stream of the calling thread."""
        return getattr(self._here, "stream", self._default)

    @contextmanager
    def stream(self, stream: FakeStream | None) -> Iterator[None]:
        before = self.current
        self._here.stream = stream or before
        try:
            yield
        finally:
            self._here.stream = before

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the stand-ins in the place of torch's; two side streams in that of vLLM's."""
        from vllm.distributed.weight_transfer import packed_tensor  # pyright: ignore[reportMissingImports]

        sides = tuple(FakeStream(f"side {number}", self) for number in range(2))
        monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, number: sides[:number])
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

        def record_stream(tensor: torch.Tensor, stream: FakeStream) -> None:
            self.log.append(("keep", stream.name, tensor.numel()))

        monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
