"""An offloaded teacher's weights on the host: equal, in one pinned block, hardly larger."""

from __future__ import annotations

import pytest
import torch

from megatron_vopd.errors import UserError
from megatron_vopd.megatron import host_copy
from megatron_vopd.megatron.host_copy import ALIGNMENT, host_copies


def test_one_block_of_their_size_holds_all() -> None:
    tensors = {
        "odd": torch.randn(3, 5).bfloat16(),
        "cut": torch.randn(8, 6)[:, ::2],
        "one": torch.tensor(7.0),
        "none": torch.zeros(0, 4),
        "large": torch.randn(1025, 9),
    }
    blocks: list[torch.Tensor] = []
    copies = host_copies(tensors, pin=blocks.append)
    (block,) = blocks
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= block.numel() <= size + ALIGNMENT * len(tensors), "torch alone: 65536 for large"
    for name, tensor in tensors.items():
        assert copies[name].dtype == tensor.dtype and torch.equal(copies[name], tensor)
        assert copies[name].data_ptr() % 4 == 0 and copies[name].is_contiguous()
        start = copies[name].data_ptr() - block.data_ptr()
        assert not tensor.numel() or 0 <= start < block.numel()
    tensors["large"].zero_()
    assert copies["large"].abs().max() > 0, "a view, not a copy"


@pytest.mark.parametrize("status", [0, 2])
def test_the_block_is_registered_or_refused_in_one_line(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    class Cudart:
        @staticmethod
        def cudaHostRegister(*arguments: int) -> int:  # noqa: N802 (CUDA's name)
            calls.append(arguments)
            return status

    def check(found: int) -> None:
        if found:
            raise torch.cuda.CudaError.__new__(torch.cuda.CudaError, found)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    block = torch.empty(96, dtype=torch.uint8)
    if status:
        with pytest.raises(UserError, match=r"teacher\.offload: .*ulimit -l"):
            host_copy.pin(block)
    else:
        host_copy.pin(block)
    assert calls == [(block.data_ptr(), 96, 0)]
