"""Sizes of the GPU buffers of a push of weights: the push makes them, the estimate counts them.

Nothing heavy is imported: `vopd check` does without torch.
"""

from __future__ import annotations

import math

from megatron_vopd.hf.dtypes import DTYPES
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import hf_tensors

MIN_IPC_BYTES = 512 * 2**20
NCCL_CHUNK_BYTES, NCCL_NUM_BUFFERS = 2**30, 2


def ipc_buffer_bytes(facts: ModelFacts, dtype: str) -> int:
    """Return the bytes of the buffer that a push by CUDA IPC shares with the engine.

    vLLM refuses a tensor that is larger than the buffer; the embedding of most models is larger
    than MIN_IPC_BYTES. The trainer keeps the buffer from its first push on.

    Args:
        dtype: the engine's type, as torch names it.
    """
    return max(MIN_IPC_BYTES, _largest(facts, dtype))


def nccl_packing_bytes(facts: ModelFacts, dtype: str) -> int:
    """Return an upper bound of the bytes that a push by NCCL packs at a time, on the sender.

    A chunk ends with the tensor that makes it larger than NCCL_CHUNK_BYTES. There are as many
    chunks as buffers, and the tensors that the newest one is copied from.

    Args:
        dtype: the engine's type, as torch names it.
    """
    return (NCCL_NUM_BUFFERS + 1) * (NCCL_CHUNK_BYTES + _largest(facts, dtype))


def _largest(facts: ModelFacts, dtype: str) -> int:
    """Return the bytes of the largest tensor of a push."""
    largest = max(math.prod(shape) for shape in hf_tensors(facts).values())
    return largest * DTYPES[dtype].num_bytes
