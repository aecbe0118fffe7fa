"""Weights in memory that several processes see: files without a name, and tensors in them.

A `MemoryFile` (memfd) has no name in /dev/shm: it goes when the last process that holds it ends,
however it ends. Another process opens it as /proc/PID/fd/FD, which takes the same user and the same
process namespace.

A `Segment` is the tensors of one layer in such a file, with a manifest of names, types, shapes,
places and hashes; `MappedSegment` is the reader's side. A file may carry one layer after another:
fresh memory costs several times what writing it does. The first byte of a file protects a reader
from that: it sets the byte when it still needs a tensor after the call that announced the segment,
and the writer then leaves the file to it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

ALIGNMENT = 64  # of a tensor in its file, and the size of what is before the first: a cache line


class MemoryFile:
    """A file in anonymous memory.

    Args:
        pid, fd: open this descriptor of that process; without them the file is new.

    Raises:
        OSError: there is no such file, or it may not be opened.
    """

    def __init__(self, pid: int | None = None, fd: int = -1) -> None:
        if pid is None:
            self.fd = os.memfd_create("megatron_vopd_weights", os.MFD_CLOEXEC)
        else:
            self.fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self.room = torch.empty(0, dtype=torch.uint8)

    def map(self, size: int) -> Tensor:
        """Map the file's first bytes [at least size]; the file grows where it must."""
        if len(self.room) < size:
            if os.fstat(self.fd).st_size < size:
                os.ftruncate(self.fd, size)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            mapped = mmap.mmap(self.fd, size, flags=flags)
            self.room = torch.frombuffer(mapped, dtype=torch.uint8)
        return self.room

    @property
    def is_held(self) -> bool:
        """True while a reader still needs what lies in the file."""
        return os.pread(self.fd, 1, 0) not in (b"", b"\0")

    def close(self) -> None:
        """Let go of the descriptor, and of the memory once no tensor lies in it. Once only."""
        self.room = torch.empty(0, dtype=torch.uint8)
        os.close(self.fd)


class Segment:
    """Tensors in a memory file, and their manifest.

    Args:
        file: None: a new one.
        spare: where `close` leaves the file for the next segment; None: it is closed.
    """

    def __init__(
        self, file: MemoryFile | None = None, spare: list[MemoryFile] | None = None
    ) -> None:
        self._file: MemoryFile | None = file or MemoryFile()
        self._spare = spare
        self._end, self._num_rooms = ALIGNMENT, 0
        self.num_bytes = 0
        self.tensors: list[list[Any]] = []  # name, dtype, shape, offset, digest

    @property
    def file(self) -> MemoryFile:
        """The memory file; only until the segment is closed."""
        assert self._file is not None, "the segment is closed"
        return self._file

    def make_room(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Place tensors to be filled; the same call in any process finds the same places.

        They hold the file's memory until the last of them is dropped. Called once, first of all.
        """
        places = room_places(shapes, dtype)
        self._end, self._num_rooms = room_size(shapes, dtype), len(shapes)
        room = self.file.map(self._end)
        return {
            name: room[start:stop].view(dtype).view(shapes[name])
            for name, (start, stop) in places.items()
        }

    @property
    def is_complete(self) -> bool:
        """True once as many tensors were added as room was made for."""
        return len(self.tensors) == self._num_rooms > 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Note a tensor that lies in the file, or append a copy of one that does not.

        It must not be changed afterwards, unless it was copied.
        """
        tensor = tensor.detach().contiguous().cpu()
        room = self.file.room
        if len(room) and _storage(tensor) == _storage(room):
            offset = tensor.data_ptr() - room.data_ptr()
        else:
            offset = _aligned(self._end)
            data = memoryview(_bytes(tensor))
            done = 0
            while done < len(data):  # one write transfers 2 GiB at most
                done += os.pwrite(self.file.fd, data[done:], offset + done)
            self._end = offset + len(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.tensors.append([name, dtype, list(tensor.shape), offset, digest(tensor)])
        self.num_bytes += tensor.nbytes

    def update_info(self) -> dict[str, Any]:
        """Return the manifest that the engine gets, as JSON values."""
        path = f"/proc/{os.getpid()}/fd/{self.file.fd}"
        return {"path": path, "size": self._end, "tensors": self.tensors}

    def close(self) -> None:
        """Give the memory back, once the engine has let go of it too. May be called twice."""
        file, self._file = self._file, None
        if file is None:
            return
        if self._spare is None or file.is_held:
            file.close()
        else:
            self._spare.append(file)


def room_places(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, tuple[int, int]]:
    """Return each tensor's first byte in its file, and the one after its last."""
    places, end = {}, ALIGNMENT
    for name, shape in shapes.items():
        start = _aligned(end)
        end = start + torch.Size(shape).numel() * dtype.itemsize
        places[name] = (start, end)
    return places


def room_size(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Return the bytes of a file with room for such tensors."""
    return max((stop for _, stop in room_places(shapes, dtype).values()), default=ALIGNMENT)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class MappedSegment:
    """The reader's side of a segment.

    Attributes:
        data: its bytes [size], shared with the writer.

    Raises:
        ValueError: the file is not there, or shorter than announced.
    """

    def __init__(self, path: str, size: int) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(
                f"weights at {path} cannot be opened ({error.strerror}); the engine must run on "
                "the trainer's machine, as the same user and in the same process namespace"
            ) from error
        try:
            found = os.fstat(fd).st_size
            if found < size:
                raise ValueError(f"weights are truncated: {found} bytes of {size}")
            mapped = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)
        self._path = path
        self._mapped = weakref.ref(mapped)
        self.data: Tensor | None = torch.frombuffer(mapped, dtype=torch.uint8)

    def release(self) -> None:
        """Let go of the bytes; mark the file if a tensor of them is left.

        Called while the writer waits for the answer.
        """
        self.data = None
        if self._mapped() is not None:
            with open(self._path, "r+b", buffering=0) as file:
                file.write(b"\1")


def read_tensors(
    data: Tensor, manifest: Iterable[list[Any]], missing: dict[str, tuple[int, ...]], dtype: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a mapped segment, each verified first.

    Args:
        missing: name -> shape of what the engine's model still needs; what comes is taken out.
        dtype: of the engine's model.

    Raises:
        ValueError: a name, shape, type, place or hash that is wrong.
    """
    for name, sent_dtype, shape, offset, sent_digest in manifest:
        if name not in missing:
            raise ValueError(f"weight {name} is unknown to the model, or was sent twice")
        if tuple(shape) != tuple(missing[name]):
            raise ValueError(
                f"weight {name} has shape {list(shape)}; expected {list(missing[name])}"
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
        del missing[name]
        yield name, tensor


def digest(tensor: Tensor) -> str:
    """Return the xxh3-128 of a contiguous tensor's bytes."""
    return xxhash.xxh3_128(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
