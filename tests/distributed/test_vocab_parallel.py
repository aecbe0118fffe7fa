"""The operator over real gloo ranks: parity, collectives, errors, and Megatron's gradient hooks."""

from __future__ import annotations

import pytest
import torch

from megatron_vopd import objectives
from megatron_vopd.ops import reference
from megatron_vopd.ops.autograd import STATISTICS
from tests.support import vocab_cases as cases
from tests.support.harness import spawn

V, T, K = 203, 12, 9


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, V, generator=generator, dtype=torch.float64) * 3
    y = x + torch.randn(T, V, generator=generator, dtype=torch.float64)
    x[1], x[2], x[3] = x[1].round(), 0.0, torch.arange(float(V)) / 9
    x[4, 7] = -torch.inf
    # Labels at both ends and on the borders of the even shards.
    labels = torch.tensor([0, V - 1, 101, 102, 50, 51, 152, 153, 40, 41, 25, 26])
    return x.to(dtype), y.to(dtype), labels


def exact(x, y, labels, temperature):
    """Return fp64 statistics and gradients of the definition and of the top-k form."""
    leaf = x.double().requires_grad_()
    tempered, teacher = leaf / temperature, y.double() / temperature
    values = {f"{name}_T": v for name, v in reference.definition(tempered, teacher, labels).items()}
    ids = torch.sort(x.float() + 0.0, dim=-1, descending=True, stable=True).indices[:, :K]
    top_p, top_q = (z.gather(1, ids).log_softmax(-1) for z in (tempered, teacher))
    values["topk_reverse_kl_T"] = (top_p.exp() * (top_p - top_q)).sum(-1)
    gradients = {
        name: torch.autograd.grad(values[name].sum(), leaf, retain_graph=True)[0]
        for name in cases.DIFFERENTIABLE
    }
    return values, gradients


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_statistics_and_gradients_equal_the_definition_at_every_tp(tp, kind):
    for dtype, impl, temperature, tolerance in (
        (torch.float32, "cpu", 0.7, 2e-6),
        (torch.float64, "auto", 1.3, 1e-11),
    ):
        x, y, labels = problem(dtype)
        values, gradients = exact(x, y, labels, temperature)
        ranks = spawn(cases.stats_and_gradients, tp, x, y, labels, kind, K, temperature, impl)
        for name in STATISTICS:
            for rank in ranks:
                assert torch.equal(rank[name], ranks[0][name]), f"{name} differs between ranks"
            if name in values and name not in ("reward_variance_T", "optimal_baseline_T"):
                torch.testing.assert_close(
                    ranks[0][name].double(),
                    values[name].detach(),
                    rtol=tolerance,
                    atol=tolerance,
                    msg=name,
                )
        for name, expected in gradients.items():
            together = torch.cat([rank["d_" + name] for rank in ranks], dim=1)
            # The definition's own gradient is NaN at the -inf logit of row 4.
            rows = [row for row in range(T) if row != 4]
            torch.testing.assert_close(
                together[rows].double(),
                expected[rows],
                rtol=tolerance,
                atol=5e-6 if dtype == torch.float32 else 1e-11,
                msg=name,
            )
            assert torch.isfinite(together).all()
        if tp > 1:
            # One exchange of statistics, one comparison of arguments, nothing in the backward.
            counts = {"all_gather_into_tensor": 1, "all_gather": 1}
            assert all(rank["forward_calls"] == counts for rank in ranks)
        assert all(not rank["backward_calls"] for rank in ranks)


