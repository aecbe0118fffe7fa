"""The CUDA kernels' logic on the CPU: the checks of tests/gpu over an emulation of the device.

What this cannot show: races, misaligned vector accesses, the accuracy of ex2.approx, and speed.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.gpu import check_kernels
from tests.support import cuda_emulation


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


@pytest.mark.parametrize("nan_side", ["student", "teacher"])
def test_a_shard_of_nans_reaches_the_result(kernels, nan_side):
    """Its references are those of an empty shard, but it must not be taken for one."""
    x, y = (z[:2] for z in check_kernels.rows("gaussian", 300))
    broken = torch.full((2, 100), torch.nan)
    shards = [(x, y), (broken, y[:, :100]) if nan_side == "student" else (x[:, :100], broken)]
    labels = torch.tensor([1, 2])
    parts = [kernels.local_stats(a, b, labels, a.shape[1], 1.0, 0)[0] for a, b in shards]
    final = kernels.merge_stats(torch.stack(parts), 1e-4)
    lse, other = (0, 1) if nan_side == "student" else (1, 0)
    assert final[:, [lse, 4, 5]].isnan().all()
    assert final[:, other].isfinite().all()


@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0, 1000.0])
def test_padding_has_no_mass_beside_minus_inf(kernels, temperature):
    x, y = torch.full((1, 100), -torch.inf), torch.zeros(1, 100)
    packed = kernels.local_stats(x, y, torch.tensor([-1]), 100, temperature, 0)[0]
    assert packed[0, 2] == 0
    assert packed[0, 3] == 100
