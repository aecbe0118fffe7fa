"""One rank of a world of any size in this process, which notes what the rank sends and waits for.

`join(rank, size)` makes this process rank `rank`; groups are `RecordedGroup`s. A collective ends at
once: what other ranks would contribute is taken to equal this rank's own, and what would come from
one other rank to be zeros. Values are therefore wrong wherever ranks differ; which operations run,
in which order and on what sizes, is right as long as no rank decides by such a value. What a
pipeline stage receives is of `Recorder.shape`, which the caller sets.

An event is a tuple that begins with its kind:

    ("group", name, ranks)              this rank connects to the members of a new group
    ("all", name, operation, size)      a collective; size: dtypes and numbers of elements
    ("split", name, to, from)           an all-to-all: elements to and from each member
    ("batch", ((name, direction, peer, size), ...))     sends and receives posted together
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

Event = tuple[Any, ...]
BACKEND = "recorder"


class Recorder:
    """What this process's rank did, and what it is told of the other ranks.

    Attributes:
        events: in the order of the program.
        asked: keyword arguments of each call of `new_group`.
        shape: what a pipeline stage receives next, where shapes are sent.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.asked: list[dict[str, Any]] = []
        self.shape: tuple[int, ...] = ()
        self.is_open = True
        self._batch: list[Event] | None = None

    def note(self, *event: Any) -> None:
        if self.is_open:
            self.events.append(event)

    def post(self, *operation: Any) -> None:
        """Note a send or a receive: in the batch that is being posted, or alone."""
        if self._batch is not None:
            self._batch.append(operation)
        else:
            self.note("batch", (operation,))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Note nothing inside."""
        before, self.is_open = self.is_open, False
        try:
            yield
        finally:
            self.is_open = before

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Note what is posted inside as one event."""
        self._batch = []
        try:
            yield
        finally:
            operations, self._batch = self._batch, None
            self.note("batch", tuple(operations))


class _Options:
    _timeout = datetime.timedelta(minutes=10)


class _Done(dist.Work):
    def __init__(self) -> None:
        super().__init__()
        self._future: torch.futures.Future[None] = torch.futures.Future()
        self._future.set_result(None)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


def _size(*tensors: Any) -> tuple[Any, ...]:
    flat = [one for part in tensors for one in (part if isinstance(part, list) else [part])]
    return tuple((str(one.dtype).removeprefix("torch."), one.numel()) for one in flat)


def name_of(group: Any) -> str:
    """Return the name by which a group's members find one another in the store."""
    return dist.distributed_c10d._get_process_group_name(group)


