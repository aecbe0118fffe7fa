"""The files of a megatron-core distributed checkpoint ("torch_dist"), written and read safely.

A folder holds `metadata.json` (the format), `.metadata` (a pickled index: for each tensor its
chunks, and for each chunk file, offset and length), `__RANK_0.distcp` files (chunks one
after another, each what `torch.save` writes) and `common.pt`.

Writing leaves `common.pt` empty and puts nothing but tensors into the index, so that megatron-core
loads the folder and finds nothing to unpickle but its own index. Reading makes no object from any
pickle (`safe_pickle`). What is inside a chunk is for `chunks`.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vopd.checkpoint.chunks import PAYLOAD_NAMES, Chunk
from megatron_vopd.checkpoint.safe_pickle import (
    Inert,
    PickleRefusedError,
    is_inert,
    is_named,
    read_inert,
)
from megatron_vopd.errors import shown
from megatron_vopd.files.atomic_file import FileError, regular_size
from megatron_vopd.hf.dtypes import DTYPES
from megatron_vopd.hf.folder import is_plain_name

INDEX_NAME, COMMON_NAME, CONFIG_NAME = ".metadata", "common.pt", "metadata.json"
CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_ALL_DTYPES = ("float64", "int64", "int32", "int16", "int8", "uint8", "bool", *DTYPES)
_MAX_INDEX_BYTES = 2**30

_DCP = "torch.distributed.checkpoint."
_INDEX_NAMES = {
    *(f"{_DCP}metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *(f"{_DCP}metadata.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"{_DCP}metadata.{name}" for name in ("ChunkStorageMetadata", "TensorProperties")),
    f"{_DCP}metadata._MEM_FORMAT_ENCODING",
    f"{_DCP}filesystem._StorageInfo",
    *(f"{_DCP}planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType")),
    f"{_DCP}planner.TensorWriteData",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
    "pathlib.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
    *(f"torch.{name}" for name in _ALL_DTYPES),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint: global shape, type by its torch name, and its chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def index_bytes(tensors: dict[str, StoredTensor]) -> bytes:
    """Make `.metadata` for these tensors, as torch's own classes pickle."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, Any] = {}
    placed = {}
    for key, tensor in tensors.items():
        chunks = [
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in tensor.chunks
        ]
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
        described[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for chunk in tensor.chunks:
            where = _StorageInfo(chunk.file, chunk.start, chunk.length)
            placed[MetadataIndex(key, chunk.offsets)] = where
    metadata = Metadata(described, storage_data=placed, storage_meta=StorageMeta(), version="1.0.0")
    return pickle.dumps(metadata, protocol=4)


def empty_common() -> bytes:
    """Make a `common.pt` with no state: what megatron-core looks for, and nothing in it."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return buffer.getvalue()


def config_bytes() -> bytes:
    return (json.dumps(CONFIG) + "\n").encode("ascii")


def read_index(folder: Path, skip_objects: bool = False) -> dict[str, StoredTensor]:
    """List every tensor of the checkpoint, with chunks that lie in its regular files.

    Args:
        skip_objects: leave pickled objects (`common.pt`, object entries) aside instead of refusing
            the folder; they are not read either way.

    Raises:
        FileError: naming file and tensor.
    """
    _check_config(folder)
    path = folder / INDEX_NAME
    size = regular_size(path)
    if size is None or size > _MAX_INDEX_BYTES:
        raise FileError(f"{path}: missing, a link or too large; give a whole checkpoint folder")
    if not skip_objects:
        _check_common(folder / COMMON_NAME)
    try:
        with open(path, "rb") as file:
            metadata = read_inert(file, _INDEX_NAMES)
        if not is_inert(metadata, f"{_DCP}metadata.Metadata"):
            raise PickleRefusedError("holds no Metadata")
        tensors, objects = _tensors(metadata)
    except PickleRefusedError as error:
        raise FileError(f"{path}: {error}; restore the checkpoint") from None
    if objects and not skip_objects:
        raise FileError(
            f"{path}: {shown(objects[0])} is a pickled object, which is not read; use "
            "--weights-only to convert the tensors without it"
        )
    sizes: dict[str, int | None] = {}
    for key, tensor in tensors.items():
        _check_places(folder, key, tensor, sizes)
    return tensors


def _check_config(folder: Path) -> None:
    path = folder / CONFIG_NAME
    if regular_size(path) is None:
        raise FileError(f"{path}: not found; give a folder of megatron-core's torch_dist format")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise FileError(f"{path}: no valid JSON; restore the checkpoint") from None
    if not isinstance(config, dict) or config.get("sharded_backend") != "torch_dist":
        raise FileError(f"{path}: not the torch_dist format; save the checkpoint in it")


def _check_common(path: Path) -> None:
    """Refuse a `common.pt` that names anything beyond tensors and plain containers."""
    if not os.path.lexists(path):
        return
    try:
        if regular_size(path) is None:
            raise PickleRefusedError("not a regular file")
        with zipfile.ZipFile(path) as archive:
            inner = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            for name in inner:
                read_inert(io.BytesIO(archive.read(name)), PAYLOAD_NAMES)
    except (PickleRefusedError, zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(
            f"{path}: {reason}; it is not read: use --weights-only to convert the tensors "
            "without it"
        ) from None


def _ints(value: Any) -> tuple[int, ...]:
    """Read a pickled torch.Size."""
    if is_inert(value, "torch.Size"):
        value = value.args[0] if value.args else ()
    if not isinstance(value, tuple | list) or not all(type(part) is int for part in value):
        raise PickleRefusedError("holds a size that is no list of integers")
    return tuple(value)


def _tensors(metadata: Inert) -> tuple[dict[str, StoredTensor], list[str]]:
    """Read the tensors, and the keys of object entries."""
    described, places = metadata.field("state_dict_metadata"), metadata.field("storage_data")
    if not isinstance(described, dict) or not isinstance(places, dict):
        raise PickleRefusedError("holds no dictionaries of tensors")
    placed: dict[tuple[str, tuple[int, ...]], Inert] = {}
    for index, info in places.items():
        # Objects have no offset.
        known = isinstance(index, Inert) and isinstance(index.state, dict)
        offset = index.state.get("offset") if known else None
        if offset is not None and isinstance(info, Inert):
            placed[index.field("fqn"), _ints(offset)] = info
    tensors, objects = {}, []
    for key, entry in described.items():
        if not isinstance(key, str) or not isinstance(entry, Inert):
            raise PickleRefusedError("holds an entry without a name")
        if entry.name.endswith("BytesStorageMetadata"):
            objects.append(key)
            continue
        chunks = [_chunk(key, chunk, placed) for chunk in _items(entry.field("chunks"))]
        shape, dtype = _ints(entry.field("size")), _dtype(entry)
        tensors[key] = StoredTensor(dtype, shape, tuple(chunks))
    return tensors, objects


def _items(value: Any) -> list[Inert]:
    if not isinstance(value, list) or not all(isinstance(item, Inert) for item in value):
        raise PickleRefusedError("holds chunks that are no list")
    return value


def _dtype(entry: Inert) -> str:
    properties = entry.field("properties")
    state = properties.state if isinstance(properties, Inert) else None
    for name in _ALL_DTYPES:
        if isinstance(state, tuple) and state and is_named(state[0], f"torch.{name}"):
            return name
    raise PickleRefusedError("holds a tensor of unknown type")


def _chunk(key: str, chunk: Inert, placed: dict) -> Chunk:
    offsets, sizes = _ints(chunk.field("offsets")), _ints(chunk.field("sizes"))
    info = placed.get((key, offsets))
    if info is None:
        raise PickleRefusedError(f"names no place for {shown(key)} at {offsets}")
    if info.state.get("transform_descriptors"):
        raise PickleRefusedError(f"says that {shown(key)} is transformed, which is not supported")
    start, length = info.field("offset"), info.field("length")
    if type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise PickleRefusedError(f"names no place for {shown(key)} at {offsets}")
    return Chunk(offsets, sizes, info.field("relative_path"), start, length)


def _check_places(
    folder: Path, key: str, tensor: StoredTensor, file_sizes: dict[str, int | None]
) -> None:
    """Refuse chunks that do not tile the tensor, or lie outside the folder's regular files."""
    where = f"{folder / INDEX_NAME}: {shown(key)}"
    for chunk in tensor.chunks:
        if not is_plain_name(chunk.file) or not chunk.file.endswith(".distcp"):
            raise FileError(
                f"{where} lies in {shown(chunk.file)}; expected a .distcp file of this folder"
            )
        if chunk.file not in file_sizes:
            file_sizes[chunk.file] = regular_size(folder / chunk.file)
        size = file_sizes[chunk.file]
        if size is None:
            raise FileError(f"{folder / chunk.file}: missing or a link; {shown(key)} is in it")
        if chunk.start + chunk.length > size:
            raise FileError(
                f"{folder / chunk.file}: ends at byte {size:,}, but {shown(key)} lies up to "
                f"{chunk.start + chunk.length:,}; restore the file"
            )
    problem = tiling_problem(
        tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
    )
    if problem:
        raise FileError(f"{where} {problem}; restore the checkpoint")


def tiling_problem(
    shape: tuple[int, ...], rectangles: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
) -> str:
    """Say why these (offsets, sizes) do not fill `shape` exactly once; empty if they do."""
    filled, seen = 0, set()
    for offsets, sizes in rectangles:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"has a chunk of {len(sizes)} dimensions instead of {len(shape)}"
        ends = zip(offsets, sizes, shape, strict=True)
        if any(at < 0 or n < 0 or at + n > whole for at, n, whole in ends) or offsets in seen:
            return f"has a chunk at {offsets} that overlaps or leaves shape {shape}"
        seen.add(offsets)
        filled += math.prod(sizes)
    whole = math.prod(shape)
    return "" if filled == whole else f"has {filled:,} of {whole:,} values"
