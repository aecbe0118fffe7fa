"""A request to stop (SIGTERM, SIGINT), heard by all ranks at the same point of a step.

A signal sets a flag on its rank. Ranks compare flags where none of them is inside a collective:
between the phases of a step, and after it. Only a leader that waits for its engine stops at once,
by an exception that the other ranks are told of: a generation may take longer than the 30 s that a
launcher waits.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_vopd.parallel import sum_over_world
from megatron_vopd.sharing import StopRequested


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
