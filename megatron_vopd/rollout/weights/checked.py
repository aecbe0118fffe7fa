"""Weights on their way to an engine on a GPU: converted, checked, and all drawn on one stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_vopd.errors import EngineError
from megatron_vopd.rollout.weights.send import Sent, is_finite


class CheckedTensors:
    """An iterator over tensors, converted, checked and counted as they pass.

    They are put together and converted on the stream that is current where this object is made,
    whatever stream is current where they are drawn: tensors that are made together (q, k and v)
    would otherwise be drawn on different streams, and the second be read before it is written.

    Args:
        dtype: type that the engine takes.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        self._tensors = iter(tensors)
        self._dtype = dtype
        self._stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        self.num_bytes = self.num_tensors = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while (pair := self._draw()) is not None:
            name, tensor = pair
            yield name, self.hand_over(tensor)

    def _draw(self) -> tuple[str, Tensor] | None:
        """Make the next tensor on the one stream; None after the last."""
        with torch.cuda.stream(self._stream):
            pair = next(self._tensors, None)
            if pair is None:
                return None
            name, tensor = pair
            if not is_finite(tensor):
                raise EngineError(f"push: weight {name} is not finite")
            tensor = tensor.to(self._dtype).contiguous()
        self.num_bytes += tensor.nbytes
        self.num_tensors += 1
        return name, tensor

    def hand_over(self, tensor: Tensor) -> Tensor:
        """Let the current stream use a drawn tensor; it waits for the one that made it.

        The tensor's memory is not used again before the current stream is done with it.
        """
        if self._stream is not None:
            current = torch.cuda.current_stream()
            if current != self._stream:
                current.wait_stream(self._stream)
                tensor.record_stream(current)
        return tensor

    def sent(self) -> Sent:
        """Return the totals; valid once the iterator has ended."""
        return Sent(self.num_bytes, self.num_tensors)
