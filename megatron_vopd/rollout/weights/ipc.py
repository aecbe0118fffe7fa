"""Weights to an engine on this process's own GPU: CUDA IPC, by vLLM's packed producer.

Not yet run on a GPU: written against vLLM 0.32, whose producer runs in the tests on a CPU.

The producer gets the iterator that all ranks walk in lockstep (`rollout.push`), so nothing is
gathered twice and no rank holds the whole model. Names, shapes, types and finiteness are checked;
hashes are for shared memory only, the probe is for all. vLLM's IPC trainer class is not used: it
exchanges handles over the whole world, which would join leaders that push at different times.

Tensors pass through one buffer that both processes map. Its memory comes from plain cudaMalloc:
under `expandable_segments:True`, which Megatron jobs often set, torch would give it a segment whose
export needs rights that containers lack, and is slower. The producer makes its buffer when it
starts, before it draws the first tensor, so the plain pool is left at that draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_vopd.rollout.weights.checked import CheckedTensors
from megatron_vopd.rollout.weights.send import Sent

Item = TypeVar("Item")


class IpcSender:
    """A sender of whole sets of weights to an engine on this process's GPU.

    Args:
        num_bytes: size of the buffer; no tensor may be larger (`hf.push_buffers`).
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._pool: Any = None
        self._lent: tuple[Any, ...] = ()  # what opens the buffer, while the engine may have it

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        client: Any,
        dtype: torch.dtype,
        weight_version: str,
    ) -> Sent:
        """Push the tensors; return when the engine has loaded the last of them.

        Args:
            client: vLLM's `VLLMWeightSyncClient`, whose channel carries Python objects.

        Raises:
            EngineError: the engine refused or is gone, or a value is not finite.
        """
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer  # pyright: ignore[reportMissingImports]

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        checked = CheckedTensors(tensors, dtype)
        client.init_weight_transfer_engine({"packed": True})
        client.start_weight_update()
        try:
            with ExitStack() as plain:
                plain.enter_context(self._plain_memory())
                for chunk in packed_ipc_producer(
                    iterator=_after(plain.close, checked),
                    gpu_uuid=uuid,
                    post_iter_func=lambda item: item[1],
                    buffer_size_bytes=self._num_bytes,
                ):
                    self._lent = chunk.ipc_handle[uuid]
                    update = {"names": chunk.names, "dtype_names": chunk.dtype_names}
                    update |= {"shapes": chunk.shapes, "tensor_sizes": chunk.tensor_sizes}
                    client.update_weights(update | {"ipc_handles": chunk.ipc_handle})
            client.finish_weight_update(weight_version)
            self._lent = ()
        finally:
            # What the engine has let go of returns to the pool, for the next push.
            torch.cuda.ipc_collect()
        return checked.sent()

    def take_back(self) -> None:
        """Release the buffer of a push that failed, once the engine's processes are gone.

        torch keeps an exported buffer until the reader counts itself off, which one that was killed
        never does.
        """
        lent, self._lent = self._lent, ()
        if lent:
            # In the order of torch's `rebuild_cuda_tensor`.
            device, counter, offset = lent[6], lent[11], lent[12]
            with suppress(RuntimeError):  # a buffer that stays is better than no second attempt
                torch.UntypedStorage._release_ipc_counter(counter, offset, device=device)
            torch.cuda.ipc_collect()

    @contextmanager
    def _plain_memory(self) -> Iterator[None]:
        """Allocate from a pool of plain cudaMalloc memory, which lasts as long as this sender.

        The pool alone is not enough: torch puts pools into expandable segments too.
        """
        from vllm.device_allocator import alloc_conf  # pyright: ignore[reportMissingImports]

        if self._pool is None:
            self._pool = torch.cuda.MemPool()
        key, known = alloc_conf.EXPANDABLE_SEGMENTS, alloc_conf.current_alloc_conf()
        is_expandable = alloc_conf.conf_flag_enabled(known, key)
        if is_expandable:
            alloc_conf.set_alloc_conf(alloc_conf.with_conf_flag(known, key, False))
        try:
            with torch.cuda.use_mem_pool(self._pool):
                yield
        finally:
            if is_expandable:
                alloc_conf.set_alloc_conf(known)


def _after(action: Callable[[], None], items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items; call `action` before the first is drawn."""
    action()
    yield from items
