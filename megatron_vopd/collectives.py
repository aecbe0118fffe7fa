"""Agreement of all ranks: they fail together, stop together and add up.

A rank that fails while others wait in a collective would leave them there until a deadline. So
every action that can fail on one rank alone is made through `all_ranks` or `rank_0`: the outcomes
are exchanged, and the first failure is raised on every rank. A failure that was caught already goes
through `first_error` or `gather_outcomes`.

A request to stop (SIGTERM, SIGINT) is heard by all ranks at the same point of a step. A signal sets
a flag on its rank; ranks compare flags where none of them is inside a collective: between the
phases of a step, and after it. Only a leader that waits for its engine stops at once, by an
exception that the other ranks learn of: a generation may take longer than the 30 s that a launcher
waits.

What may take hours on a few ranks, such as a download, must not run out the deadline of the others'
collective. They look into the store instead, where the working ranks show that they are alive, and
enter the collective when the work is done, or when nobody has shown it for a while (`some_ranks`).
"""

from __future__ import annotations

import datetime
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vopd.errors import EngineError, StopRequested, UserError

T = TypeVar("T")
SPOKEN_KEY, SPEAK_SECONDS = "megatron_vopd/spoken", 5.0
WORK_KEY, ALIVE_SECONDS, SILENT_SECONDS = "megatron_vopd/work", 5.0, 120.0
_works = itertools.count()


