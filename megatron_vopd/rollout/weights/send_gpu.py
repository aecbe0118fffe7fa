"""Weights to engines on GPUs, by vLLM's own trainer classes: CUDA IPC and NCCL.

UNVERIFIED: written against vLLM 0.32's classes, never run; there was no GPU with vLLM on it.

Both replay a source of (HF name, tensor) pairs. They get the iterator that all ranks walk in
lockstep (`rollout.push`), so nothing is gathered twice and no rank holds the whole model; the other
ranks walk it without sending, as vLLM's own non-senders do. Names, shapes, types and finiteness are
checked here; hashes are for shared memory only, the probe is for all.

IPC serves an engine on the sender's own GPU (tp 1). vLLM's IPC trainer exchanges handles over the
whole world, which would join leaders that push at different times; so its packed producer is used
directly, one handle per buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.errors import EngineError
from megatron_vopd.rollout.weights.send import Sent, is_finite

IPC_BUFFER_BYTES = 512 * 1024 * 1024


class CheckedTensors:
    """An iterator over tensors, converted, checked and counted as they pass."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self.num_bytes = self.num_tensors = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            if not is_finite(tensor):
                raise EngineError(f"push: weight {name} is not finite")
            tensor = tensor.to(self._dtype).contiguous()
            self.num_bytes += tensor.nbytes
            self.num_tensors += 1
            yield name, tensor

    def sent(self) -> Sent:
        """Return the totals; valid once the iterator has ended."""
        return Sent(self.num_bytes, self.num_tensors)


def send_by_ipc(
    tensors: Iterable[tuple[str, Tensor]], client: Any, dtype: torch.dtype, weight_version: str
) -> Sent:
    """Push to an engine on this process's GPU; tensors pass through one shared buffer.

    Args:
        client: vLLM's `VLLMWeightSyncClient`, whose channel carries Python objects.
    """
    from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer  # pyright: ignore[reportMissingImports]

    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    counted = CheckedTensors(tensors, dtype)
    client.init_weight_transfer_engine({"packed": True})
    client.start_weight_update()
    for chunk in packed_ipc_producer(
        iterator=iter(counted),
        gpu_uuid=uuid,
        post_iter_func=lambda item: item[1],
        buffer_size_bytes=IPC_BUFFER_BYTES,
    ):
        client.update_weights(
            {
                "names": chunk.names,
                "dtype_names": chunk.dtype_names,
                "shapes": chunk.shapes,
                "ipc_handles": chunk.ipc_handle,
                "tensor_sizes": chunk.tensor_sizes,
            }
        )
    client.finish_weight_update(weight_version)
    torch.cuda.ipc_collect()
    return counted.sent()


@dataclass
class StreamSource:
    """vLLM's `WeightSource`, by structure, for one walk over the tensors.

    Attributes:
        expected: name -> shape of every tensor, in the order of the walk.
    """

    expected: Mapping[str, tuple[int, ...]]
    counted: CheckedTensors
    dtype: torch.dtype

    def metadata(self) -> list[Any]:
        """Describe what the walk will yield."""
        from vllm.distributed.weight_transfer.base import ParamMeta  # pyright: ignore[reportMissingImports]

        return [ParamMeta(name, self.dtype, shape) for name, shape in self.expected.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.counted)


class NcclSender:
    """A communicator between this process and all workers of the servers behind `client`.

    Args:
        client: vLLM's `VLLMWeightSyncClient` to all servers at once.
        address, port: where this process can be reached by them.
        num_workers: of all servers together.
    """

    def __init__(self, client: Any, address: str, port: int, num_workers: int) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        self._client = client
        info = NCCLTrainerInitInfo(address, port, num_workers + 1, rank=0)
        nothing: Any = StreamSource({}, CheckedTensors((), torch.float32), torch.float32)
        self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(
            info, client=client, source=nothing
        )

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        expected: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
    ) -> Sent:
        """Push the tensors; the caller sets the version afterwards."""
        counted = CheckedTensors(tensors, dtype)
        source: Any = StreamSource(expected, counted, dtype)
        self._trainer.source = source
        self._trainer.send_weights()
        return counted.sent()

    def close(self) -> None:
        """Leave the communicator."""
        self._trainer.shutdown()
