"""The specification of the objectives: identities over every action of a small vocabulary, fp64."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from megatron_vopd import objectives
from megatron_vopd.config.method import ESTIMATORS, TOPK_BASELINES
from megatron_vopd.objectives import BASELINES, OBJECTIVES, advantages, group_advantages
from megatron_vopd.ops import autograd, native, reference
from megatron_vopd.types import Prompt, Rollout
from tests.support.settings import objective_settings

CPU = torch.device("cpu")
K = 5


def assert_exact(actual: Any, expected: Any) -> None:
    """Assert equality up to rounding in fp64: the bar of the specification."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def problem(vocab_size: int, topk: int = K, temperature: float = 1.0) -> autograd.Problem:
    kernels = native.resolve("reference", CPU, torch.float64)
    return autograd.Problem(0, vocab_size, 0, temperature, topk, kernels, lambda bits: bits[None])


def every_action(student_V, teacher_V, topk=K) -> tuple[Any, Any]:
    """Return statistics [V] in fp64 (row v: the same context, action v), and the logits' leaf."""
    vocab_size = len(student_V)
    leaf = student_V.expand(vocab_size, -1).clone().requires_grad_()
    labels = torch.arange(vocab_size)
    teacher = teacher_V.expand(vocab_size, -1)
    columns = autograd.DistillStatsFunction.apply(leaf, teacher, labels, problem(vocab_size, topk))
    return autograd.DistillStats(*columns, tokens=slice(0, vocab_size)), leaf


