"""An engine that shares its GPU with a trainer: what of it sleeps, and the memory for waking it.

The engine's weights and cache have memory of their own, outside the trainer's. What torch keeps for
the trainer's next step is missing there, so it is given back before the engine takes memory:
before it starts, and before each part of it wakes.

Asleep, the weights are kept in host memory or dropped (vLLM's levels 1 and 2). Where a push
follows, keeping them would copy them out and back for nothing.

Not yet run on a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

WEIGHTS, CACHE = "weights", "kv_cache"  # vLLM's names of the parts


def give_back_gpu_memory() -> None:
    """Give the memory that torch keeps for later, and that of dead cycles, back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def nothing_to_give_back() -> None:
    """Leave memory as it is: an engine on the CPU takes none from a pool of the trainer's."""


class Sleeper:
    """The parts of one engine that are asleep.

    Attributes:
        dropped: the weights are gone; only a push brings some.

    Args:
        call: (command, arguments) to the engine's process.
        make_room: gives the trainer's spare memory back.
    """

    def __init__(self, call: Callable[..., Any], make_room: Callable[[], None]) -> None:
        self._call, self._make_room = call, make_room
        self._asleep: tuple[str, ...] = ()
        self.dropped = False

    def reset(self) -> None:
        """Make room for an engine that is about to start, awake."""
        self._make_room()
        self._asleep, self.dropped = (), False

    def sleep(self, keeps_weights: bool) -> None:
        """Put all parts to sleep, unless some are asleep."""
        if not self._asleep:
            self._call("sleep", 1 if keeps_weights else 2)
            self._asleep, self.dropped = (WEIGHTS, CACHE), not keeps_weights

    def wake(self, *parts: str) -> None:
        """Wake those of the parts that are asleep; weights that were dropped are undefined then."""
        wanted = [part for part in parts if part in self._asleep]
        if wanted:
            self._make_room()
            self._call("wake", wanted)
            self._asleep = tuple(part for part in self._asleep if part not in wanted)
