"""CUDA as TransformerEngine and megatron-core ask for it, answered by the CPU or the meta device.

`pretend` goes further than the project's CPU runtime, which is active as well: TransformerEngine
asks for a GPU's properties, and its backward passes make tensors where function modes do not reach.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

_H100 = SimpleNamespace(
    major=9, minor=0, name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 << 30
)
_seen_as_cuda = False
_device = "cpu"


def _is_cuda(tensor: torch.Tensor) -> bool:
    return _seen_as_cuda or tensor.device.type == "cuda"


def _on_the_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def made(*arguments: Any, **options: Any) -> Any:
        if "cuda" in str(options.get("device")):
            options["device"] = "cpu"
        return function(*arguments, **options)

    return made


class _Work:
    """A transfer that may be waited for twice, as NCCL's and unlike gloo's."""

    def __init__(self, work: Any) -> None:
        self._work, self._is_done = work, False

    def wait(self) -> None:
        if not self._is_done:
            self._work.wait()
            self._is_done = True


def _waited_for_once(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    return lambda operations: [_Work(work) for work in original(operations)]


def pretend() -> None:
    """Let modules be built where they say cuda; once in a process, after the CPU runtime."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: _device,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (_H100.major, _H100.minor),
        "get_device_properties": lambda *_: _H100,
        "get_device_name": lambda *_: _H100.name,
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "device": lambda *_: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("mark", "range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, lambda *_: None)
    for name in ("empty", "zeros", "ones", "full", "tensor"):
        setattr(torch, name, _on_the_device(getattr(torch, name)))
    dist.batch_isend_irecv = _waited_for_once(dist.batch_isend_irecv)
    torch.Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment]


@contextlib.contextmanager
def built_on(device: str) -> Iterator[None]:
    """Make `device` ("cpu", "meta") the one on which modules build their parameters."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


@contextlib.contextmanager
def seen_as_cuda() -> Iterator[None]:
    """Let every tensor say that it is on a GPU: TransformerEngine refuses others."""
    global _seen_as_cuda
    _seen_as_cuda = True
    try:
        yield
    finally:
        _seen_as_cuda = False
