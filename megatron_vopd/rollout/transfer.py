"""Weights on their way to an engine on this machine: layer by layer, through anonymous memory.

The sender writes the tensors of one layer into a file that exists in memory only (memfd), with a
manifest of names, shapes, types and hashes beside it, and tells the engine where it is. The
engine's processes map it, verify it against the manifest and against their own model, and load it.
While they load one layer the sender gathers the next, so two layers exist at a time, whatever the
size of the model.

Such a file has no name in /dev/shm: it goes when the last process that holds it ends, however it
ends. The reader opens it as /proc/PID/fd/FD, which takes the same user and the same process
namespace.

The control channel is any object with the methods of `WeightClient`, which are vLLM's own
(`VLLMWeightSyncClient`): a child process and an HTTP server both have them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from megatron_vopd.hf_mapping import hf_tensors
from megatron_vopd.model_facts import ModelFacts
from megatron_vopd.rollout.engine import EngineError

BACKEND = "megatron_vopd_shm"
ALIGNMENT = 64  # of a tensor in its file: a cache line


class WeightClient(Protocol):
    """The engine's side of a push, as vLLM defines it."""

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@dataclass(frozen=True)
class Sent:
    """Totals of one push."""

    num_bytes: int
    num_tensors: int


def expected_weights(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a push in its order, the head of a tied model included."""
    expected = hf_tensors(facts)
    if facts.tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    return expected


def layer_key(name: str) -> str:
    """Tensors of one key travel together: a decoder layer, or a tensor outside the layers."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return name


def digest(tensor: Tensor) -> str:
    """xxh3-128 of a contiguous tensor's bytes."""
    return xxhash.xxh3_128(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


class Segment:
    """A growing file in memory with tensors and their manifest."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("megatron_vopd_weights", os.MFD_CLOEXEC)
        self._end = 0
        self.num_bytes = 0
        self.tensors: list[list[Any]] = []  # name, dtype, shape, offset, digest

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; it may be changed afterwards."""
        tensor = tensor.detach().contiguous().cpu()
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        data = memoryview(_bytes(tensor))
        done = 0
        while done < len(data):  # one write transfers 2 GiB at most
            done += os.pwrite(self._fd, data[done:], offset + done)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.tensors.append([name, dtype, list(tensor.shape), offset, digest(tensor)])
        self._end = offset + len(data)
        self.num_bytes += len(data)

    def update_info(self) -> dict[str, Any]:
        """What the engine is told; JSON."""
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        return {"path": path, "size": self._end, "tensors": self.tensors}

    def close(self) -> None:
        """Give the memory back, once the engine has let go of it too. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def map_segment(path: str, size: int) -> Tensor:
    """The bytes [size] of a segment, shared with its writer.

    Raises:
        ValueError: the file is not there, or shorter than announced.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(
            f"weights at {path} cannot be opened ({error.strerror}); the engine must run on the "
            "trainer's machine, as the same user and in the same process namespace"
        ) from error
    try:
        found = os.fstat(fd).st_size
        if found < size:
            raise ValueError(f"weights are truncated: {found} bytes of {size}")
        mapped = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(fd)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def read_tensors(
    data: Tensor, manifest: Iterable[list[Any]], expected: Mapping[str, tuple[int, ...]], dtype: str
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a mapped segment, each verified first.

    Args:
        expected: name -> shape of what the engine's model still needs.
        dtype: of the engine's model.

    Raises:
        ValueError: a name, shape, type, place or hash that is wrong, or a value not finite.
    """
    for name, sent_dtype, shape, offset, sent_digest in manifest:
        if name not in expected:
            raise ValueError(f"weight {name} is unknown to the model, or was sent twice")
        if tuple(shape) != tuple(expected[name]):
            raise ValueError(
                f"weight {name} has shape {list(shape)}; expected {list(expected[name])}"
            )
        if sent_dtype != dtype:
            raise ValueError(f"weight {name} has type {sent_dtype}; expected {dtype}")
        kind = getattr(torch, dtype)
        num_bytes = torch.Size(shape).numel() * kind.itemsize
        if not 0 <= offset <= len(data) - num_bytes:
            raise ValueError(f"weight {name} lies outside its segment of {len(data)} bytes")
        tensor = data[offset : offset + num_bytes].view(kind).view(shape)
        if digest(tensor) != sent_digest:
            raise ValueError(f"weight {name} changed on its way: hash {digest(tensor)}")
        if not is_finite(tensor):
            raise ValueError(f"weight {name} is not finite")
        yield name, tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass without a copy."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def send_weights(
    tensors: Iterable[tuple[str, Tensor]],
    client: WeightClient,
    dtype: torch.dtype,
    weight_version: str,
) -> Sent:
    """Drive one push: start, a segment for each layer, finish.

    The tensors are drawn on the calling thread, where collectives belong; the client is called from
    one other thread meanwhile, one call at a time.

    Args:
        dtype: that the engine computes in; tensors of another one are converted.

    Raises:
        EngineError: the engine refused, or is gone.
    """
    num_bytes = num_tensors = 0
    loading: tuple[Future, Segment] | None = None
    caller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-push")
    segment: Segment | None = None
    try:
        client.start_weight_update()
        for segment in _segments(tensors, dtype):
            loading = _finished(loading)
            num_bytes += segment.num_bytes
            num_tensors += len(segment.tensors)
            loading = caller.submit(client.update_weights, segment.update_info()), segment
        _finished(loading)
        loading = None
        client.finish_weight_update(weight_version)
    finally:
        if loading is not None:
            with suppress(EngineError):
                _finished(loading)
        if segment is not None:
            segment.close()
        caller.shutdown(wait=True)
    return Sent(num_bytes, num_tensors)


def _segments(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[Segment]:
    segment, key = None, None
    try:
        for name, tensor in tensors:
            if segment is not None and layer_key(name) != key:
                full, segment = segment, None
                yield full
            if segment is None:
                segment, key = Segment(), layer_key(name)
            segment.add(name, tensor.to(dtype))
            del tensor
        if segment is not None:
            full, segment = segment, None
            yield full
    finally:
        if segment is not None:
            segment.close()


def _finished(loading: tuple[Future, Segment] | None) -> None:
    """Wait until the engine has loaded a segment, and free it; the client has the deadline."""
    if loading is not None:
        future, segment = loading
        try:
            future.result()
        finally:
            segment.close()