def contexts(num: int, vocab_size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        yield torch.randn(2, vocab_size, generator=generator, dtype=torch.float64) * 2


def autograd_gradient(student_V, loss):
    leaf = student_V.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return gradient


def probability(stats):
    return stats.student_logprob_T.detach().exp()


def test_full_baseline_centres_the_advantage():
    for student, teacher in contexts(8, 11):
        stats, _ = every_action(student, teacher)
        mean = (probability(stats) * advantages["full"](stats)).sum()
        assert_exact(mean, torch.zeros_like(mean))


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_sampled_gradient_is_the_gradient_of_the_reverse_kl(name):
    for student, teacher in contexts(8, 11, seed=1):
        stats, leaf = every_action(student, teacher)
        expected = autograd_gradient(
            student,
            lambda x, y=teacher: (x.softmax(0) * (x.log_softmax(0) - y.log_softmax(0))).sum(),
        )
        loss = -(probability(stats) * advantages[name](stats) * stats.student_logprob_T).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert_exact(gradient.sum(0), expected)


def logit_space_variance(stats, name):
    """Return E|A (e_a - p)|^2 up to the mean, which no baseline changes: E[A^2 |e_a - p|^2]."""
    p = probability(stats)
    norm = 1 - 2 * p + p.square().sum()
    return (p * advantages[name](stats).square() * norm).sum()


def test_optimal_baseline_has_the_least_variance_in_every_context():
    for student, teacher in contexts(50, 60, seed=2):
        stats, _ = every_action(student, teacher)
        least = logit_space_variance(stats, "optimal")
        for name in BASELINES:
            assert least <= logit_space_variance(stats, name) * (1 + 1e-12), name


def test_full_baseline_lowers_the_summed_variance_and_obeys_its_exact_condition():
    totals = {"none": 0.0, "full": 0.0}
    for student, teacher in contexts(50, 60, seed=3):
        stats, _ = every_action(student, teacher)
        variance = {name: float(logit_space_variance(stats, name)) for name in totals}
        totals = {name: totals[name] + variance[name] for name in totals}
        condition = -stats.optimal_baseline_T[0] >= stats.reverse_kl_T[0] / 2
        assert (variance["full"] <= variance["none"]) == bool(condition)
    assert totals["full"] < 0.8 * totals["none"]


def test_teacher_equal_to_student_is_exactly_zero():
    for student, _ in contexts(4, 50, seed=4):
        stats, leaf = every_action(student, student)
        for name in BASELINES:
            assert torch.count_nonzero(advantages[name](stats)) == 0, name
        assert torch.count_nonzero(objectives.reward(stats)) == 0
        loss = stats.reverse_kl_T.sum() + stats.topk_reverse_kl_T.sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss == 0 and torch.count_nonzero(gradient) == 0


def test_topk_baseline_satisfies_the_identity_of_the_full_one():
    for student, teacher in contexts(8, 23, seed=5):
        stats, _ = every_action(student, teacher)
        p, q = student.softmax(0), teacher.softmax(0)
        inside = student.topk(K).indices
        outside = torch.ones(23, dtype=torch.bool).index_fill(0, inside, False)
        z_p, z_q = p[inside].sum(), q[inside].sum()
        tail_p, tail_q = p[outside] / (1 - z_p), q[outside] / (1 - z_q)
        tail = (tail_p * (tail_p / tail_q).log()).sum()
        between = z_p * (z_p / z_q).log() + (1 - z_p) * ((1 - z_p) / (1 - z_q)).log()
        rebuilt = z_p * stats.topk_reverse_kl_T[0] + between + (1 - z_p) * tail
        assert_exact(rebuilt, stats.reverse_kl_T[0])
        truncated = z_p * stats.topk_reverse_kl_T[0] + between
        assert_exact(stats.topk_tail_reverse_kl_T[0], truncated)
        assert 0 <= truncated <= stats.reverse_kl_T[0]


def test_topk_edges_one_is_zero_and_all_is_full():
    student, teacher = next(iter(contexts(1, 9, seed=6)))
    single, _ = every_action(student, teacher, topk=1)
    assert torch.count_nonzero(single.topk_reverse_kl_T) == 0
    whole, _ = every_action(student, teacher, topk=9)
    for column in (whole.topk_reverse_kl_T, whole.topk_tail_reverse_kl_T):
        assert_exact(column, whole.reverse_kl_T)


def closed_form(name, student, teacher, action):
    """Compute the loss of docs/how/method.md section 2 for one action, by plain torch."""
    log_q = teacher.log_softmax(0)
    ids = student.topk(K).indices

    def loss(x):
        log_p = x.log_softmax(0)
        reverse = (log_p.exp() * (log_p - log_q)).sum()
        forward = (log_q.exp() * (log_q - log_p)).sum()
        top_p, top_q = x[ids].log_softmax(0), teacher[ids].log_softmax(0)
        return {
            "reverse": reverse,
            "forward": forward,
            "mixed": 0.2 * reverse + 0.8 * forward,
            "topk_reverse": (top_p.exp() * (top_p - top_q)).sum(),
            "hard": -log_p[action],
            "sampled": -log_p[action] * (log_q - log_p + reverse)[action].detach(),
        }[name]

    return loss


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objective_loss_and_gradient_are_their_closed_forms(name):
    for student, teacher in contexts(4, 13, seed=7):
        stats, leaf = every_action(student, teacher)
        weights = objectives.coefficients(name, stats, objective_settings())
        merged = autograd.merged_stats(
            leaf.detach(), teacher.expand(13, -1), torch.arange(13), problem(13)
        )
        stacked = autograd.stack_coefficients(weights)
        gradient = autograd.student_gradient(
            leaf.detach(), teacher.expand(13, -1), torch.arange(13), merged, stacked, problem(13)
        )
        for action in range(13):
            loss = closed_form(name, student, teacher, action)
            assert_exact(gradient[action], autograd_gradient(student, loss))
            value = autograd.weighted_loss(merged, stacked)[action]
            assert_exact(value, loss(student))


def test_exact_gradients_are_their_sampling_expectations():
    for student, teacher in contexts(4, 13, seed=8):
        stats, leaf = every_action(student, teacher)
        (log_p_rows,) = torch.autograd.grad(stats.student_logprob_T.sum(), leaf, retain_graph=True)
        q = stats.teacher_logprob_T.exp()
        forward = torch.autograd.grad(stats.forward_kl_T[0], leaf, retain_graph=True)[0][0]
        assert_exact(forward, -(q[:, None] * log_p_rows).sum(0))
        reverse = torch.autograd.grad(stats.reverse_kl_T[0], leaf)[0][0]
        weight = probability(stats) * -objectives.reward(stats)
        assert_exact(reverse, (weight[:, None] * log_p_rows).sum(0))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("none", [1, 1, 1]), ("truncate", [0.25, 1.0, 2.0]), ("mask", [0, 1.0, 0])],
)
def test_importance_weights_scale_the_whole_centred_advantage(mode, expected):
    student, teacher = next(iter(contexts(1, 3, seed=9)))
    stats, _ = every_action(student, teacher, topk=2)
    ratio = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
    rollout = stats.student_logprob_T.detach() - ratio.log()
    settings = objective_settings(importance=mode)
    weighted = objectives.coefficients("sampled", stats, settings, rollout).policy
    weight = torch.tensor(expected, dtype=torch.float64)
    assert_exact(weighted, weight * advantages["full"](stats))
    terms = objectives.mismatch_terms(stats, settings, rollout)
    assert_exact(terms["mismatch/ratio_mean"], ratio)
    assert terms["mismatch/clipped_frac"].tolist() == (weight != ratio).double().tolist()


def test_logged_residual_bounds_the_exact_bias_of_a_truncated_weight():
    for student, teacher in contexts(20, 9, seed=10):
        stats, _ = every_action(student, teacher)
        mu = (student + torch.randn(9, generator=torch.Generator().manual_seed(3))).softmax(0)
        settings = objective_settings(importance_cap=1.2)
        terms = objectives.mismatch_terms(stats, settings, mu.log())
        p, baseline = student.softmax(0), float(BASELINES["full"](stats)[0].detach())
        weight = (p / mu).clamp(max=1.2)
        d = p - mu * weight
        bias = (baseline * (d.sum() * p - d)).abs().sum()
        assert bias <= (mu * terms["mismatch/baseline_residual"]).sum() * (1 + 1e-12)
        assert bias > 0


