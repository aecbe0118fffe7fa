"""The CUDA kernels' logic on the CPU: the checks of tests/gpu over an emulation of the device.

What this cannot show: races, misaligned vector accesses, the accuracy of ex2.approx, and speed.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_vopd.ops import reference
from megatron_vopd.ops.autograd import Problem
from megatron_vopd.ops.fields import Coefficients, DistillStats
from megatron_vopd.ops.linear import LinearDistillFunction, LinearProblem
from tests.gpu import check_kernels
from tests.support import cuda_emulation
from tests.support.pretend_cuda import Context, OnCuda, PretendCuda


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on this machine")
    return cuda_emulation.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def kernels(library):
    return cuda_emulation.kernels(library)


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


def test_a_large_offset_at_another_temperature(kernels):
    """The kernels' temperature is rounded: gradients take the statistics that belong to it."""
    known = ("offset", torch.float32, 5003, 1, 0.7)
    assert not check_kernels.check(*known, device=torch.device("cpu"), kernels=kernels)


@pytest.mark.parametrize("kind", ["ascending", "constant", "two_levels", "gaussian", "nan"])
@pytest.mark.parametrize("k", [1, 700])
def test_topk_of_long_rows_and_lists(kernels, kind, k):
    x, y = (z[:1] for z in check_kernels.rows(kind, 30001))
    if kind == "nan":
        # First in the order, and in blocks whose numbers alone would not be looked at.
        x[0, [1234, 20002]], x[0, 20003] = torch.nan, -9.0
    labels = torch.zeros(1, dtype=torch.long)
    ids = kernels.local_stats(x, y, labels, 30001, 1.0, k)[3]
    assert torch.equal(ids, torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :k])


@pytest.mark.parametrize("kind", ["gaussian", "ascending", "ties", "constant"])
def test_results_do_not_depend_on_the_order_of_threads(library, kernels, kind):
    """A barrier that is missing shows, which threads that run in order may hide."""
    vocab_size, k = 5003, 300
    x, y = check_kernels.rows(kind, vocab_size)
    x, y, labels = x[:2], y[:2], torch.tensor([5, 5002])
    coefficients = torch.tensor([check_kernels.MIXES["all"]] * 2, dtype=torch.float64)

    def results() -> list[torch.Tensor]:
        parts = kernels.local_stats(x, y, labels, vocab_size, 1.0, k)
        final = kernels.merge_stats(parts[0][None], 1e-4)
        lists = kernels.merge_topk(parts[1][None], parts[2][None], torch.tensor([k]), k)
        summary = torch.ones(2, 6, dtype=torch.float64)
        tail = (final, coefficients, vocab_size, 1.0, parts[3], lists[2][:, 0], summary)
        in_place, narrow = x.clone(), y.clone()
        kernels.logits_gradient_(in_place, y, labels, *tail)
        kernels.logits_gradient_narrow_(x, narrow, labels, *tail)
        return [*parts, final, *lists, in_place, narrow]

    expected = results()
    for seed in (1, 2, 3):
        with cuda_emulation.shuffled(library, seed):
            for actual, exact in zip(results(), expected, strict=True):
                assert torch.equal(actual.view(torch.uint8), exact.view(torch.uint8)), seed


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


def mixed(stats: DistillStats) -> Coefficients:
    like = stats.student_logprob_T.detach()
    weights = {"policy": 0.3, "reverse": 0.2, "forward": 0.8, "entropy": 0.0, "topk": 0.1}
    return Coefficients(**{name: torch.full_like(like, w) for name, w in weights.items()})


@pytest.mark.parametrize("gradient_in_forward", [True, False])
def test_lm_heads_take_one_product_per_matrix_and_no_copy_of_the_gradient(
    kernels, gradient_in_forward
):
    """The CUDA path of ops/linear.py in bf16: dW in place by one product a chunk (F14)."""
    tokens, width, vocab_size, chunk = 10, 16, 2003, 4
    generator = torch.Generator().manual_seed(5)
    shapes = ((tokens, width), (vocab_size, width)) * 2
    tensors = [torch.randn(*s, generator=generator).bfloat16() for s in shapes]
    labels = torch.arange(tokens) * 7
    problem = Problem(0, vocab_size, 0, 1.0, 5, kernels, lambda wire: wire[None])
    whole = LinearProblem(
        problem, mixed, chunk, gradient_in_forward, lambda x: x, lambda x: x, torch.bfloat16
    )
    x, w, y, u, ids = (z.as_subclass(OnCuda) for z in (*tensors, labels))
    context = Context()
    with torch.no_grad(), PretendCuda() as pretended:
        loss = LinearDistillFunction.forward(context, x, w, y, u, ids, whole)[0]
        found = LinearDistillFunction.backward(context, torch.ones((), device="cuda"))[:2]
    assert loss is not None
    again = 1 if gradient_in_forward else 2
    # Three chunks: logits of both models (again in the backward), dX; and dW.
    assert pretended.products == {"mm": 3 * (2 * again + 1), "addmm": 3}
    # Chunks of 4, 4 and 2 tokens.
    logits_sized = {4 * vocab_size, 2 * vocab_size}
    assert not logits_sized.intersection(pretended.copied), "the gradient at the logits was copied"

    wide = [z.double().requires_grad_() for z in tensors]
    values = reference.definition(wide[0] @ wide[1].T, (wide[2] @ wide[3].T).detach(), labels)
    top = (wide[0] @ wide[1].T).topk(5, dim=-1)
    other = (wide[2] @ wide[3].T).gather(1, top.indices).detach().log_softmax(-1)
    log_p = top.values.log_softmax(-1)
    expected = (
        -0.3 * values["student_logprob"]
        + 0.2 * values["reverse_kl"]
        + 0.8 * values["forward_kl"]
        + 0.1 * (log_p.exp() * (log_p - other)).sum(-1)
    ).sum()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    for actual, exact in zip(found, wide[:2], strict=True):
        assert actual is not None and exact.grad is not None
        error = (actual.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 1e-2
