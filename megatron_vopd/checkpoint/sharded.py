"""Sharded state, as megatron-core describes it, written to and read from a checkpoint folder.

megatron-core's `sharded_state_dict()` says for each local tensor its key, its place in the global
tensor, and which of its replicas is to be saved. This module writes those tensors one by one
(`ShardFile`, one per rank; `complete`, rank 0) and fills them again in any layout
(`CheckpointReader`). Values need not exist before their turn: an entry of a model on the meta
device can be given its values just for the write (`with_values`).

megatron-core's own save and load are not used: they start writers whose death hangs the save, hash
nothing, unpickle what they find, and let unknown keys and wrong types pass. The folders are the
same: `megatron.core.dist_checkpointing.load` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor

from megatron_vopd.checkpoint.chunks import Chunk, ChunkReader, write_payload
from megatron_vopd.checkpoint.index import (
    COMMON_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    StoredTensor,
    config_bytes,
    empty_common,
    index_bytes,
    read_index,
    tiling_problem,
)
from megatron_vopd.collectives import all_ranks, from_all_ranks
from megatron_vopd.errors import shown
from megatron_vopd.files.atomic_file import FileError, regular_size
from megatron_vopd.files.atomic_folder import OutputFile, Staging
from megatron_vopd.hf.folder import read_json
from megatron_vopd.hf.tensors import dtype_name

STATE_NAME = "common.json"
STATE_FORMAT = 1

_EXTRA_STATE = re.compile(r"_extra_state[0-9]*")

Entry = ShardedTensor | ShardedTensorFactory
Slices = tuple[slice, ...]
# Key, type, global shape, place: what rank 0 needs to know of a chunk that some rank wrote.
Written = tuple[str, str, tuple[int, ...], Chunk]


def entries(sharded_state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Entry]:
    """List the tensors of a sharded state dict by local name, without `_extra_state` objects.

    TransformerEngine's modules have such objects, grouped ones an `_extra_state{e}` of each expert;
    they hold nothing without FP8.

    Raises:
        TypeError: another object than a tensor, which would have to be pickled.
    """
    found: dict[str, Entry] = {}
    for name, value in sharded_state_dict.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= entries(value, f"{path}.")
        elif isinstance(value, ShardedObject) and _EXTRA_STATE.fullmatch(path.rpartition(".")[2]):
            continue
        elif isinstance(value, Entry):
            found[path] = value
        else:
            raise TypeError(f"{path}: {type(value).__name__} cannot be saved without pickling it")
    return found


def with_values(entry: Entry, values: Tensor) -> list[ShardedTensor]:
    """Return the shards of one entry as views of `values`, which has the local shape."""
    entry = replace(entry, data=values)
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    return list(nested_values(built))


def shards(entry: Entry) -> list[ShardedTensor]:
    """Return the shards of one entry as views of its data (maybe on the meta device)."""
    return with_values(entry, entry.data)  # type: ignore[arg-type]


def renamed(entry: Entry, prefix: str, dtype: torch.dtype) -> Entry:
    """Return the entry's place for values of another meaning and type: an optimizer's, say."""
    changes: dict[str, Any] = {"key": f"{prefix}.{entry.key}"}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = dtype
    return replace(entry, data=torch.empty_like(entry.data, dtype=dtype, device="meta"), **changes)  # type: ignore[arg-type]


def rank_row(key: str, values: Tensor) -> ShardedTensor:
    """Return this rank's row of a tensor [world, n] to which every rank adds n values."""
    place = (0, dist.get_rank(), dist.get_world_size())
    return ShardedTensor.from_rank_offsets(key, values[None], place)


def is_same_place(first: Tensor | None, second: Tensor) -> bool:
    """Return whether two views of one tensor (maybe on the meta device) are the same part."""
    assert first is not None
    return (first.storage_offset(), first.shape) == (second.storage_offset(), second.shape)