def test_entropy_gate_adds_the_forward_kl_where_the_teacher_is_unsure():
    student = torch.zeros(2, 4, dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0, 0, 0], [30, 0, 0, 0]], dtype=torch.float64)
    columns = autograd.DistillStatsFunction.apply(
        student, teacher, torch.zeros(2, dtype=torch.long), problem(4, 2)
    )
    stats = autograd.DistillStats(*columns, tokens=slice(0, 2))
    gated = objectives.coefficients("reverse", stats, objective_settings(entropy_gate=0.8))
    assert gated.forward.tolist() == [1.0, 0.0] and gated.reverse.tolist() == [1.0, 1.0]


def test_reward_floor_and_task_reward_enter_the_advantage():
    student, teacher = next(iter(contexts(1, 5, seed=11)))
    teacher = teacher.index_fill(0, torch.tensor([0]), -50.0)
    stats, _ = every_action(student, teacher)
    floored = objectives.coefficients(
        "sampled", stats, objective_settings(baseline="none", reward_floor=0.5), None, torch.ones(5)
    )
    assert floored.policy[0] == pytest.approx(2 * torch.log(torch.tensor(0.5)).item() + 1)
    assert torch.equal(floored.policy[1:], objectives.reward(stats)[1:] + 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"baseline": "mean"},
        {"importance": "clip"},
        {"reverse_weight": 1.5},
        {"importance_cap": 0.5},
        {"baseline": "none", "reward_floor": 1.0},
        {"baseline": "full", "reward_floor": 0.5},
    ],
)
def test_bad_settings_name_the_setting(bad):
    with pytest.raises(ValueError, match="|".join(bad)):
        objective_settings(**bad)


def refuses(action):
    try:
        action()
    except ValueError as error:
        return "topk" in str(error)
    return False


def test_topk_objectives_and_baselines_refuse_statistics_without_a_topk():
    student, teacher = next(iter(contexts(1, 5, seed=12)))
    stats, _ = every_action(student, teacher, topk=0)
    needy = [n for row in ESTIMATORS.values() if row.needs_topk for n in row.objectives.values()]
    for name in OBJECTIVES:
        run = partial(objectives.coefficients, name, stats, objective_settings())
        assert refuses(run) == (name in needy), name
    for name, advantage in advantages.items():
        assert refuses(partial(advantage, stats)) == (name in TOPK_BASELINES), name
    assert needy and TOPK_BASELINES


def test_an_unknown_objective_is_refused_by_name():
    student, teacher = next(iter(contexts(1, 5, seed=12)))
    stats, _ = every_action(student, teacher)
    with pytest.raises(ValueError, match=r"objective: expected one of .*, got 'jsd'"):
        objectives.coefficients("jsd", stats, objective_settings())


def test_only_an_advantage_is_weighted_and_rewarded():
    student, teacher = next(iter(contexts(1, 5, seed=14)))
    stats, _ = every_action(student, teacher)
    rollout = stats.student_logprob_T.detach() - 0.3
    for name, row in OBJECTIVES.items():
        plain = objectives.coefficients(name, stats, objective_settings())
        given = objectives.coefficients(name, stats, objective_settings(), rollout, torch.ones(5))
        expected = (plain.policy + 1) * torch.tensor(0.3, dtype=torch.float64).exp()
        assert_exact(given.policy, expected if row.has_advantage else plain.policy)


def test_statistics_are_those_of_the_definition_and_variance_is_the_rewards():
    for student, teacher in contexts(8, 17, seed=13):
        stats, _ = every_action(student, teacher)
        rows = (student.expand(17, -1), teacher.expand(17, -1))
        expected = reference.definition(*rows, torch.arange(17))
        for name, value in expected.items():
            assert_exact(getattr(stats, f"{name}_T").detach(), value)
        centred = advantages["full"](stats)
        variance = (probability(stats) * centred.square()).sum()
        assert_exact(variance, stats.reward_variance_T[0])
        # A detached leaf: nothing of the advantage may reach the gradient.
        assert not centred.requires_grad and not stats.reward_variance_T.requires_grad


def test_importing_the_objectives_needs_neither_megatron_nor_vllm():
    code = (
        "import sys, megatron_vopd.objectives as o; print({'megatron', 'vllm'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"


def test_group_advantages_are_centred_with_unit_variance() -> None:
    prompts = [Prompt(name, (1,)) for name in "abc"]
    rollouts = [Rollout(p, s, (1,), None, "stop", -1) for p in prompts for s in range(4)]
    grades = [0, 1, 1, 0, 5, 5, 5, 5, -1, 0, 2, 4]
    values = group_advantages(rollouts, grades)
    assert values[:4] == [-1, 1, 1, -1]
    assert values[4:8] == [0, 0, 0, 0]
    assert abs(sum(values[8:])) < 1e-12
    assert abs(sum(v * v for v in values[8:]) / 4 - 1) < 1e-12
