"""CUDA kernels against the fp64 reference and, for the top-k, against the CPU kernels in bits.

A plain script, so that the GPU machine needs no pytest: prints one line per check, exits 1 when one
fails. Run by accept.sh. `--device cpu` checks the CPU kernels instead, and so this script.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_vopd.ops import autograd, native, reference, topk
from megatron_vopd.ops.fields import FINAL, Coefficients, DistillStats
from megatron_vopd.vocab_parallel import VocabShard, linear_distill_loss

DEVICE = torch.device("cuda")
K = 128
# ex2.approx is good to 2 units in the last place: twice the CPU's bar.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, BF16_TOLERANCE = 4e-6, 1e-5, 2.0**-8
MIXES = {
    "policy": [1.5, 0, 0, 0, 0],
    "reverse": [0, 1, 0, 0, 0],
    "forward": [0, 0, 1, 0, 0],
    "topk": [0, 0, 0, 0, 1],
    "all": [-0.7, 0.2, 0.8, -0.1, 0.5],
}


def rows(kind: str, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make adversarial logits [8, vocab_size] on the CPU."""
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(8, vocab_size, generator=generator) * 3
    y = x + torch.randn(8, vocab_size, generator=generator)
    ids = torch.arange(float(vocab_size)).expand(8, -1)
    if kind == "spikes":
        x[:, ::211] += 12
    elif kind == "constant":
        x = torch.zeros_like(x)
    elif kind == "ascending":
        x = ids * (20 / vocab_size)
    elif kind == "ties":
        x, y = x.round(), y.round()
    elif kind == "two_levels":
        x = (x > 0).float()
    elif kind == "extreme":
        x, y = x.sign() * 80, y.sign() * 80
    elif kind == "offset":
        # References that are not close: the difference of two logits would lose digits.
        y = y + 300
    elif kind == "minus_inf":
        x[:, ::7], y[:, ::7] = -torch.inf, -torch.inf
    return x.contiguous(), y.contiguous()


KINDS = ("gaussian", "spikes", "constant", "ascending", "ties", "two_levels", "extreme")
KINDS += ("minus_inf", "offset")
DTYPES = (torch.float32, torch.bfloat16)


def shards(vocab_size: int, tp: int) -> list[tuple[int, int]]:
    edges = [round(vocab_size * r / tp) for r in range(tp + 1)]
    if tp > 2:
        edges[1] = edges[2]
    return list(itertools.pairwise(edges))


def merged(x, y, labels, bounds, kernels, temperature) -> list[Any]:
    """Merge the local statistics of every shard, as over ranks.

    The teacher's shard is a view, so that its rows lie differently on 16 bytes than the student's.
    """
    parts = [
        kernels.local_stats(x[:, a:b].contiguous(), y[:, a:b], labels - a, b - a, temperature, K)
        for a, b in bounds
    ]
    final = kernels.merge_stats(torch.stack([part[0] for part in parts]), 1e-4)
    lists = torch.zeros(2, len(bounds), len(x), K, device=x.device)
    for rank, (_, student, teacher, _) in enumerate(parts):
        lists[0, rank, :, : student.shape[1]] = student
        lists[1, rank, :, : teacher.shape[1]] = teacher
    lengths = torch.tensor([min(K, b - a) for a, b in bounds], device=x.device)
    student, teacher, taken = kernels.merge_topk(lists[0], lists[1], lengths, K)
    covers_all = torch.tensor(False, device=x.device)
    summary = topk.summarize(student, teacher, final, temperature, covers_all)
    return [
        autograd.MergedStats(final, summary, part[3], taken[:, rank].contiguous())
        for rank, part in enumerate(parts)
    ]


