"""Copies of a GPU's tensors in host memory: one block, pinned, no larger than the tensors.

torch's own pinned memory rounds every allocation up to a power of two, so that weights may take up
to twice their size. A plain block that is registered with CUDA is pinned as it is; it stays
registered until the process ends. Registering has not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.errors import UserError

ALIGNMENT = 256


def pin(block: Tensor) -> None:
    """Lock the memory of a tensor on the host, for copies at full speed and beside other work.

    Raises:
        UserError: the system does not allow that much locked memory.
    """
    size = block.numel() * block.element_size()
    try:
        cudart: Any = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(block.data_ptr(), size, 0))
    except torch.cuda.CudaError as error:
        raise UserError(
            f"teacher.offload: got {str(error).strip()} for {size / 2**30:.1f} GiB, expected host "
            "memory that can be pinned; raise the limit of locked memory (ulimit -l), or set "
            "teacher.offload=false"
        ) from None


def host_copies(
    tensors: Mapping[str, Tensor], pin: Callable[[Tensor], None] = pin
) -> dict[str, Tensor]:
    """Copy tensors to the host: name -> a view of one block, of the same shape and dtype.

    Args:
        pin: makes the block, uint8 [bytes], one that a GPU can read by itself.
    """
    starts, size = {}, 0
    for name, tensor in tensors.items():
        starts[name] = size
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    block = torch.empty(size, dtype=torch.uint8)
    pin(block)
    copies = {}
    for name, tensor in tensors.items():
        part = block[starts[name] : starts[name] + tensor.nbytes]
        copies[name] = part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return copies
