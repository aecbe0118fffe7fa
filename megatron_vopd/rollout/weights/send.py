"""Weights on their way to an engine on this machine: layer by layer, through anonymous memory.

The tensors of one layer lie in a file that exists in memory only (`memory_file`): the ranks of the
trainer build them there (`gather`), or the sender copies them into it. The sender checks that they
are finite, and sends the engine the place of the file and a manifest of names, shapes, types
and hashes. The engine's processes map the file, verify it against the manifest and against their
own model, and load it. While they load one layer the trainer builds the next, so two layers exist
at a time, whatever the size of the model.

The control channel is any object with the methods of `WeightClient`, which are vLLM's own
(`VLLMWeightSyncClient`): a child process and an HTTP server both have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vopd.errors import EngineError
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import hf_tensors
from megatron_vopd.rollout.weights.memory_file import Segment

BACKEND = "megatron_vopd_shm"


class WeightClient(Protocol):
    """The control channel of a push, as vLLM defines it (`VLLMWeightSyncClient`)."""

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@dataclass(frozen=True)
class Sent:
    """Totals of one push."""

    num_bytes: int
    num_tensors: int


def expected_weights(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of a push, in order, with the head of a tied model."""
    expected = hf_tensors(facts)
    if facts.tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    return expected


def layer_key(name: str) -> str:
    """Return a tensor's key; a layer's tensors share one and travel together, others go alone."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return name


class WeightSource:
    """The tensors of one push, by HF name, layer by layer, drawn once.

    Args:
        take_segment: the memory file that the tensors of this layer were built in, the caller's to
            close from now on; None: in none, or it was taken already.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        take_segment: Callable[[], Segment | None] = lambda: None,
    ) -> None:
        self._tensors = iter(tensors)
        self.take_segment = take_segment

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._tensors

    def finish(self) -> None:
        """Draw what an engine has not drawn, so that all ranks reach the end of the walk."""
        for pair in self._tensors:
            del pair  # a tensor keeps the memory of its layer


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; one pass, no copy."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def send_weights(
    tensors: Iterable[tuple[str, Tensor]],
    client: WeightClient,
    dtype: torch.dtype,
    weight_version: str,
) -> Sent:
    """Drive one push: start, a segment for each layer, finish.

    The tensors are drawn on the calling thread, where collectives belong; the client is called from
    one other thread meanwhile, one call at a time.

    Args:
        tensors: a `WeightSource`, or any others.
        dtype: that the engine computes in; tensors of another one are converted.

    Raises:
        EngineError: the engine refused, or is gone; or a value is not finite (any more).
    """
    source = tensors if isinstance(tensors, WeightSource) else WeightSource(tensors)
    num_bytes = num_tensors = 0
    loading: tuple[Future, Segment] | None = None
    caller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-push")
    segment: Segment | None = None
    try:
        client.start_weight_update()
        for segment in _segments(source, dtype):
            loading = _finished(loading)
            num_bytes += segment.num_bytes
            num_tensors += len(segment.tensors)
            loading = caller.submit(client.update_weights, segment.update_info()), segment
        _finished(loading)
        loading = None
        client.finish_weight_update(weight_version)
    finally:
        if loading is not None:
            with suppress(EngineError):
                _finished(loading)
        if segment is not None:
            segment.close()
        caller.shutdown(wait=True)
    return Sent(num_bytes, num_tensors)


def _segments(source: WeightSource, dtype: torch.dtype) -> Iterator[Segment]:
    """Yield each segment once it is complete, before the first tensor of the next is built."""
    segment, key = None, None
    try:
        for name, tensor in source:
            if segment is not None and layer_key(name) != key:
                full, segment = segment, None
                yield full
            if segment is None:
                segment, key = source.take_segment() or Segment(), layer_key(name)
            converted = tensor.to(dtype)
            if not is_finite(converted):
                raise EngineError(f"weight {name} is not finite as {dtype}")
            segment.add(name, converted)
            # What lies in a segment keeps its memory.
            del tensor, converted
            if segment.is_complete:
                full, segment = segment, None
                yield full
        if segment is not None:
            full, segment = segment, None
            yield full
    finally:
        if segment is not None:
            segment.close()


def _finished(loading: tuple[Future, Segment] | None) -> None:
    """Wait until the engine has loaded a segment, and free it; the client has the deadline."""
    if loading is not None:
        future, segment = loading
        try:
            future.result()
        finally:
            segment.close()
