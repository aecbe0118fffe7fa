"""Layers of the student, put together in memory that all ranks of one machine share.

Rank 0 makes a memory file for a layer (`memory_file`); every rank copies its own part of the HF
tensors to its place there, in the engines' type; the leaders give the file to their engines. So a
weight is copied once between the parameter and the engine, and no collective carries any.

Two collectives per layer, of 16 and 8 bytes:

    open     where the file is; no rank starts a layer before every leader is ready for it
    settle   all have written, or one could not, which is an error on all

So a layer is whole before any leader sends it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.collectives import sum_over_world
from megatron_vopd.errors import EngineError
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import LayerSpec, Unit, hf_shape
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.weights import own_pieces
from megatron_vopd.rollout.weights.memory_file import MemoryFile, Segment, room_size


def machine_id() -> str | None:
    """Name the processes that can open one another's memory files; None: none can.

    Same start of the same kernel, same process namespace, same user.
    """
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as boot:
        return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')} {os.geteuid()}"
    return None


class SharedGather:
    """A `Gather` through shared memory, for one walk over the weights after another.

    Args:
        dtype: type that the engines take.
        is_reused: files carry one layer after another; only where rank 0 has the only engine, so
            that it knows when a file is free.
    """

    def __init__(self, dtype: torch.dtype, is_reused: bool) -> None:
        self._dtype = dtype
        self._segment: Segment | None = None
        self._spare: list[MemoryFile] = []
        self._is_reused = is_reused and dist.get_rank() == 0

    def take_segment(self) -> Segment | None:
        """Hand over the segment of the current layer; see `send.WeightSource`."""
        segment, self._segment = self._segment, None
        return segment

    def __call__(
        self,
        units: Sequence[Unit],
        shards: Mapping[str, Tensor],
        facts: ModelFacts,
        groups: Groups,
        layer_spec: LayerSpec,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the layer's tensors on every rank; they last as long as their segment is open.

        Raises:
            EngineError: on every rank, if one of them could not write.
        """
        shapes = {name: hf_shape(name, facts) for unit in units for name in unit.hf_names()}
        tensors: dict[str, Tensor] = {}
        failure = ""
        try:
            segment = self._open(room_size(shapes, self._dtype))
            tensors = segment.make_room(shapes, self._dtype)
            for unit in units:
                for name, where, values in own_pieces(unit, shards, facts, groups, layer_spec):
                    tensors[name][where].copy_(values)
        except OSError as error:
            failure = f"; here: {error}"
        try:
            num_failed = int(sum_over_world(torch.tensor([bool(failure)], dtype=torch.int64)))
            if num_failed:
                raise EngineError(
                    f"weights: {num_failed} ranks could not write a layer to shared memory{failure}"
                )
            # No name keeps a tensor here: what is left of one keeps the memory of its layer.
            for name in shapes:
                yield name, tensors.pop(name)
        finally:
            self._drop()

    def _open(self, size: int) -> Segment:
        """Open the file of the next layer, which rank 0 makes, on every rank."""
        place = torch.zeros(2, dtype=torch.int64)
        if dist.get_rank() == 0:
            with suppress(OSError):
                spare = self._spare if self._is_reused else None
                self._segment = Segment(self._fitting_spare(size), spare)
                place = torch.tensor([os.getpid(), self._segment.file.fd])
        pid, fd = sum_over_world(place).tolist()
        if self._segment is None:
            self._segment = Segment(MemoryFile(pid, fd))
        return self._segment

    def _fitting_spare(self, size: int) -> MemoryFile | None:
        """Take a spare file that is large enough and wastes less than half, else close them all."""
        for number, file in enumerate(self._spare):
            if size <= len(file.room) < 2 * size:
                return self._spare.pop(number)
        self.close()
        return None

    def _drop(self) -> None:
        segment = self.take_segment()
        if segment is not None:
            segment.close()

    def close(self) -> None:
        """Give back the memory that no segment has. The gather can still be used."""
        while self._spare:
            self._spare.pop().close()
