"""The CUDA kernels' logic on the CPU: the checks of tests/gpu over an emulation of the device.

What this cannot show: races, misaligned vector accesses, the accuracy of ex2.approx, and speed.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.gpu import check_kernels
from tests.unit import cuda_emulation


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on this machine")
    return cuda_emulation.kernels(cuda_emulation.build(tmp_path_factory.mktemp("cuda")))


@pytest.mark.parametrize("kind", check_kernels.KINDS)
@pytest.mark.parametrize(
    ("dtype", "temperature"), [(torch.float32, 1.0), (torch.bfloat16, 0.7)], ids=["fp32", "bf16"]
)
def test_kernels_equal_the_reference(kernels, kind, dtype, temperature):
    cpu = torch.device("cpu")
    for vocab_size, tp in ((1003, 1), (3001, 4)):
        complaints = check_kernels.check(
            kind, dtype, vocab_size, tp, temperature, device=cpu, kernels=kernels
        )
        assert not complaints, (vocab_size, tp)


@pytest.mark.parametrize("kind", ["ascending", "constant", "two_levels", "gaussian"])
@pytest.mark.parametrize("k", [1, 700])
def test_topk_of_long_rows_and_lists(kernels, kind, k):
    x, y = (z[:1] for z in check_kernels.rows(kind, 30001))
    labels = torch.zeros(1, dtype=torch.long)
    ids = kernels.local_stats(x, y, labels, 30001, 1.0, k)[3]
    assert torch.equal(ids, torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :k])
