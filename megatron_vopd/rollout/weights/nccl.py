"""Weights to the workers of servers on GPUs: NCCL, by vLLM's own trainer class, within a deadline.

Not yet run on a GPU: written against vLLM 0.32, whose class runs in the tests on a CPU.

vLLM's trainer waits in C for its peers, without a deadline: for the workers to join, for the last
broadcast. When a server dies, refuses or was started again, its peers never come. So the trainer
runs in a thread of its own. The thread that calls draws the tensors, with the collectives that
takes, hands over one at a time, and keeps the deadline; it also hears at once of a server that
refuses. Then it aborts the communicator, which ends the waiting, and raises. vLLM's workers have no
such deadline: a server whose worker waits for a push that was aborted has to be started again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vopd.errors import EngineError
from megatron_vopd.hf.push_buffers import NCCL_CHUNK_BYTES, NCCL_NUM_BUFFERS
from megatron_vopd.rollout.weights.checked import CheckedTensors
from megatron_vopd.rollout.weights.send import Sent, WeightClient


class ServersClient(WeightClient, Protocol):
    """A `WeightClient` to several servers, which tells of the first failure while others wait.

    Attributes:
        on_failure: called with the error of a server, from any thread.
    """

    on_failure: Callable[[EngineError], None]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def abandon(self) -> None:
        """Make every request under way fail."""
        ...


@dataclass
class StreamSource:
    """The weights of one push, as vLLM's `WeightSource` describes them.

    Attributes:
        expected: name -> shape of every tensor, in the order of the walk.
        tensors: the walk; it can be made once.
        dtype: type of all tensors.
    """

    expected: Mapping[str, tuple[int, ...]]
    tensors: Iterable[tuple[str, Tensor]]
    dtype: torch.dtype

    def metadata(self) -> list[Any]:
        """Describe what the walk will yield."""
        from vllm.distributed.weight_transfer.base import ParamMeta  # pyright: ignore[reportMissingImports]

        return [ParamMeta(name, self.dtype, shape) for name, shape in self.expected.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors)


class NcclSender:
    """A communicator between this process and all workers of some servers.

    Args:
        client: to all servers at once.
        address, port: where this process can be reached by them.
        num_workers: of all servers together.
        seconds: until all workers have joined.

    Raises:
        EngineError: a server refused, or not all have joined in time.
    """

    def __init__(
        self, client: ServersClient, address: str, port: int, num_workers: int, seconds: float
    ) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        self._client = client
        info = NCCLTrainerInitInfo(
            address,
            port,
            num_workers + 1,
            rank=0,
            packed_buffer_size_bytes=NCCL_CHUNK_BYTES,
            packed_num_buffers=NCCL_NUM_BUFFERS,
        )
        to_servers: Any = client
        nothing: Any = StreamSource({}, (), torch.float32)

        def join() -> Any:
            trainer = NCCLTrainerWeightTransferEngine.trainer_init(
                info, client=to_servers, source=nothing
            )
            if joining.is_given_up:
                trainer.shutdown()
            return trainer

        joining = _Background("join", seconds)
        client.on_failure = joining.fail
        try:
            joining.start(join)
            joining.wait_for(lambda: joining.is_over)
        except BaseException:
            joining.give_up()
            client.abandon()
            raise
        self._trainer: Any = joining.value

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        expected: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        seconds: float,
    ) -> Sent:
        """Push the tensors; the caller sets the version afterwards.

        After a failure the communicator is gone, and this sender with it.

        Args:
            tensors: drawn on the calling thread.
            seconds: until the servers have loaded the last tensor.

        Raises:
            EngineError: a server refused or is gone, time is up, or a value is not finite.
        """
        checked = CheckedTensors(tensors, dtype)
        sending = _Background("push", seconds)
        hand = _Hand(sending, checked.hand_over)
        self._client.on_failure = sending.fail
        self._trainer.source = StreamSource(expected, hand, dtype)
        try:
            sending.start(self._trainer.send_weights)
            for pair in checked:
                hand.offer(pair)
                del pair
                sending.wait_for(hand.is_free)
            hand.end()
            sending.wait_for(lambda: sending.is_over)
        except BaseException:
            sending.give_up()
            self.close()
            raise
        return checked.sent()

    def close(self) -> None:
        """End the communicator, and whatever waits in it. May be called twice."""
        self._client.on_failure = lambda error: None
        self._trainer.shutdown()
        self._client.abandon()


class _Background:
    """A call of vLLM's in a thread of its own, where it may wait without end.

    Attributes:
        is_over: the call has returned.
        is_given_up: nobody waits for it any more.
        value: the result of the call.
        changed: condition that guards all of them.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.changed = threading.Condition()
        self.is_over = self.is_given_up = False
        self.value: Any = None
        self._name, self._seconds = name, seconds
        self._deadline = time.monotonic() + seconds
        self._error: Exception | None = None

    def start(self, action: Callable[[], Any]) -> None:
        """Call `action` in a daemon thread, on the GPU of the calling one."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                value = action()
            except Exception as error:  # of any type: the other thread raises it
                self.fail(error)
                return
            with self.changed:
                self.value, self.is_over = value, True
                self.changed.notify_all()

        threading.Thread(target=run, name=f"weight-{self._name}", daemon=True).start()

    def fail(self, error: Exception) -> None:
        """End the wait with an error; the first one counts."""
        with self.changed:
            self._error = self._error or error
            self.changed.notify_all()

    def give_up(self) -> None:
        """Note that nobody waits for the call any more."""
        with self.changed:
            self.is_given_up = True
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition()`, which is asked whenever something has changed.

        Raises:
            EngineError: the call failed, a server refused, or time is up.
        """
        with self.changed:
            self.changed.wait_for(
                lambda: self._error is not None or condition(),
                timeout=max(0.0, self._deadline - time.monotonic()),
            )
            if self._error is None and condition():
                return
        if isinstance(self._error, EngineError):
            raise self._error
        seen = f"no end after {self._seconds:g} s: a server is gone or was started again"
        if self._error is not None:
            seen = f"{type(self._error).__name__}: {self._error}"
        raise EngineError(f"servers, {self._name} over NCCL: {seen}") from self._error


class _Hand:
    """Tensors on their way to the sending thread, one at a time."""

    def __init__(self, sending: _Background, take: Callable[[Tensor], Tensor]) -> None:
        self._sending, self._take = sending, take
        self._held: list[tuple[str, Tensor]] = []
        self._is_at_end = False

    def is_free(self) -> bool:
        return not self._held

    def offer(self, pair: tuple[str, Tensor]) -> None:
        with self._sending.changed:
            self._held.append(pair)
            self._sending.changed.notify_all()

    def end(self) -> None:
        with self._sending.changed:
            self._is_at_end = True
            self._sending.changed.notify_all()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, in the sending thread, ordered after what made them."""
        sending = self._sending
        while True:
            with sending.changed:
                sending.changed.wait_for(
                    lambda: bool(self._held) or self._is_at_end or sending.is_given_up
                )
                if sending.is_given_up:
                    raise EngineError("servers, push: given up")
                if not self._held:
                    return
                name, tensor = self._held.pop()
                sending.changed.notify_all()
            yield name, self._take(tensor)
