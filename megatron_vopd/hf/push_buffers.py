"""Sizes of the GPU buffers of a push of weights: the push makes them, the estimate counts them.

Nothing heavy is imported: `vopd check` does without torch.
"""

from __future__ import annotations

import math
from functools import cache

from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import hf_tensors

MIN_IPC_BYTES = 512 * 2**20
NCCL_CHUNK_BYTES, NCCL_NUM_BUFFERS = 2**30, 2


def ipc_buffer_bytes(facts: ModelFacts, item_size: int) -> int:
    """Return the bytes of the buffer that a push by CUDA IPC shares with the engine.

    vLLM refuses a tensor that is larger than the buffer; the embedding of most models is larger
    than MIN_IPC_BYTES. The trainer keeps the buffer from its first push on.

    Args:
        item_size: bytes of a weight's value in the engine.
    """
    largest = max(math.prod(shape) for shape in hf_tensors(facts).values())
    return max(MIN_IPC_BYTES, largest * item_size)


@cache
def largest_nccl_chunk(facts: ModelFacts, item_size: int) -> int:
    """Return the bytes of the largest chunk that a push by NCCL packs.

    Chunks hold whole tensors in the order of the push; each ends with the tensor with which it
    exceeds NCCL_CHUNK_BYTES. NCCL_NUM_BUFFERS of them are under way at a time, beside the tensors
    that the newest one is copied from.

    Args:
        item_size: bytes of a weight's value in the engine.
    """
    chunk = largest = 0
    for shape in hf_tensors(facts).values():
        chunk += math.prod(shape) * item_size
        largest = max(largest, chunk)
        chunk = 0 if chunk > NCCL_CHUNK_BYTES else chunk
    return largest