class RecordedGroup(dist.ProcessGroup):
    """A process group of one process; see the module's text."""

    def __init__(self, recorder: Recorder, rank: int, size: int) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self.recorder = recorder
        self.options = _Options()

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return BACKEND

    def _get_backend(self, _device: torch.device) -> RecordedGroup:
        return self

    @property
    def supports_coalescing(self) -> bool:
        return False

    def _note(self, operation: str, *tensors: Any) -> _Done:
        self.recorder.note("all", name_of(self), operation, _size(*tensors))
        return _Done()

    def allreduce(self, tensors: list[Tensor], *_: Any) -> Any:
        return self._note("allreduce", tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], *_: Any) -> Any:
        return self._note("allreduce", tensors)

    def reduce(self, tensors: list[Tensor], *_: Any) -> Any:
        return self._note("reduce", tensors)

    def broadcast(self, tensors: list[Tensor], options: Any, *_: Any) -> Any:
        if options.rootRank != self.rank():
            for tensor in tensors:
                tensor.zero_()
        return self._note(f"broadcast from {options.rootRank}", tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any) -> Any:
        (everyone,), (own,) = outputs, inputs
        for output in everyone:
            output.copy_(own.clone())
        return self._note("allgather", inputs)

    def _allgather_base(self, output: Tensor, own: Tensor, *_: Any) -> Any:
        output.view(self.size(), -1).copy_(own.clone().reshape(1, -1))
        return self._note("allgather", own)

    def all_gather_single(self, *args: Any) -> Any:
        return self._allgather_base(*args)

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], *_: Any
    ) -> Any:
        with self.recorder.quiet():
            for output, own in zip(outputs, inputs, strict=True):
                self._allgather_base(output, own)
        return self._note("allgather", inputs)

    def all_gather_single_coalesced(self, *args: Any) -> Any:
        return self.allgather_into_tensor_coalesced(*args)

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, *_: Any) -> Any:
        output.copy_(whole.reshape(self.size(), -1)[self.rank()].clone().view_as(output))
        return self._note("reduce_scatter", whole)

    def reduce_scatter_single(self, *args: Any) -> Any:
        return self._reduce_scatter_base(*args)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], *_: Any
    ) -> Any:
        with self.recorder.quiet():
            for output, whole in zip(outputs, inputs, strict=True):
                self._reduce_scatter_base(output, whole)
        return self._note("reduce_scatter", inputs)

    def reduce_scatter_single_coalesced(self, *args: Any) -> Any:
        return self.reduce_scatter_tensor_coalesced(*args)

    def alltoall_base(
        self, output: Tensor, own: Tensor, received: Sequence[int], sent: Sequence[int], *_: Any
    ) -> Any:
        output.zero_()
        width, size = own.shape[1:].numel(), self.size()
        rows = [
            [int(one) * width for one in splits] if len(splits) else [tensor.numel() // size] * size
            for splits, tensor in ((sent, own), (received, output))
        ]
        self.recorder.note("split", name_of(self), tuple(rows[0]), tuple(rows[1]))
        return _Done()

    def barrier(self, *_: Any) -> Any:
        return self._note("barrier")

    def send(self, tensors: list[Tensor], peer: int, _tag: int) -> Any:
        self.recorder.post(name_of(self), "send", self._global(peer), _size(tensors))
        return _Done()

    def recv(self, tensors: list[Tensor], peer: int, _tag: int) -> Any:
        (tensor,) = tensors
        is_shape = tensor.dtype == torch.int64 and tensor.shape == (3,)
        with torch.no_grad():
            tensor.copy_(torch.tensor(self.recorder.shape)) if is_shape else tensor.zero_()
        self.recorder.post(name_of(self), "recv", self._global(peer), _size(tensors))
        return _Done()

    def _global(self, rank: int) -> int:
        return dist.get_process_group_ranks(self)[rank]


def join(rank: int, size: int) -> Recorder:
    """Make this process rank `rank` of a world of `size`, for the rest of its life."""
    recorder = Recorder()

    def create(_store: Any, group_rank: int, group_size: int, _timeout: Any) -> RecordedGroup:
        return RecordedGroup(recorder, group_rank, group_size)

    dist.Backend.register_backend(BACKEND, create, devices=["cpu"])
    dist.init_process_group(BACKEND, store=HashStore(), rank=rank, world_size=size)
    new_group, post = dist.new_group, dist.batch_isend_irecv

    def noted_group(ranks: Any = None, *args: Any, **settings: Any) -> Any:
        recorder.asked.append({"ranks": ranks, **settings})
        # A real back end would wait for ranks that do not exist.
        group = new_group(ranks, *args, **{**settings, "backend": None})
        if isinstance(group, RecordedGroup):
            members = tuple(dist.get_process_group_ranks(group))
            recorder.note("group", name_of(group), members)
        return group

    def noted_batch(operations: Any) -> Any:
        with recorder.batch():
            return post(operations)

    def gather_objects(outcomes: list[Any], own: Any, group: Any = None) -> None:
        recorder.note("all", name_of(group or dist.group.WORLD), "gather objects", ())
        outcomes[:] = [own] * len(outcomes)

    for name, stand_in in {
        "new_group": noted_group,
        "batch_isend_irecv": noted_batch,
        "all_gather_object": gather_objects,
    }.items():
        mock.patch.object(dist, name, stand_in).start()
    return recorder
