"""The CUDA build, really built and imported without a GPU, and a step's loss traced through it.

Slow: it installs a CUDA build of torch (about 5 GB) and compiles for some minutes. MEGATRON_VOPD_
CUDA_BUILD names a folder to keep and use again (`python -m tests.support.cuda_build FOLDER`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support import cuda_build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

CASES = ["grad_in_forward, top-0", "grad_in_forward, top-100"]
CASES += ["recompute, top-0", "recompute, top-100"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    kept = os.environ.get("MEGATRON_VOPD_CUDA_BUILD")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("cuda_build")
    reason = cuda_build.missing(folder)
    if reason is not None:
        pytest.skip(f"the CUDA build was not checked: {reason}")
    reason = cuda_build.install_torch(folder / "site")
    if reason is not None:
        pytest.skip(f"the CUDA build was not checked: no CUDA build of torch to be had: {reason}")
    tree = folder / "tree"
    tree.mkdir(exist_ok=True)
    cuda_build.build(tree, folder / "site")
    yield cuda_build.trace(tree, folder / "site")
    if not kept:
        shutil.rmtree(folder)


def test_it_imports_without_a_driver_and_has_every_kernel(found):
    assert found["cuda"] is not None and found["kernels"] == "cuda"
    assert found["build_info"]["cuda_archs"] == "80,90"
    both = ["CPU", "CUDA"]
    only_cuda = found["registered"].pop("logits_gradient_narrow_")
    assert only_cuda == ["CUDA"]
    assert found["registered"] and all(keys == both for keys in found["registered"].values())


@pytest.mark.parametrize("case", CASES)
def test_the_loss_never_waits_for_the_device(found, case):
    operator = found["cases"][case]["operator"]
    assert operator["waits"] == []
    # Three chunks of 8 of the 19 tokens: one exchange each, and one sum of dX over the ranks.
    assert operator["collectives"] == ["_allgather_base_"] * 3 + ["allreduce_"]
    again = 2 if case.startswith("recompute") else 1
    products = operator["products"]
    assert products.count("addmm.dtype_out") == 3
    assert len(products) == 3 * (2 * again + 1) + 3


@pytest.mark.parametrize("case", CASES)
def test_metrics_of_a_step_wait_once(found, case):
    assert found["cases"][case]["reduction"]["waits"] == ["_to_copy"]
    assert found["cases"][case]["metrics"]["waits"] == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["operator", "metrics", "reduction"])
def test_collectives_take_tensors_of_the_device_alone(found, case, part):
    seen = found["cases"][case][part]
    assert seen["off_device"] == []
    assert bool(seen["collectives"]) == (part != "metrics")
