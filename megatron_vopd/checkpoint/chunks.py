"""The chunks of a `.distcp` file: written as `torch.save` does, mapped back without unpickling.

A chunk is a zip that holds a pickled header (type, shape, strides) and the raw values.
Reading checks the header against the index, the size, and the zip's own checksum of the values,
then maps the values from the file: no copy of a chunk is made.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.checkpoint.safe_pickle import PickleRefusedError, is_inert, is_named, read_inert
from megatron_vopd.errors import shown
from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.atomic_folder import OutputFile
from megatron_vopd.hf.dtypes import DTYPES
from megatron_vopd.hf.tensors import as_bytes

_ALIGNMENT = 64
# Name of the type by the class that torch.save names; random states are bytes.
_STORAGES = {row.storage: row.name for row in DTYPES.values()} | {"ByteStorage": "uint8"}
PAYLOAD_NAMES = {
    "torch._utils._rebuild_tensor_v2",
    "collections.OrderedDict",
    *(f"torch.{name}" for name in _STORAGES),
}


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a stored tensor, and the bytes of its file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def write_payload(file: OutputFile, tensor: Tensor) -> tuple[int, int]:
    """Append one chunk as `torch.save` lays it out; returns its start and length in the file.

    Raises:
        FileError: the file cannot be written.
    """
    file.write(bytes(-file.size % _ALIGNMENT))
    start = file.size
    # A storage of exactly these values: torch.save would write all of a larger one.
    values = as_bytes(tensor).view(tensor.dtype).view(tensor.shape)
    try:
        torch.save(values, file)  # type: ignore[arg-type]
    except RuntimeError as error:
        # An archive that cannot be closed hides why it could not be written.
        if isinstance(error.__context__, FileError):
            raise error.__context__ from None
        raise
    return start, file.size - start


class ChunkReader:
    """The open files of chunks, whose values it maps. A context manager.

    Args:
        hashed: files whose hash was just verified; the checksums in them are not computed again.
    """

    def __init__(self, folder: Path, hashed: Collection[str] = ()) -> None:
        self._folder = folder
        self._hashed = hashed
        self._maps: dict[str, mmap.mmap] = {}

    def __enter__(self) -> ChunkReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._maps.clear()

    def values(self, key: str, dtype: str, chunk: Chunk) -> Tensor:
        """Map the chunk from the file as uint8 [*sizes[:-1], sizes[-1] * item size].

        Raises:
            FileError: the bytes are not such a chunk, or do not match their checksum.
        """
        if chunk.file not in self._maps:
            with open(self._folder / chunk.file, "rb") as file:
                # A private map: pages stay those of the file, nothing is copied.
                self._maps[chunk.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = self._maps[chunk.file]
        item_size = getattr(torch, dtype).itemsize
        num_bytes = math.prod(chunk.sizes) * item_size
        try:
            start = _payload_start(mapped, chunk, dtype, num_bytes, chunk.file in self._hashed)
        except (PickleRefusedError, zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
            reason = str(error).partition("\n")[0]
            raise FileError(
                f"{self._folder / chunk.file}: {shown(key)} at {chunk.offsets}: {reason}; "
                "restore the file"
            ) from None
        shape = (*chunk.sizes[:-1], chunk.sizes[-1] * item_size)
        if not num_bytes:
            return torch.empty(shape, dtype=torch.uint8)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=start).view(
            shape
        )


class _Region(io.RawIOBase):
    """A stretch of a mapped file, as zipfile reads files."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int) -> None:
        self._mapped, self._start, self._length, self._at = mapped, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(0, self._length - self._at)
        count = rest if size is None or size < 0 else min(size, rest)
        begin = self._start + self._at
        self._at += count
        return self._mapped[begin : begin + count]


def _payload_start(
    mapped: mmap.mmap, chunk: Chunk, dtype: str, num_bytes: int, is_hashed: bool
) -> int:
    """Find where the raw values begin, after checking header, size and checksum."""
    region = _Region(mapped, chunk.start, chunk.length)
    with zipfile.ZipFile(region) as archive:  # type: ignore[arg-type]
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if not {"data.pkl", "data/0"} <= entries.keys():
            raise PickleRefusedError("holds no tensor")
        order = entries.get("byteorder")
        if order is not None and archive.read(order) != b"little":
            raise PickleRefusedError("has another byte order")
        header = read_inert(io.BytesIO(archive.read(entries["data.pkl"])), PAYLOAD_NAMES)
    _check_header(header, chunk, dtype)
    info = entries["data/0"]
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != num_bytes:
        raise PickleRefusedError(f"has {info.file_size:,} bytes of values, expected {num_bytes:,}")
    local = chunk.start + info.header_offset
    name_size = int.from_bytes(mapped[local + 26 : local + 28], "little")
    extra_size = int.from_bytes(mapped[local + 28 : local + 30], "little")
    start = local + 30 + name_size + extra_size
    if start + num_bytes > chunk.start + chunk.length:
        raise PickleRefusedError("ends before its values do")
    with memoryview(mapped) as view, view[start : start + num_bytes] as values:
        if not is_hashed and zlib.crc32(values) != info.CRC:
            raise PickleRefusedError("values do not match their checksum")
    return start


def _check_header(header: Any, chunk: Chunk, dtype: str) -> None:
    """Refuse a header of anything but a contiguous tensor of the size in the index."""
    if not is_inert(header, "torch._utils._rebuild_tensor_v2") or len(header.args) < 4:
        raise PickleRefusedError("holds no tensor")
    storage, offset, size, stride = header.args[:4]
    kind = storage[1] if isinstance(storage, tuple) and len(storage) == 5 else None
    names = {f"torch.{name}" for name, of in _STORAGES.items() if of == dtype}
    if not any(is_named(kind, name) for name in names):
        raise PickleRefusedError(f"is not of type {dtype}, which the index gives")
    expected = torch.empty(chunk.sizes, device="meta").stride()
    # A dimension of one entry may have any stride.
    strides_fit = isinstance(stride, tuple) and len(stride) == len(chunk.sizes)
    strides_fit = strides_fit and all(
        got == want or n <= 1 for got, want, n in zip(stride, expected, chunk.sizes, strict=True)
    )
    if offset != 0 or size != chunk.sizes or not strides_fit:
        raise PickleRefusedError(f"has shape {shown(size)}, the index gives {chunk.sizes}")
