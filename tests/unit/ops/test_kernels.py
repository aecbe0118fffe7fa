"""The C++ kernels against fp64: every instruction set, shard layout and adversarial row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vopd.ops import autograd, native, reference
from megatron_vopd.ops.fields import COEFFICIENTS, FINAL
from tests.support.thread_ranks import CPU, on_ranks, shard_of, splits

V = 1531
ISAS = ("portable", "avx2", "avx512")
# fp32 exponentials and block sums: the bar is 2e-6 for the divergences, relative above 1.
LOSS_TOLERANCE = 2e-6
# Relative to the largest element of the row.
GRADIENT_TOLERANCE = 5e-6
# A bf16 output is rounded to 8 bits.
BF16_TOLERANCE = 2.0**-8


@pytest.fixture(params=ISAS)
def isa(request):
    module = native.extension()
    assert module is not None
    best = native.build_info()["detected_isa"]
    if ISAS.index(request.param) > ISAS.index(best):
        pytest.skip(f"this machine has no {request.param}")
    module.set_isa(request.param)
    yield request.param
    module.set_isa(best)


def rows(kind: str, vocab_size: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Make student and teacher logits [6, vocab_size] of one adversarial kind."""
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(6, vocab_size, generator=generator) * 3
    y = x + torch.randn(6, vocab_size, generator=generator)
    ids = torch.arange(float(vocab_size)).expand(6, -1)
    if kind == "spikes":
        x[:, ::211] += 12
    elif kind == "zipf":
        x, y = -1.1 * (ids + 1).log(), -1.3 * (ids + 2).log()
    elif kind == "constant":
        x = torch.zeros_like(x)
    elif kind == "ascending":
        x, y = ids * 0.01, y
    elif kind == "ties":
        x, y = x.round(), y.round()
    elif kind == "two_levels":
        x = (x > 0).float()
    elif kind == "extreme":
        x, y = x.sign() * 80, y.sign() * 80
    elif kind == "jumps":
        x, y = x + 40 * (ids // 400), y - 40 * (ids // 300)
    elif kind == "offset":
        x, y = x + 1000, y - 1000
    return x.to(dtype).contiguous(), y.to(dtype).contiguous()


KINDS = ["gaussian", "spikes", "zipf", "constant", "ascending", "ties", "two_levels", "extreme"]
KINDS += ["jumps", "offset"]


def border_labels(bounds, vocab_size) -> torch.Tensor:
    """Return the first and last columns of shards, and the ends of the vocabulary."""
    borders = [edge for start, stop in bounds for edge in (start, stop - 1)]
    return torch.tensor([0, vocab_size - 1, *borders, *range(6)]).clamp(0, vocab_size - 1)[:6]


def merged_on(bounds, x, y, labels, **options) -> list[Any]:
    def run(problem):
        return autograd.merged_stats(
            shard_of(x, problem), shard_of(y, problem), labels - problem.start, problem
        )

    return on_ranks(bounds, run, dtype=x.dtype, **options)


def gradient_on(bounds, x, y, labels, coefficients, **options) -> torch.Tensor:
    """Return the gradient over the whole vocabulary; the padding's must be 0."""

    def run(problem):
        student, teacher = shard_of(x, problem), shard_of(y, problem)
        local = labels - problem.start
        merged = autograd.merged_stats(student, teacher, local, problem)
        gradient = autograd.student_gradient(student, teacher, local, merged, coefficients, problem)
        assert torch.count_nonzero(gradient[:, problem.num_valid :]) == 0
        again = autograd.student_gradient(
            student, teacher, local, merged, coefficients, problem, into="student"
        )
        torch.testing.assert_close(again, gradient, rtol=0, atol=0, equal_nan=True)
        return gradient[:, : problem.num_valid]

    return torch.cat(on_ranks(bounds, run, dtype=x.dtype, **options), dim=1)


def assert_stats_close(actual, exact_x, exact_y, labels) -> None:
    expected = reference.definition(exact_x.double(), exact_y.double(), labels)
    for index, name in enumerate(FINAL[2:-1], start=2):
        error = (actual[:, index] - expected[name]).abs()
        scale = expected[name].abs().clamp(min=1)
        if name == "reward_variance":
            # A difference of squares: the scale is the second moment about the reference points.
            gap = (exact_x - exact_x.amax(1, True)) - (exact_y - exact_y.amax(1, True))
            scale = scale + 3 * (exact_x.softmax(-1) * gap).sum(-1).square()
        assert (error <= LOSS_TOLERANCE * scale).all(), (name, float((error / scale).max()))
    collision = (2 * exact_x.double().log_softmax(-1)).exp().sum(-1)
    conditioned = 1 - collision > 0.05
    error = (actual[:, -1] - expected["optimal_baseline"]).abs()[conditioned]
    scale = expected["optimal_baseline"].abs().clamp(min=1)[conditioned]
    assert (error <= 20 * LOSS_TOLERANCE * scale).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_statistics_and_topk_are_exact_in_every_layout(isa, kind, dtype, temperature):
    x, y = rows(kind, V, dtype)
    order = torch.sort(x.float() + 0.0, dim=-1, descending=True, stable=True).indices[:, :33]
    for tp in (1, 2, 8):
        bounds = splits(V, tp, "uneven")
        labels = border_labels(bounds, V)
        answers = merged_on(bounds, x, y, labels, temperature=temperature, topk=33)
        for answer in answers:
            assert torch.equal(answer.final, answers[0].final)
            assert torch.equal(answer.summary, answers[0].summary)
        tempered = (x.double() / temperature, y.double() / temperature)
        assert_stats_close(answers[0].final, *tempered, labels)
        chosen = [
            torch.nn.functional.pad(
                answer.ids + start, (0, 33 - answer.ids.shape[1]), value=-1
            ).masked_fill(torch.arange(33) >= answer.taken[:, None], -1)
            for answer, (start, _) in zip(answers, bounds, strict=True)
        ]
        together = torch.cat(chosen, dim=1)
        found = together[together >= 0].view(6, 33).sort(-1).values
        assert torch.equal(found, order.sort(-1).values)


MIXES = {
    "policy": [1.5, 0, 0, 0, 0],
    "reverse": [0, 1, 0, 0, 0],
    "forward": [0, 0, 1, 0, 0],
    "entropy": [0, 0, 0, 1, 0],
    "topk": [0, 0, 0, 0, 1],
    "all": [-0.7, 0.2, 0.8, -0.1, 0.5],
    "none": [0, 0, 0, 0, 0],
}


def exact_gradient(x, y, labels, mix, temperature, topk) -> torch.Tensor:
    """Compute the gradient of the definition by autograd in fp64."""
    leaf = x.double().requires_grad_()
    tempered, teacher = leaf / temperature, y.double() / temperature
    values = reference.definition(tempered, teacher, labels)
    names = ("student_logprob", "reverse_kl", "forward_kl", "entropy")
    ids = torch.sort(x.float() + 0.0, dim=-1, descending=True, stable=True).indices[:, :topk]
    top_p, top_q = (z.gather(1, ids).log_softmax(-1) for z in (tempered, teacher))
    terms = [-values[names[0]], *(values[name] for name in names[1:])]
    terms.append((top_p.exp() * (top_p - top_q)).sum(-1))
    loss = sum(
        (weight * term for weight, term in zip(mix, terms, strict=True) if weight), 0 * terms[0]
    )
    assert isinstance(loss, torch.Tensor)
    return torch.autograd.grad(loss.sum(), leaf)[0]


def gradient_scale(x, y, mix, exact) -> torch.Tensor:
    """Return the row's largest element, with the terms of its differences as absolute values.

    Where one p is nearly 1, p (d - RKL) is a small difference of large numbers that are themselves
    known to fp32 precision only; and so is p - q where the two are near.
    """
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    p = log_p.exp()
    terms = abs(mix[1]) * (p * (log_p - log_q).abs()) + abs(mix[3]) * (p * log_p.abs())
    terms = terms + abs(mix[2]) * torch.maximum(p, log_q.exp())
    return torch.maximum(exact.abs(), terms).amax(1, keepdim=True).clamp(min=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", sorted(MIXES))
def test_gradients_are_exact_for_every_mix(isa, kind, mix):
    coefficients = torch.tensor(MIXES[mix], dtype=torch.float64).expand(6, -1).contiguous()
    for dtype, tp, temperature in (
        (torch.float32, 1, 1.0),
        (torch.float32, 4, 0.7),
        (torch.bfloat16, 2, 1.0),
    ):
        x, y = rows(kind, V, dtype)
        bounds = splits(V, tp, "uneven")
        labels = border_labels(bounds, V)
        exact = exact_gradient(x, y, labels, MIXES[mix], temperature, 33)
        actual = gradient_on(bounds, x, y, labels, coefficients, temperature=temperature, topk=33)
        tolerance = GRADIENT_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
        scale = gradient_scale(x / temperature, y / temperature, MIXES[mix], exact)
        error = ((actual.double() - exact).abs() / scale).max()
        assert error <= tolerance, (dtype, tp, float(error))


def pairs_of_logits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Make student and teacher logits [64, 5003]: far apart, close, closer than fp32 can tell."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(64, 5003, generator=generator)

    x = noise() * 3
    spiked = x.clone()
    spiked[:, ::701] += 12
    return {
        "independent": (x, noise() * 3),
        "correlated": (x, x + noise()),
        "spikes": (spiked, spiked + noise()),
        "near": (x, x + 0.01 * noise()),
        "near, spikes": (spiked, spiked + 0.01 * noise()),
        "near, with an offset": (x, x + 10 + 0.01 * noise()),
        "extreme": (noise().sign() * 80, noise().sign() * 80),
    }


def within_half_an_ulp(z: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw fp64 logits that are rounded to the fp32 logits `z`."""
    ulp = torch.nextafter(z.abs(), torch.full_like(z, torch.inf)).double() - z.abs().double()
    generator = torch.Generator().manual_seed(seed)
    return z.double() + (torch.rand(z.shape, generator=generator) - 0.5) * ulp


@pytest.mark.parametrize("kind", sorted(pairs_of_logits()))
@pytest.mark.parametrize("mix", ["policy", "reverse", "forward", "mixed"])
def test_gradients_are_as_exact_as_their_input(isa, kind, mix):
    """The error is below 5e-6 of the gradient's norm, or what rounding the logits to fp32 does.

    At a KL of 5e-5 that rounding alone is 3e-5 to 6e-5 of the gradient.
    """
    x, y = pairs_of_logits()[kind]
    labels = torch.arange(len(x)) * 70
    weights = {"policy": (1, 0, 0, 0, 0), "reverse": (0, 1, 0, 0, 0), "forward": (0, 0, 1, 0, 0)}
    mixture = weights.get(mix, (0, 0.2, 0.8, 0, 0))
    coefficients = torch.tensor(mixture, dtype=torch.float64).expand(len(x), -1).contiguous()
    exact = exact_gradient(x, y, labels, mixture, 1.0, 0)
    moved = exact_gradient(
        within_half_an_ulp(x, 1), within_half_an_ulp(y, 2), labels, mixture, 1.0, 0
    )
    actual = gradient_on([(0, x.shape[1])], x, y, labels, coefficients)
    error, input_error = ((z.double() - exact).norm() / exact.norm() for z in (actual, moved))
    assert error <= max(GRADIENT_TOLERANCE, input_error), (float(error), float(input_error))


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 127, 129, 1023, 1025, 2049])
def test_every_length_of_a_row_and_one_token(isa, vocab_size):
    x, y = rows("gaussian", vocab_size)
    for num_tokens in (1, 6):
        labels = torch.arange(num_tokens) % vocab_size
        (answer,) = merged_on([(0, vocab_size)], x[:num_tokens], y[:num_tokens], labels, topk=1)
        expected = reference.definition(x[:num_tokens].double(), y[:num_tokens].double(), labels)
        torch.testing.assert_close(answer.final[:, 4], expected["reverse_kl"], rtol=2e-6, atol=2e-6)
        mix = torch.tensor(MIXES["all"], dtype=torch.float64).expand(num_tokens, -1).contiguous()
        exact = exact_gradient(x[:num_tokens], y[:num_tokens], labels, MIXES["all"], 1.0, 1)
        actual = gradient_on([(0, vocab_size)], x[:num_tokens], y[:num_tokens], labels, mix, topk=1)
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=5e-6)


def test_infinities_inside_the_vocabulary_propagate_and_never_mask(isa):
    x, y = rows("gaussian", V)
    x[0, 100:200], y[0, 100:200] = -torch.inf, -torch.inf  # both: no mass, no term
    x[1, 5] = -torch.inf  # p = 0 where q > 0
    y[2, 5] = -torch.inf  # q = 0 where p > 0
    x[3, 7] = torch.nan
    y[4, 7] = torch.nan
    x[5, 8] = torch.inf
    labels = torch.full((6,), 11)
    (answer,) = merged_on([(0, V)], x, y, labels, topk=5)
    final = dict(zip(FINAL, answer.final.unbind(1), strict=True))
    exact = reference.definition(x.double(), y.double(), labels)
    for name in ("reverse_kl", "entropy", "forward_kl", "teacher_entropy"):
        torch.testing.assert_close(
            final[name], exact[name], rtol=2e-6, atol=2e-6, equal_nan=True, msg=name
        )
    assert final["forward_kl"][1] == torch.inf and final["reverse_kl"][2] == torch.inf
    assert final["reward_variance"][2].isnan() and final["optimal_baseline"][2].isnan()
    assert answer.summary is not None and answer.summary[3, 2].isnan()
    mix = torch.tensor(MIXES["reverse"], dtype=torch.float64).expand(6, -1).contiguous()
    gradient = gradient_on([(0, V)], x[:2], y[:2], labels[:2], mix[:2].clone(), topk=5)
    assert torch.isfinite(gradient).all() and torch.count_nonzero(gradient[0, 100:200]) == 0


def test_a_shard_far_below_the_others_contributes_nothing_and_no_nan(isa):
    x, y = rows("gaussian", V)
    x[:, :500], y[:, :500] = -torch.inf, -1e30
    x[:, 500:700], y[:, 500:700] = -1e30, -torch.inf
    labels = torch.full((6,), 900)
    whole = reference.definition(x[:, 700:].double(), y[:, 700:].double(), labels - 700)
    for bounds in ([(0, V)], [(0, 500), (500, 700), (700, V)]):
        final = merged_on(bounds, x, y, labels)[-1].final
        torch.testing.assert_close(final[:, 4], whole["reverse_kl"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(final[:, 5], whole["forward_kl"], rtol=2e-6, atol=2e-6)


def test_teacher_equal_to_student_is_exactly_zero(isa):
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            x, _ = rows(kind, V, dtype)
            labels = torch.arange(6)
            (answer,) = merged_on([(0, V)], x, x.clone(), labels, topk=9)
            assert torch.count_nonzero(answer.final[:, [4, 5, 8, 9]]) == 0
            assert torch.equal(answer.final[:, 2], answer.final[:, 3])
            assert torch.count_nonzero(answer.summary[:, [2, 3]]) == 0
            mix = torch.tensor(MIXES["reverse"], dtype=torch.float64).expand(6, -1).contiguous()
            gradient = gradient_on([(0, V)], x, x.clone(), labels, mix, topk=9)
            assert torch.count_nonzero(gradient) == 0


def test_extreme_cases_have_finite_gradients_wherever_the_exact_one_is(isa):
    generator = torch.Generator().manual_seed(8)
    for _ in range(500 // 6 + 1):
        size = 10 ** (torch.rand(6, 1, generator=generator) * 4 - 1)
        x = torch.randn(6, 301, generator=generator) * size
        y = torch.randn(6, 301, generator=generator) * size.flip(0)
        x[torch.rand(6, 301, generator=generator) < 0.02] = -torch.inf
        y[torch.rand(6, 301, generator=generator) < 0.001] = -torch.inf
        x[:, 300], y[:, 300] = 1.0, 1.0
        labels = torch.randint(0, 301, (6,), generator=generator)
        for name in ("policy", "reverse", "forward", "all"):
            mix = torch.tensor(MIXES[name], dtype=torch.float64).expand(6, -1).contiguous()
            (merged,) = merged_on([(0, 301)], x, y, labels, impl="reference", topk=5)
            exact = reference.logits_gradient(
                x, y, labels, merged.final, mix, 301, 1.0, merged.ids, merged.taken, merged.summary
            )
            actual = gradient_on([(0, 301)], x, y, labels, mix, topk=5)
            assert torch.isfinite(actual[torch.isfinite(exact)]).all(), name


@pytest.mark.parametrize("k", [1, 128, 1024, 20000])
@pytest.mark.parametrize("kind", ["gaussian", "ascending", "constant", "two_levels", "ties"])
def test_topk_is_exact_for_large_rows_and_lists(isa, kind, k):
    x, y = rows(kind, 20000)
    kernels = native.resolve("cpu", CPU, torch.float32)
    labels = torch.zeros(6, dtype=torch.long)
    _, student, teacher, ids = kernels.local_stats(x, y, labels, 20000, 1.0, k)
    expected = torch.sort(x + 0.0, dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(ids, expected)
    assert torch.equal(student, x.gather(1, ids)) and torch.equal(teacher, y.gather(1, ids))


def test_results_do_not_depend_on_the_number_of_threads(isa):
    x, y = rows("ties", V)
    labels = torch.arange(6)
    kernels = native.resolve("cpu", CPU, torch.float32)
    threads = torch.get_num_threads()
    answers = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        answers.append(kernels.local_stats(x, y, labels, V, 1.0, 40))
    torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answer, answers[0], strict=True))


def test_the_narrow_gradient_lies_at_the_beginning_of_the_teachers_rows():
    """The twin of the CUDA operator; what is behind its rows stays as it was."""
    x, y = rows("gaussian", 40)
    labels = torch.arange(6)
    packed = reference.local_stats(x, y, labels, 37, 0.7, 0)[0]
    final = reference.merge_stats(packed[None], 1e-4)
    coefficients = torch.ones(6, len(COEFFICIENTS), dtype=torch.float64)
    arguments = (labels, final, coefficients, 37, 0.7)
    expected = reference.logits_gradient(x, y, *arguments).bfloat16()
    teacher = y.clone()
    reference.logits_gradient_narrow_(x, teacher, *arguments)
    assert torch.equal(reference.narrow_rows(teacher, 40), expected)
    assert torch.equal(teacher[:, 20:], y[:, 20:])
    with pytest.raises(NotImplementedError, match="CPU"):
        native.resolve("cpu", CPU, torch.float32).logits_gradient_narrow_(x, teacher, *arguments)


def test_operators_pass_opcheck():
    x, y = rows("gaussian", 40)
    labels = torch.arange(6)
    kernels = native.resolve("cpu", CPU, torch.float32)
    packed, _, _, ids = kernels.local_stats(x, y, labels, 37, 0.7, 4)
    final = kernels.merge_stats(packed[None], 1e-4)
    coefficients = torch.ones(6, len(COEFFICIENTS), dtype=torch.float64)
    summary = torch.zeros(6, 6, dtype=torch.float64)
    taken = torch.full((6,), 4)
    arguments = (x, y, labels, final, coefficients, 37, 0.7, ids, taken, summary)
    torch.library.opcheck(kernels.local_stats.default, (x, y, labels, 37, 0.7, 4))
    torch.library.opcheck(kernels.merge_stats.default, (packed[None], 1e-4))
    torch.library.opcheck(kernels.logits_gradient.default, arguments)
    torch.library.opcheck(kernels.logits_gradient_.default, (x.clone(), *arguments[1:]))


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("student", lambda a: {**a, "student": a["student"].half()}),
        ("student", lambda a: {**a, "student": a["student"][:, :20]}),
        ("teacher", lambda a: {**a, "teacher": a["teacher"].bfloat16()}),
        ("teacher", lambda a: {**a, "teacher": a["teacher"][:3]}),
        ("labels", lambda a: {**a, "labels": a["labels"].int()}),
        ("temperature", lambda a: {**a, "temperature": 0.0}),
        ("topk", lambda a: {**a, "topk": -1}),
    ],
)
def test_kernels_refuse_bad_arguments_by_name(argument, bad):
    x, y = rows("gaussian", 40)
    good = {"student": x, "teacher": y, "labels": torch.arange(6)}
    good |= {"num_valid": 37, "temperature": 1.0, "topk": 2}
    with pytest.raises(ValueError, match=argument):
        native.resolve("cpu", CPU, torch.float32).local_stats(**bad(good))