def narrow_is_equal(
    gradient: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    bounds: tuple[int, int],
    arguments: tuple[Any, ...],
    kernels: native.Kernels,
) -> bool:
    """Return whether the gradient over the teacher's columns has the bits of the one in fp32.

    Columns of the teacher outside of the bounds must stay as they are.
    """
    written, (a, b) = teacher.clone(), bounds
    kernels.logits_gradient_narrow_(student, written[:, a:b], *arguments)
    low = reference.narrow_rows(written[:, a:b], b - a)
    outside = torch.ones_like(written[0], dtype=torch.bool)
    outside[a:b] = False
    kept = torch.equal(written[:, outside], teacher[:, outside])
    rounded = gradient.bfloat16().float()
    return kept and torch.equal(low.float().nan_to_num(7), rounded.nan_to_num(7))


def check(
    kind: str,
    dtype: torch.dtype,
    vocab_size: int,
    tp: int,
    temperature: float,
    device: torch.device = DEVICE,
    kernels: native.Kernels | None = None,
) -> list[str]:
    """Return the complaints about one case."""
    complaints = []
    x, y = (z.to(dtype) for z in rows(kind, vocab_size))
    labels = torch.tensor([0, vocab_size - 1, 5, 7, 9, 11, 100, 101])
    bounds = shards(vocab_size, tp)
    cuda = kernels or native.resolve("cuda", device, dtype)
    on_gpu: Any = [z.to(device) for z in (x, y, labels)]
    actual = merged(on_gpu[0], on_gpu[1], on_gpu[2], bounds, cuda, temperature)
    expected: Any = merged(
        x, y, labels, bounds, native.resolve("reference", x.device, dtype), temperature
    )
    index = {name: i for i, name in enumerate(FINAL)}
    for name in ("student_logprob", "teacher_logprob", "reverse_kl", "forward_kl", "entropy"):
        a, b = (m[0].final[:, index[name]].cpu() for m in (actual, expected))
        error = float(((a - b).abs() / b.abs().clamp(min=1)).nan_to_num(0).max())
        if error > LOSS_TOLERANCE or not torch.equal(a.isnan(), b.isnan()):
            complaints.append(f"{name} error {error:.1e}")
    for rank, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not (torch.equal(a.ids.cpu(), b.ids) and torch.equal(a.taken.cpu(), b.taken)):
            complaints.append(f"top-k of rank {rank} differs")
    for mix, values in MIXES.items():
        coefficients = torch.tensor(values, dtype=torch.float64).expand(8, -1).contiguous()
        a, b = bounds[-1]
        arguments: Any = (labels - a, expected[-1].final, coefficients, b - a, temperature)
        tail: Any = (expected[-1].ids, expected[-1].taken, expected[-1].summary)
        student, teacher = x[:, a:b].contiguous(), y[:, a:b]
        exact = reference.logits_gradient(student.double(), teacher.double(), *arguments, *tail)
        # Of the kernels' own statistics, as in training: they belong to the temperature that the
        # kernels have, which is rounded; at an offset of 300 that shows.
        own = actual[-1]
        moved: Any = (labels.to(device) - a, own.final, coefficients.to(device), b - a, temperature)
        moved += (own.ids, own.taken, own.summary)
        student_gpu, teacher_gpu = student.to(device, copy=True), on_gpu[1][:, a:b]
        gradient = cuda.logits_gradient(student_gpu, teacher_gpu, *moved)
        has_narrow = dtype == torch.float32 and cuda.name != "cpu"
        if has_narrow and not narrow_is_equal(
            gradient, student_gpu, on_gpu[1], (a, b), moved, cuda
        ):
            complaints.append(f"{mix}: over the teacher differs")
        cuda.logits_gradient_(student_gpu, teacher_gpu, *moved)
        if not torch.equal(gradient.nan_to_num(7), student_gpu.nan_to_num(7)):
            complaints.append(f"{mix}: in place differs")
        # Where the row's gradient is a small difference, its terms set the scale.
        scale = exact.abs().amax(1, keepdim=True).clamp(min=0.05)
        error = float(((gradient.cpu().double() - exact).abs() / scale).nan_to_num(0).max())
        if error > (BF16_TOLERANCE if dtype == torch.bfloat16 else 4 * GRADIENT_TOLERANCE):
            complaints.append(f"{mix} gradient error {error:.1e}")
        if not torch.equal(gradient.cpu().isnan(), exact.isnan()):
            complaints.append(f"{mix} gradient has other NaNs")
    return complaints


