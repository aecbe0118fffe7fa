"""What all ranks do as one: agree, fail, stop, add up.

A request to stop (SIGTERM, SIGINT) is heard by all ranks at the same point of a step. A signal sets
a flag on its rank. Ranks compare flags where none of them is inside a collective: between the
phases of a step, and after it. Only a leader that waits for its engine stops at once, by an
exception that the other ranks learn of: a generation may take longer than the 30 s that a launcher
waits.
"""

from __future__ import annotations

import datetime
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vopd.errors import EngineError, StopRequested, UserError


class StopFlag:
    """Whether this process was asked to stop. Driven from the main thread.

    Args:
        device: of the flag when ranks compare theirs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.is_set = False
        self._device = device
        self._may_raise = False

    def listen(self) -> None:
        """From here on signals set the flag; a second one adds nothing."""
        assert threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)

    def _asked(self, *_: Any) -> None:
        self.is_set = True
        if self._may_raise:
            self._may_raise = False
            raise StopRequested("asked to stop")

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """A wait that the signal ends by StopRequested; nothing in it may be a collective."""
        self._may_raise = True
        try:
            if self.is_set:
                raise StopRequested("asked to stop")
            yield
        finally:
            self._may_raise = False

    def anywhere(self) -> bool:
        """Whether any rank was asked; the same on every rank. One all-reduce of a number."""
        flag = torch.tensor([float(self.is_set)], dtype=torch.float64, device=self._device)
        self.is_set = bool(sum_over_world(flag))
        return self.is_set


T = TypeVar("T")


TOLD_KEY, TELL_SECONDS = "megatron_vopd/told", 5.0


def in_step(action: Callable[[], T]) -> T:
    """Run `action` on every rank of the world; no rank goes on before all have succeeded.

    A UserError on one rank is raised on every rank, so that none waits for one that gave up; so is
    an OSError, as a UserError.
    """
    result: list[T] = []
    in_step_all(lambda: result.append(action()))
    return result[0]


def in_step_all(action: Callable[[], T]) -> list[T]:
    """`in_step`, returning the results of all ranks in rank order; they travel pickled."""
    error: UserError | None = None
    result: T | None = None
    try:
        result = action()
    except UserError as caught:
        error = caught
    except OSError as caught:
        error = UserError(f"{caught.filename}: {caught.strerror}; check the file and its disk")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, None if error is None else str(error)))
    if error is not None:
        raise error
    for _, message in outcomes:
        if message is not None:
            raise UserError(message)
    return [value for value, _ in outcomes]


def broadcast_from_position(
    tensor: torch.Tensor, position: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """`tensor` of the rank at `position` of `group`, written over `tensor` on the others."""
    if group.size() > 1:
        dist.broadcast(tensor, group=group, group_src=position)
    return tensor


def is_first_to_tell() -> bool:
    """True for the first rank of the world that asks: it speaks for all. No rank waits for another.

    An 8-byte counter in the store through which the ranks met; without the store every rank speaks.
    """
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set_timeout(datetime.timedelta(seconds=TELL_SECONDS))
        return store.add(TOLD_KEY, 1) == 1
    except RuntimeError:
        return True


def sum_over_world(values: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' `values`, written over them, the same bits on every rank."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def join_slices(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`whole` of fp32 values, of which each rank has its own slice, and zeros elsewhere.

    Added up as integers, so that the bits of every value survive, -0.0 included. One all-reduce of
    the whole tensor over `group`.
    """
    if group.size() > 1:
        dist.all_reduce(whole.view(torch.int32), group=group)
    return whole


def on_rank_0(action: Callable[[], None]) -> None:
    if dist.get_rank() == 0:
        action()


def raise_together(error: Exception | None) -> None:
    """Raise on every rank when any rank has an error; the message names the first such rank.

    Raises:
        StopRequested: on any rank; whatever else went wrong no longer matters.
        UserError: it is a mistake of the user.
        EngineError: any other; its cause is this rank's own error, where it has one.
    """
    own = None if error is None else (_kind(error), str(error) or repr(error))
    outcomes: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, own)
    told = [(rank, *outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    told.sort(key=lambda one: one[1] != StopRequested.__name__)
    for rank, kind, message in told:
        raise _KINDS[kind](f"rank {rank}: {message}") from error


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (StopRequested, UserError, EngineError)
}


def _kind(error: Exception) -> str:
    if isinstance(error, StopRequested):
        return StopRequested.__name__
    return (UserError if isinstance(error, UserError) else EngineError).__name__


def first_objection(objection: str, device: torch.device | str) -> str:
    """The objection of the lowest rank that has one, the same on every rank; empty: none has.

    One all-reduce of a number; texts travel only when there is one.
    """
    flag = torch.tensor([float(bool(objection))], dtype=torch.float64, device=device)
    if not float(sum_over_world(flag)):
        return ""
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, objection)
    return next(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)


def results_and_failures(result: Any, failure: str) -> tuple[list[Any], list[str]]:
    """Results of all ranks that have one, and the failures of all ranks with their rank."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, failure))
    results = [result for result, _ in outcomes if result is not None]
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    return results, failures