def all_ranks(action: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run `action(*args, **kwargs)` on every rank; return after all have succeeded.

    Every rank of the world calls it. One all-gather of error texts.

    Raises:
        UserError: on every rank when any rank raised one, or an OSError.
    """
    result, error = _attempt(action, args, kwargs)
    _exchange(None, error)
    return result  # pyright: ignore[reportReturnType]  (there is one: no rank failed)


def from_all_ranks(action: Callable[..., T], *args: Any, **kwargs: Any) -> list[T]:
    """Run `action` as `all_ranks` does; return the results of all ranks in rank order.

    Results travel pickled, in one all-gather.
    """
    return _exchange(*_attempt(action, args, kwargs))


def rank_0(action: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run `action(*args, **kwargs)` on rank 0 alone; return its result on every rank.

    Every rank of the world calls it. The result travels pickled, in one all-gather.

    Raises:
        UserError: on every rank when rank 0 raised one, or an OSError.
    """
    outcome = _attempt(action, args, kwargs) if dist.get_rank() == 0 else (None, None)
    return _exchange(*outcome)[0]


def rank_0_helped(
    action: Callable[[Callable[[Any], list[Any]]], T], answer: Callable[[Any], Any]
) -> T:
    """Run `action(ask)` on rank 0 as `rank_0` does; `ask(question)` has every rank answer.

    Every rank of the world calls it. Questions, answers and the result travel pickled, in two
    all-gathers for each question and two for the end.

    Args:
        action: calls `ask` as often as it likes; it returns the answers in rank order.
        answer: question -> answer, on every rank; raises nothing.

    Raises:
        UserError: on every rank when `action` raised one, or an OSError.
    """

    def ask(question: Any) -> list[Any]:
        _all_gather_objects((question,))
        return _all_gather_objects(answer(question))

    if dist.get_rank() == 0:
        outcome = _attempt(action, (ask,), {})
        _all_gather_objects(None)
        return _exchange(*outcome)[0]
    while (asked := _all_gather_objects(None)[0]) is not None:
        _all_gather_objects(answer(asked[0]))
    return _exchange(None, None)[0]


def some_ranks(action: Callable[..., T] | None, *args: Any) -> T | None:
    """Run `action(*args)` on the ranks that have one, however long it takes; return its result.

    Every rank of the world calls it, and returns after all have succeeded. While they wait, ranks
    count in the store through which they met (8 bytes each time); then one all-gather of error
    texts.

    Args:
        action: None: this rank has nothing to do, and waits.

    Raises:
        UserError: on every rank when any rank raised one, or an OSError.
    """
    result, error = None, None
    work = _Work(f"{WORK_KEY}/{next(_works)}")
    if action is not None:
        with work.shown():
            result, error = _attempt(action, args, {})
    work.finish()
    _exchange(None, error)
    return result


class _Work:
    """One work of some ranks, by its name in the store: how many are done, and signs of life.

    Where the store cannot be reached nothing is waited for: the collective that follows does.
    """

    def __init__(self, name: str) -> None:
        self._done, self._alive = f"{name}/done", f"{name}/alive"
        self._store = dist.distributed_c10d._get_default_store()
        self._size = dist.get_world_size()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show while the block runs that this process is alive, by a thread."""
        ended = threading.Event()

        def show() -> None:
            while not ended.wait(ALIVE_SECONDS):
                self._add(self._alive, 1)

        thread = threading.Thread(target=show, name="alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def finish(self) -> None:
        """Return when all ranks have called this, or no sign of life came for SILENT_SECONDS."""
        self._add(self._done, 1)
        seen, since, pause = (0, 0), time.monotonic(), 0.005
        while (found := (self._add(self._done, 0), self._add(self._alive, 0)))[0] < self._size:
            if found != seen:
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > SILENT_SECONDS:
                return
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _add(self, key: str, number: int) -> int:
        try:
            return self._store.add(key, number)
        except RuntimeError:
            return self._size


def first_of_each_node(action: Callable[[bool], T]) -> T:
    """Run `action(False)` on the first rank of each node, then `action(True)` on the others.

    For what the first rank leaves on the node's disk, where the others find it. Every rank of the
    world calls it. The first rank is that of LOCAL_RANK 0, as torchrun sets it; without the
    variable every rank is one. Collectives as in `some_ranks` and `all_ranks`.

    Raises:
        UserError: on every rank when any rank raised one, or an OSError.
    """
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    own = some_ranks(action if is_first else None, False)
    others = all_ranks(lambda: None if is_first else action(True))
    return own if is_first else others  # pyright: ignore[reportReturnType]


def tensor_of_rank_0(tensor: torch.Tensor | None, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return rank 0's tensor [n] on every rank, on the CPU.

    Every rank of the world calls it. Two broadcasts: n, then the tensor.

    Args:
        tensor: on rank 0, of type `dtype`; None elsewhere.
        device: device of the tensors that are sent.
    """
    length = torch.tensor([0 if tensor is None else len(tensor)], device=device)
    dist.broadcast(length, 0)
    sent = torch.empty(int(length), dtype=dtype, device=device)
    if tensor is not None:
        sent.copy_(tensor)
    if len(sent):
        dist.broadcast(sent, 0)
    return sent.cpu()


def _attempt(
    action: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[T | None, UserError | None]:
    """Call `action`; return its result, or the error that the user is to see."""
    try:
        return action(*args, **kwargs), None
    except UserError as caught:
        return None, caught
    except OSError as caught:
        text = f"{caught.filename}: {caught.strerror}; check the file and its disk"
        return None, UserError(text)


def _exchange(result: Any, error: UserError | None) -> list[Any]:
    """Return the results of all ranks; raise on every rank when any of them has an error."""
    outcomes = _all_gather_objects((result, None if error is None else str(error)))
    if error is not None:
        raise error
    for _, message in outcomes:
        if message is not None:
            raise UserError(message)
    return [value for value, _ in outcomes]


def first_error(error: Exception | None) -> None:
    """Raise on every rank when any rank has an error; the message names the first such rank.

    Raises:
        StopRequested: a rank was asked to stop; other errors are dropped.
        UserError: the first error is a mistake of the user.
        EngineError: any other; its cause is this rank's own error, where it has one.
    """
    own = None if error is None else (_kind(error), str(error) or repr(error))
    failed = [(rank, *one) for rank, one in enumerate(_all_gather_objects(own)) if one is not None]
    failed.sort(key=lambda one: one[1] != StopRequested.__name__)
    for rank, kind, message in failed:
        raise _KINDS[kind](f"rank {rank}: {message}") from error


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (StopRequested, UserError, EngineError)
}


def _kind(error: Exception) -> str:
    if isinstance(error, StopRequested):
        return StopRequested.__name__
    return (UserError if isinstance(error, UserError) else EngineError).__name__


def gather_outcomes(result: Any, failure: str) -> tuple[list[Any], list[str]]:
    """Return the results of all ranks that have one, and all failures, each with its rank.

    Args:
        result: this rank's result; None: it has none. Travels pickled, in one all-gather.
        failure: what went wrong on this rank; empty: nothing did.
    """
    outcomes = _all_gather_objects((result, failure))
    results = [result for result, _ in outcomes if result is not None]
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    return results, failures


def first_reason(reason: str, device: torch.device | str) -> str:
    """Return the reason of the lowest rank that has one, on every rank; empty: none has.

    One all-reduce of a number; texts travel only when there is one.

    Args:
        reason: this rank's reason; empty: it has none.
        device: where the number is summed.
    """
    flag = torch.tensor([float(bool(reason))], dtype=torch.float64, device=device)
    if not float(sum_over_world(flag)):
        return ""
    texts = _all_gather_objects(reason)
    return next(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)


def _all_gather_objects(own: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def speaks_for_all() -> bool:
    """Return True on the first rank of the world that asks. No rank waits for another.

    Counts in the store through which the ranks met (8 bytes); without the store every rank gets
    True.
    """
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set_timeout(datetime.timedelta(seconds=SPEAK_SECONDS))
        return store.add(SPOKEN_KEY, 1) == 1
    except RuntimeError:
        return True


class StopFlag:
    """A flag that SIGTERM or SIGINT sets: the process was asked to stop. For the main thread.

    Args:
        device: where ranks compare their flags.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.is_set = False
        self._device = device
        self._may_raise = False

    def listen(self) -> None:
        """Let signals set the flag from here on; a second one adds nothing."""
        assert threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self.is_set = True
        if self._may_raise:
            self._may_raise = False
            raise StopRequested("asked to stop")

    @contextmanager
    def abortable(self) -> Iterator[None]:
        """Let a signal raise StopRequested inside the block, which must hold no collective."""
        self._may_raise = True
        try:
            if self.is_set:
                raise StopRequested("asked to stop")
            yield
        finally:
            self._may_raise = False

    def anywhere(self) -> bool:
        """Return whether any rank was asked, the same on every rank. One all-reduce of a number."""
        flag = torch.tensor([float(self.is_set)], dtype=torch.float64, device=self._device)
        self.is_set = bool(sum_over_world(flag))
        return self.is_set


def sum_over_world(values: torch.Tensor) -> torch.Tensor:
    """Write the sum of all ranks' `values` over them, the same bits on every rank."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_from_position(
    tensor: torch.Tensor, position: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Write `tensor` of the rank at `position` of `group` over `tensor` on the others."""
    if group.size() > 1:
        dist.broadcast(tensor, group=group, group_src=position)
    return tensor


def anywhere_in_group(
    flags: Sequence[bool], group: dist.ProcessGroup, device: torch.device | str
) -> list[bool]:
    """Return, for each of the flags, whether any rank of `group` has it set.

    One all-reduce of a byte for each flag over `group`.

    Args:
        flags: as many on every rank of the group.
        device: where the flags are compared.
    """
    values = torch.tensor(flags, dtype=torch.uint8, device=device)
    if group.size() > 1 and flags:
        dist.all_reduce(values, dist.ReduceOp.MAX, group)
    return [bool(value) for value in values.tolist()]
