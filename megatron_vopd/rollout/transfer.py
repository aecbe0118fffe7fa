"""Weights on their way to an engine on this machine: layer by layer, through anonymous memory.

The tensors of one layer lie in a file that exists in memory only (memfd): the ranks of the trainer
build them there (`shared_gather`), or the sender copies them into it. The sender checks that they
are finite, and tells the engine where they are, with a manifest of names, shapes, types and hashes.
The engine's processes map the file, verify it against the manifest and against their own model,
and load it. While they load one layer the trainer builds the next, so two layers exist at a time,
whatever the size of the model.

Such a file has no name in /dev/shm: it goes when the last process that holds it ends, however it
ends. The reader opens it as /proc/PID/fd/FD, which takes the same user and the same process
namespace.

The control channel is any object with the methods of `WeightClient`, which are vLLM's own
(`VLLMWeightSyncClient`): a child process and an HTTP server both have them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """A file in memory with tensors and their manifest.

    Args:
        pid, fd: open this descriptor of that process, to build tensors in its file; without them
            the file is new.

    Raises:
        OSError: there is no such file, or it may not be opened.
    """

    def __init__(self, pid: int | None = None, fd: int = -1) -> None:
        if pid is None:
            self.fd = os.memfd_create("megatron_vopd_weights", os.MFD_CLOEXEC)
        else:
            self.fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._end = self._num_rooms = 0
        self._room: Tensor | None = None
        self.num_bytes = 0
        self.tensors: list[list[Any]] = []  # name, dtype, shape, offset, digest

    def make_room(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Tensors to be filled, inside the file; the same call finds the same ones in any process.

        They hold the file's memory until the last of them is dropped. Called once, first of all.
        """
        places = {}
        for name, shape in shapes.items():
            start = _aligned(self._end)
            self._end = start + torch.Size(shape).numel() * dtype.itemsize
            places[name] = (start, self._end)
        os.ftruncate(self.fd, self._end)
        room = torch.frombuffer(mmap.mmap(self.fd, self._end), dtype=torch.uint8)
        self._room, self._num_rooms = room, len(shapes)
        return {
            name: room[start:stop].view(dtype).view(shapes[name])
            for name, (start, stop) in places.items()
        }

    @property
    def is_complete(self) -> bool:
        """Whether as many tensors were added as room was made for."""
        return len(self.tensors) == self._num_rooms > 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Note a tensor that lies in the file, or append a copy of one that does not.

        It must not be changed afterwards, unless it was copied.
        """
        tensor = tensor.detach().contiguous().cpu()
        room = self._room
        if room is not None and _storage(tensor) == _storage(room):
            offset = tensor.data_ptr() - room.data_ptr()
        else:
            offset = _aligned(self._end)
            data = memoryview(_bytes(tensor))
            done = 0
            while done < len(data):  # one write transfers 2 GiB at most
                done += os.pwrite(self.fd, data[done:], offset + done)
            self._end = offset + len(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.tensors.append([name, dtype, list(tensor.shape), offset, digest(tensor)])
        self.num_bytes += tensor.nbytes

    def update_info(self) -> dict[str, Any]:
        """What the engine is told; JSON."""
        path = f"/proc/{os.getpid()}/fd/{self.fd}"
        return {"path": path, "size": self._end, "tensors": self.tensors}

    def close(self) -> None:
        """Give the memory back, once the engine has let go of it too. May be called twice."""
        self._room = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class WeightSource:
    """The tensors of one push, by HF name, layer by layer, drawn once.

    Args:
        take_segment: the memory file that the tensors of this layer were built in, the caller's to
            close from now on; None: in none, or it was taken already.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        take_segment: Callable[[], Segment | None] = lambda: None,
    ) -> None:
        self._tensors = iter(tensors)
        self.take_segment = take_segment

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors

    def finish(self) -> None:
        """Draw what an engine left, so that all ranks get through."""
        for pair in self._tensors:
            del pair  # a tensor keeps the memory of its layer


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
        ValueError: a name, shape, type, place or hash that is wrong.
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
        tensors: a `WeightSource`, or any others.
        dtype: that the engine computes in; tensors of another one are converted.

    Raises:
        EngineError: the engine refused, or is gone; or a value is not finite (any more).
    """
    source = tensors if isinstance(tensors, WeightSource) else WeightSource(tensors)
    num_bytes = num_tensors = 0
    loading: tuple[Future, Segment] | None = None
    caller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-push")
    segment: Segment | None = None
    try:
        client.start_weight_update()
        for segment in _segments(source, dtype):
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


def _segments(source: WeightSource, dtype: torch.dtype) -> Iterator[Segment]:
    """Each as soon as it is complete, before the first tensor of the next one is built."""
    segment, key = None, None
    try:
        for name, tensor in source:
            if segment is not None and layer_key(name) != key:
                full, segment = segment, None
                yield full
            if segment is None:
                segment, key = source.take_segment() or Segment(), layer_key(name)
            converted = tensor.to(dtype)
            if not is_finite(converted):
                raise EngineError(f"weight {name} is not finite as {dtype}")
            segment.add(name, converted)
            # What lies in a segment keeps its memory.
            del tensor, converted
            if segment.is_complete:
                full, segment = segment, None
                yield full
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