def dense_gradients(name, dtype):
    """Return loss and gradients of the same objective by autograd over whole fp64 logits."""
    hidden, weight, teacher_hidden, teacher_weight, labels = cases.linear_inputs(dtype)
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    x, y = leaves[0] @ leaves[1].T, teacher_hidden.double() @ teacher_weight.double().T
    values = reference.definition(x, y, labels)
    ids = x.detach().topk(7).indices
    top_p, top_q = (z.gather(1, ids).log_softmax(-1) for z in (x, y))
    values["topk_reverse_kl"] = (top_p.exp() * (top_p - top_q)).sum(-1)
    columns = {f: values.get(f.removesuffix("_T"), values["entropy"]).detach() for f in STATISTICS}
    stats = objectives.DistillStats(**columns, tokens=slice(0, len(labels)))
    c = cases.objective(name, torch.linspace(-6, -1, len(labels)).double())(stats)
    loss = (
        -c.policy * values["student_logprob"]
        + c.reverse * values["reverse_kl"]
        + c.forward * values["forward_kl"]
        + c.topk * values["topk_reverse_kl"]
    ).sum()
    return loss.detach(), torch.autograd.grad(loss * 0.5, leaves)


@pytest.mark.parametrize("hidden_gradient", ["all_reduce", "partial", "reduce_scatter"])
@pytest.mark.parametrize("tp", [1, 2])
def test_linear_form_equals_autograd_over_whole_logits(tp, hidden_gradient):
    for name, mode, chunk, dtype in (
        ("sampled", "grad_in_forward", 7, torch.float32),
        ("mixed", "recompute", 7, torch.float32),
        ("topk_reverse", "grad_in_forward", 100, torch.float64),
        ("reverse", "recompute", 24, torch.bfloat16),
        ("hard", "grad_in_forward", 24, torch.bfloat16),
    ):
        loss, (hidden, weight) = dense_gradients(name, dtype)
        arguments = (name, mode, chunk, dtype, hidden_gradient)
        ranks = spawn(cases.linear_against_stats, tp, *arguments)
        close = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2}[dtype]
        for rank in ranks:
            torch.testing.assert_close(rank["loss"].double(), loss, rtol=5e-6, atol=1e-5)
            for field, value in rank["stats"].items():
                assert torch.equal(value, ranks[0]["stats"][field]), field
            # One exchange per chunk and one of arguments; one reduction, in the backward.
            chunks = -(-24 // chunk)
            if tp == 2:
                hidden_gathers = 4 if hidden_gradient == "reduce_scatter" else 0
                expected = {"all_gather_into_tensor": chunks, "all_gather": 1}
                calls = rank["forward_calls"]
                expected["all_gather_into_tensor"] += hidden_gathers // 2
                assert calls == expected
                reduction = {"all_reduce": "all_reduce", "reduce_scatter": "reduce_scatter_tensor"}
                assert rank["backward_calls"] == (
                    {reduction[hidden_gradient]: 1} if hidden_gradient != "partial" else {}
                )
        parts = [rank["hidden"].double() for rank in ranks]
        if hidden_gradient == "all_reduce":
            together = parts[-1]
        else:
            together = torch.cat(parts) if hidden_gradient[0] == "r" else torch.stack(parts).sum(0)
        scale = float(hidden.abs().max())
        torch.testing.assert_close(together, hidden, rtol=close, atol=close * scale)
        rows = torch.cat([rank["weight"] for rank in ranks]).double()
        torch.testing.assert_close(rows, weight, rtol=close, atol=close * float(weight.abs().max()))


@pytest.mark.parametrize(
    ("case", "argument"),
    [
        ("rows", "labels_T"),
        ("student_shape", "student_logits_TV"),
        ("student_ints", "student_logits_TV"),
        ("teacher_rows", "teacher_logits_TV"),
        ("teacher_dtype", "teacher_logits_TV"),
        ("label_high", "labels_T"),
        ("label_low", "labels_T"),
        ("label_dtype", "labels_T"),
        ("topk_zero", "topk"),
        ("topk_other", "topk"),
        ("topk_large", "topk"),
        ("temperature", "temperature"),
        ("impl", "impl"),
        ("bounds", "shard"),
    ],
)
def test_a_mistake_on_one_rank_raises_on_every_rank(case, argument):
    for message in spawn(cases.refused, 2, case):
        assert message.startswith(argument), message