class ShardFile:
    """The chunks that one rank writes, one after another. A context manager."""

    def __init__(self, staging: Staging, rank: int) -> None:
        self._staging, self._name = staging, f"__{rank}_0.distcp"
        self._stack = ExitStack()
        self._file: OutputFile | None = None
        self.written: list[Written] = []

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, shard: ShardedTensor) -> None:
        """Append one shard with its values."""
        if self._file is None:
            self._file = self._stack.enter_context(self._staging.create(self._name))
        assert shard.data is not None
        sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        start, length = write_payload(self._file, shard.data.contiguous().view(sizes))
        chunk = Chunk(tuple(shard.global_offset), sizes, self._name, start, length)
        shape = tuple(shard.global_shape)
        self.written.append((shard.key, dtype_name(shard.data.dtype), shape, chunk))


def is_saved_here(entry: Entry) -> bool:
    """Return whether this rank holds the replica of the entry that is saved."""
    return is_main_replica(entry.replica_id)


def complete(staging: Staging, written: Iterable[Written], state: dict[str, Any]) -> None:
    """Write index, format and common state over the chunks of all ranks. For rank 0.

    Args:
        state: everything that is not a tensor, as JSON values.
    """
    tensors: dict[str, StoredTensor] = {}
    for key, dtype, shape, chunk in written:
        known = tensors.setdefault(key, StoredTensor(dtype, shape, ()))
        assert (known.dtype, known.shape) == (dtype, shape), key
        tensors[key] = replace(known, chunks=(*known.chunks, chunk))
    for key, tensor in tensors.items():
        places = [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
        problem = tiling_problem(tensor.shape, places)
        assert not problem, f"{key} {problem}"
    staging.write(INDEX_NAME, index_bytes(tensors))
    staging.write(COMMON_NAME, empty_common())
    staging.write(CONFIG_NAME, config_bytes())
    text = json.dumps({"format": STATE_FORMAT, **state}, indent=1, sort_keys=True)
    staging.write(STATE_NAME, (text + "\n").encode("ascii"))


def read_state(folder: Path) -> dict[str, Any]:
    """Read the common state of a checkpoint of ours; empty for one that has none."""
    path = folder / STATE_NAME
    if regular_size(path) is None:
        return {}
    state = read_json(path)
    if state.get("format") != STATE_FORMAT:
        raise FileError(
            f"{path}: format {shown(state.get('format'))}, expected {STATE_FORMAT}; use the "
            "version that wrote it"
        )
    return state


# What the local layers called the norm before experts up to version 0.1.0, and its name since.
_FORMER_NORM, _PRESENT_NORM = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"


def _present_keys(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors by their present keys, in whichever version they were stored."""
    if not any(key.endswith("mlp.router.weight") for key in tensors):
        return dict(tensors)
    return {key.replace(_FORMER_NORM, _PRESENT_NORM): value for key, value in tensors.items()}


class CheckpointReader:
    """A checkpoint folder that fills shards, whatever layout wrote it. A context manager.

    Args:
        skip_objects: leave pickled objects unread instead of refusing the folder.
        hashed: files whose hash was just verified.
    """

    def __init__(
        self, folder: Path, skip_objects: bool = False, hashed: Collection[str] = ()
    ) -> None:
        self.folder = folder
        self.tensors = _present_keys(read_index(folder, skip_objects))
        self._values = ChunkReader(folder, hashed)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._values.__exit__(*error)

    def require(self, wanted: Iterable[ShardedTensor], dtype: str | None = None) -> set[str]:
        """Check that the checkpoint has these shards; returns their keys.

        Args:
            dtype: the type that the stored values must have; None: that of each shard.

        Raises:
            FileError: a missing tensor, another global shape, another type.
        """
        keys = set()
        for shard in wanted:
            where = f"{self.folder / INDEX_NAME}: {shard.key}"
            stored = self.tensors.get(shard.key)
            if stored is None:
                raise FileError(f"{where} is missing; the model's config asks for it")
            shape = tuple(shard.global_shape)
            same_rows = len(stored.shape) == len(shape) and stored.shape[1:] == shape[1:]
            if stored.shape != shape and not (shard.allow_shape_mismatch and same_rows):
                raise FileError(
                    f"{where} has shape {stored.shape}; the model's config asks for {shape}"
                )
            expected = dtype or dtype_name(shard.dtype)
            if stored.dtype != expected:
                raise FileError(f"{where} is {stored.dtype}, expected {expected}")
            keys.add(shard.key)
        return keys

    def require_only(self, keys: Collection[str], ignored: tuple[str, ...] = ()) -> None:
        """Raise FileError for a stored tensor that is not among `keys`.

        Args:
            ignored: prefixes of tensors that may be there, such as an optimizer's.
        """
        for key in self.tensors:
            if key not in keys and not key.startswith(ignored):
                raise FileError(
                    f"{self.folder / INDEX_NAME}: unexpected tensor {shown(key)}; the model's "
                    "config describes no such weight"
                )

    def mapped(self, shard: ShardedTensor) -> Tensor | None:
        """Map the shard's values from the file where one chunk holds just them; else None."""
        stored = self.tensors[shard.key]
        sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        for chunk in stored.chunks:
            if (chunk.offsets, chunk.sizes) == (tuple(shard.global_offset), sizes):
                dtype = getattr(torch, stored.dtype)
                values = self._values.values(shard.key, stored.dtype, chunk)
                is_aligned = values.data_ptr() % dtype.itemsize == 0
                return values.view(dtype).view(tuple(shard.local_shape)) if is_aligned else None
        return None

    @torch.no_grad()
    def fill(self, shard: ShardedTensor) -> None:
        """Copy the shard's values into its data, which must lie in one piece.

        Rows beyond the stored tensor (vocabulary padding of another layout) become zero.
        """
        assert shard.data is not None and shard.data.is_contiguous(), shard.key
        stored = self.tensors[shard.key]
        item_size = shard.data.element_size()
        sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        target = shard.data.detach().view(sizes).view(torch.uint8)
        if stored.shape != tuple(shard.global_shape):
            target.zero_()
        for chunk in stored.chunks:
            common = _overlap(tuple(shard.global_offset), sizes, chunk)
            if common is None:
                continue
            source = self._values.values(shard.key, stored.dtype, chunk)
            here, there = (_bytes_of(part, item_size) for part in common)
            target[here].copy_(source[there])


def _overlap(
    offsets: tuple[int, ...], sizes: tuple[int, ...], chunk: Chunk
) -> tuple[Slices, Slices] | None:
    """Return what a shard and a chunk have in common, as slices of each; None for nothing."""
    here, there = [], []
    for at, size, other, other_size in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True):
        low, high = max(at, other), min(at + size, other + other_size)
        if low >= high:
            return None
        here.append(slice(low - at, high - at))
        there.append(slice(low - other, high - other))
    return tuple(here), tuple(there)


def _bytes_of(part: Slices, item_size: int) -> Slices:
    last = part[-1]
    return (*part[:-1], slice(last.start * item_size, last.stop * item_size))


def load_entries(
    wanted: Mapping[str, Entry],
    reader: CheckpointReader,
    ignored: tuple[str, ...] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Fill every entry's data in place. Every rank of the world calls this, with its own entries.

    Raises:
        FileError: keys, shapes and types are not exactly those of the checkpoint.
    """
    local = [shard for entry in wanted.values() for shard in shards(entry)]
    keys = set[str]().union(*from_all_ranks(reader.require, local))
    all_ranks(reader.require_only, keys, ignored)
    all_ranks(_fill_all, local, reader, advance)


def _fill_all(
    local: list[ShardedTensor], reader: CheckpointReader, advance: Callable[[int], None]
) -> None:
    for shard in local:
        reader.fill(shard)
        assert shard.data is not None
        advance(shard.data.nbytes)


HF_DIR = "hf"