def check_linear(mode: str, device: torch.device) -> list[str]:
    """Compare the LM-head entrance in bf16 with fp64 autograd, both on the device."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((48, 64), (2003, 64)) * 2
    tensors = [torch.randn(*s, generator=generator).bfloat16().to(device) for s in shapes]
    hidden, head = (z.clone().requires_grad_() for z in tensors[:2])
    labels = torch.arange(48, device=device)
    group = dist.group.WORLD
    assert group is not None

    def mixed(stats: DistillStats) -> Coefficients:
        weights = {"policy": 0.0, "reverse": 0.2, "forward": 0.8, "entropy": 0.0, "topk": 0.0}
        like = stats.student_logprob_T.detach()
        return Coefficients(**{name: torch.full_like(like, w) for name, w in weights.items()})

    loss, _ = linear_distill_loss(
        hidden,
        head,
        tensors[2],
        tensors[3],
        labels,
        VocabShard(0, 2003, group),
        mixed,
        chunk=20,
        mode=mode,  # pyright: ignore[reportArgumentType]
    )
    loss.backward()
    wide = [z.double().requires_grad_() for z in tensors]
    values = reference.definition(wide[0] @ wide[1].T, (wide[2] @ wide[3].T).detach(), labels)
    expected = (0.2 * values["reverse_kl"] + 0.8 * values["forward_kl"]).sum()
    expected.backward()
    complaints = []
    if abs(float(loss) / float(expected) - 1) > 1e-5:
        complaints.append(f"loss {float(loss)} instead of {float(expected)}")
    for name, actual, exact in (("dX", hidden, wide[0]), ("dW", head, wide[1])):
        assert actual.grad is not None and exact.grad is not None
        error = (actual.grad.double() - exact.grad).norm() / exact.grad.norm()
        if error > 1e-2:
            complaints.append(f"{name} error {float(error):.1e}")
    return complaints


def check_equal_models(device: torch.device) -> list[str]:
    """Require zeros, exactly, where teacher and student are the same."""
    x = torch.randn(8, 5003, device=device)
    labels = torch.zeros(8, dtype=torch.long, device=device)
    kernels = native.resolve(device.type, device, x.dtype)
    (same,) = merged(x, x.clone(), labels, [(0, 5003)], kernels, 1.0)
    is_zero = not torch.count_nonzero(same.final[:, [4, 5, 8, 9]])
    return [] if is_zero else ["not exactly zero"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--unaligned", action="store_true", help="the short vocabulary only")
    options = parser.parse_args()
    device = torch.device(options.device)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    cuts = ((5003, 1),) if options.unaligned else ((5003, 1), (40001, 4))
    complaints = {
        f"LM-head entrance, {mode}": check_linear(mode, device)
        for mode in ("grad_in_forward", "recompute")
    }
    kernels = {dtype: native.resolve(options.device, device, dtype) for dtype in DTYPES}
    for kind, dtype, (vocab_size, tp), temperature in itertools.product(
        options.kinds, DTYPES, cuts, (1.0, 0.7)
    ):
        name = f"{kind:10} {str(dtype)[6:]:8} V={vocab_size} tp={tp} tau={temperature}"
        case = (kind, dtype, vocab_size, tp, temperature)
        complaints[name] = check(*case, device, kernels[dtype])
    complaints["teacher == student"] = check_equal_models(device)
    for name, found in complaints.items():
        print(f"{name}: {'; '.join(found) or 'ok'}")
    failed = sum(map(bool, complaints.values()))
    print(f"{failed} failed" if failed else f"all {len(complaints)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
