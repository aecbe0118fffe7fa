"""Benchmarks of the core operator: ratios in one process, against copies, eager and torch.compile.

Candidates and baselines run interleaved, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_vopd.errors import OK
from megatron_vopd.objectives import advantages
from megatron_vopd.ops import linear, native
from megatron_vopd.ops.fields import Coefficients, DistillStats
from megatron_vopd.run.tool_options import tool_parser, whole_number
from megatron_vopd.vocab_parallel import VocabShard, linear_distill_loss

SUMMARY = """\
Time the core operator beside copies of the same bytes, eager torch and torch.compile: median and
least times, and the ratios of both. Outputs are compared before anything is timed. On the CPU the
script runs itself twice: with the default malloc, and with one that does not give memory back (page
faults slow eager torch three- to fourfold, and would flatter the operator). A table and a plot go
to --out."""
EXAMPLES = """\
  python tools/benchmark_ops.py
  python tools/benchmark_ops.py --tokens 64 --vocab 32768 --repeats 5 --no-compile --out runs/bench
  python tools/benchmark_ops.py --device cuda"""
TOPK = 128
BY_INPUT = f"statistics + top-{TOPK} by input"
# Tokens, hidden size and vocabulary of the LM-head comparison.
LINEAR_CPU, LINEAR_CUDA = (512, 1024, 32768), (8192, 4096, 151936)
FAULT_FREE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = ("gaussian", "zipf", "constant", "ascending", "ties")


def make_logits(
    kind: str, num_tokens: int, vocab_size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make logits [T, V] fp32 of student and teacher by one of INPUTS (kernels.md section 5).

    On the device itself: a host would need half a minute for the numbers that a GPU is timed with.
    """
    generator = torch.Generator(device).manual_seed(0)
    known = {"generator": generator, "device": device}
    x = torch.randn(num_tokens, vocab_size, **known).mul_(3)
    x[:, torch.randint(0, vocab_size, (8,), **known)] += 12
    y = torch.randn(num_tokens, vocab_size, **known).add_(x)
    ids = torch.arange(float(vocab_size), device=device).expand(num_tokens, -1)
    if kind == "zipf":
        x = x.mul_(0.1).sub_(1.1 * (ids + 1).log())
    elif kind == "constant":
        # Not zeros: untouched pages of the default malloc would be one shared page.
        x = torch.full_like(x, 0.5)
    elif kind == "ascending":
        x = ids * (20 / vocab_size)
    elif kind == "ties":
        x = x.bfloat16().float()
    return x.contiguous(), y


def eager_statistics(x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Compute the five main outputs by torch: two label log-probs, both divergences, entropy."""
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    p, delta = log_p.exp(), log_p - log_q
    return [
        log_p.gather(1, labels[:, None])[:, 0],
        log_q.gather(1, labels[:, None])[:, 0],
        (p * delta).sum(-1),
        -(log_q.exp() * delta).sum(-1),
        -(p * log_p).sum(-1),
    ]


def timed(cases: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list]:
    """Return milliseconds of every case, interleaved; one unmeasured round comes first."""
    times: dict[str, list] = {name: [] for name in cases}
    for round_number in range(repeats + 1):
        for name, run in cases.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_number:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def operator_cases(
    x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Return calls of the operator's kernels on one input."""
    kernels = native.resolve("auto", x.device, x.dtype)
    vocab_size = x.shape[1]
    final = kernels.merge_stats(
        kernels.local_stats(x, y, labels, vocab_size, 1.0, 0)[0][None], 1e-4
    )

    def statistics(topk: int) -> Callable[[], object]:
        return lambda: kernels.local_stats(x, y, labels, vocab_size, 1.0, topk)

    def gradient(at: int, narrow: bool = False) -> Callable[[], object]:
        weights = torch.zeros(len(x), 5, dtype=torch.float64, device=x.device)
        weights[:, at] = 1
        arguments = (labels, final, weights, vocab_size, 1.0)
        if narrow:
            # Written over the teacher's logits: those of each call after the first are no numbers.
            scratch = y.clone()
            return lambda: kernels.logits_gradient_narrow_(x, scratch, *arguments)
        return lambda: kernels.logits_gradient(x, y, *arguments)

    cases = {
        "statistics": statistics(0),
        f"statistics + top-{TOPK}": statistics(TOPK),
        "policy gradient": gradient(0),
        "reverse-KL gradient": gradient(1),
        "forward-KL gradient": gradient(2),
    }
    if x.is_cuda:
        cases["policy gradient in bf16, over the teacher"] = gradient(0, narrow=True)
        cases["reverse-KL gradient in bf16, over the teacher"] = gradient(1, narrow=True)
    return cases


def baseline_cases(
    x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor, compiled: Callable | None
) -> dict[str, Callable[[], object]]:
    """Return copies of the same bytes, and what torch offers for the work."""
    to_x, to_y = torch.empty_like(x), torch.empty_like(y)

    def copy_three_halves() -> None:
        # Two reads and one write: as many bytes as the reverse-KL gradient moves.
        torch.add(x, y, out=to_x)

    cases = {
        "read both (max)": lambda: (x.amax(), y.amax()),
        "copy both": lambda: (to_x.copy_(x), to_y.copy_(y)),
        "copy one": lambda: to_x.copy_(x),
        "clone one (fresh output)": lambda: x.clone(),
        "add (2 reads, 1 write)": copy_three_halves,
        "eager torch, 5 outputs": lambda: eager_statistics(x, y, labels),
        "torch.topk(32)": lambda: x.topk(32),
    }
    if compiled is not None:
        cases["torch.compile, 5 outputs"] = lambda: compiled(x, y, labels)
    return cases


def linear_cases(device: str, largest: int) -> dict[str, Callable[[], object]]:
    """Return calls of the LM-head entrance, forward and backward, and of its four GEMMs alone.

    Args:
        largest: the vocabulary has at most so many columns.
    """
    num_tokens, hidden_size, vocab_size = LINEAR_CPU if device == "cpu" else LINEAR_CUDA
    vocab_size = min(vocab_size, largest)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    chunk = num_tokens // 2
    shapes = ((num_tokens, hidden_size), (vocab_size, hidden_size)) * 2
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(*shape, device=device).mul_(shape[1] ** -0.5).to(dtype) for shape in shapes
    )
    labels = torch.randint(0, vocab_size, (num_tokens,), device=device)
    group = dist.group.WORLD
    assert group is not None
    shard = VocabShard(0, vocab_size, group)
    leaves = hidden.requires_grad_(), head.requires_grad_()

    def vopd(stats: DistillStats) -> Coefficients:
        zeros = torch.zeros_like(stats.student_logprob_T.detach())
        return Coefficients(advantages["full"](stats), zeros, zeros, zeros, zeros)

    def entrance() -> object:
        loss, _ = linear_distill_loss(
            *leaves,
            teacher_hidden,
            teacher_head,
            labels,
            shard,
            vopd,
            chunk=chunk,
            check_ranks=False,
        )
        return torch.autograd.grad(loss, leaves)

    x, w = hidden.detach(), head.detach()
    logits = torch.empty(chunk, vocab_size, device=device)
    gradient = logits
    if device == "cuda":
        # As the operator has it: bf16 rows, each at the beginning of a row of fp32.
        gradient = torch.randn(chunk, 2 * vocab_size, device=device, dtype=dtype)[:, :vocab_size]

    def gemms() -> object:
        rows_gradient = torch.empty_like(x)
        total = torch.zeros_like(w, dtype=torch.float32)
        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            linear.head_logits(teacher_hidden[rows], teacher_head, logits)
            linear.head_logits(x[rows], w, logits)
            rows_gradient[rows] = linear.hidden_gradient(gradient, w)
            linear.add_weight_gradient(total, gradient, x[rows])
        return rows_gradient, total

    return {"LM-head entrance": entrance, "its GEMMs alone": gemms}


def assert_same_outputs(x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor) -> None:
    kernels = native.resolve("auto", x.device, x.dtype)
    packed, _, _, ids = kernels.local_stats(x, y, labels, x.shape[1], 1.0, TOPK)
    final = kernels.merge_stats(packed[None], 1e-4)
    expected = torch.stack(eager_statistics(x.double(), y.double(), labels), dim=1)
    actual = final[:, [2, 3, 4, 5, 6]]
    torch.testing.assert_close(actual, expected, rtol=4e-6, atol=4e-6)
    order = torch.sort(x + 0.0, dim=-1, descending=True, stable=True).indices[:, :TOPK]
    assert torch.equal(ids, order), "the top-k differs from a stable sort"


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list]]:
    """Time the gaussian input with its baselines, of the top-k by input, of the LM heads."""
    compiled = None if arguments.no_compile else torch.compile(eager_statistics)
    by_kind: dict[str, Callable[[], object]] = {}
    results = {}
    labels = torch.randint(0, arguments.vocab, (arguments.tokens,)).to(arguments.device)
    rows = slice(0, min(16, arguments.tokens))
    for kind in INPUTS:
        logits = make_logits(kind, arguments.tokens, arguments.vocab, arguments.device)
        x, y = (z.to(DTYPES[arguments.dtype]) for z in logits)
        del logits  # in bf16 two fp32 tensors that nothing needs
        assert_same_outputs(x[rows], y[rows], labels[rows])
        cases = operator_cases(x, y, labels)
        by_kind[kind] = cases[f"statistics + top-{TOPK}"]
        if kind == "gaussian":
            cases |= baseline_cases(x, y, labels, compiled)
            results[kind] = timed(cases, arguments.repeats, arguments.device)
    # All inputs in one round, so that their ratios too meet the same load.
    results[BY_INPUT] = timed(by_kind, arguments.repeats, arguments.device)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    few = max(3, arguments.repeats // 4)
    results["linear"] = timed(
        linear_cases(arguments.device, arguments.vocab), few, arguments.device
    )
    dist.destroy_process_group()
    return results


def targets(results: dict[str, dict[str, list]], summary: Callable) -> list[tuple]:
    """Compute the rows of kernels.md section 5 decided here: name, ratio, target."""
    main = {name: summary(values) for name, values in results["gaussian"].items()}
    by_input = {name: summary(values) for name, values in results[BY_INPUT].items()}
    linear_times = {name: summary(values) for name, values in results["linear"].items()}
    slowest = max(by_input[kind] for kind in ("constant", "ascending", "ties"))
    topk, stats = main[f"statistics + top-{TOPK}"], main["statistics"]
    compiled = main.get("torch.compile, 5 outputs", float("nan"))
    policy, reverse = main["policy gradient"], main["reverse-KL gradient"]
    entrance = linear_times["LM-head entrance"] / linear_times["its GEMMs alone"]
    return [
        ("torch.compile / statistics", compiled / stats, ">= 4"),
        ("eager torch / statistics", main["eager torch, 5 outputs"] / stats, ">= 12"),
        ("statistics / reading both", stats / main["read both (max)"], "<= 1.8"),
        ("statistics / copying both", stats / main["copy both"], "(prototype: 0.85)"),
        (f"statistics + top-{TOPK} / statistics", topk / stats, "<= 1.35"),
        ("adversarial rows / gaussian rows", slowest / by_input["gaussian"], "<= 1.3"),
        ("policy gradient / copying one", policy / main["copy one"], "<= 1.3"),
        ("policy gradient / cloning one", policy / main["clone one (fresh output)"], "<= 1.3"),
        ("reverse-KL gradient / add", reverse / main["add (2 reads, 1 write)"], "<= 1.3"),
        ("LM-head entrance / its GEMMs", entrance, "<= 1.2"),
    ]


def table(title: str, results: dict[str, dict[str, list]]) -> str:
    lines = [
        f"### {title}",
        "",
        "| input | case | median ms | least ms |",
        "| --- | --- | --- | --- |",
    ]
    for kind, cases in results.items():
        for name, values in cases.items():
            lines.append(f"| {kind} | {name} | {median(values):.2f} | {min(values):.2f} |")
    lines += ["", "| ratio | of medians | of least times | target |", "| --- | --- | --- | --- |"]
    least = {name: ratio for name, ratio, _ in targets(results, min)}
    for name, ratio, target in targets(results, median):
        lines.append(f"| {name} | {ratio:.2f} | {least[name]:.2f} | {target} |")
    return "\n".join([*lines, ""])


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    isa = native.build_info()["isa"]
    threads = torch.get_num_threads()
    return f"{model} ({platform.machine()}, {isa}), {threads} threads, torch {torch.__version__}"


def write_plot(path: Path, results: dict[str, dict[str, list]], title: str) -> None:
    """Draw the first input's medians as bars; without matplotlib, say so instead."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    cases = {name: median(values) for name, values in results["gaussian"].items()}
    names = sorted(cases, key=lambda name: -cases[name])
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    own = ("statistics", "policy", "reverse-KL", "forward-KL")
    colours = ["tab:blue" if name.startswith(own) else "lightgray" for name in names]
    bars = axes.barh(names, [cases[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("median ms (blue: this operator)")
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def in_child(arguments: list[str], environment: dict[str, str]) -> dict[str, dict[str, list]]:
    command = [sys.executable, __file__, *arguments, "--json"]
    run = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write table and plot; returns the exit status."""
    own = sys.argv[1:] if words is None else list(words)
    parser = tool_parser(SUMMARY, EXAMPLES)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    some = whole_number(1)
    add("--tokens", type=some, metavar="T", help="rows of logits (default 256; cuda: 4096)")
    add("--vocab", type=some, metavar="V", default=151936, help="columns (default %(default)s)")
    add("--dtype", default="fp32", choices=tuple(DTYPES), help="of the logits (default fp32)")
    add("--repeats", type=some, metavar="N", default=20, help="timed rounds (default %(default)s)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    folder = "folder of table and plot (default %(default)s)"
    add("--out", type=Path, metavar="DIR", default=Path("docs/evidence/benchmarks"), help=folder)
    add("--json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(own)
    arguments.tokens = arguments.tokens or {"cpu": 256, "cuda": 4096}[arguments.device]
    if arguments.json:
        print(json.dumps(measure(arguments)))
        return OK
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, expected a GPU that torch can use; give --device cpu")
    if arguments.device == "cuda":
        runs = {"CUDA": in_child(own, {})}
    else:
        runs = {
            "malloc that keeps its pages": in_child(own, FAULT_FREE),
            "default malloc": in_child(own, {}),
        }
    date = datetime.datetime.now(datetime.UTC).date()
    sizes = f"T={arguments.tokens}, V={arguments.vocab}, {arguments.dtype}"
    title = f"{sizes}; {machine(arguments.device)}; {date}"
    command = f"python tools/benchmark_ops.py {' '.join(own)}".strip()
    sections = [table(name, results) for name, results in runs.items()]
    text = "\n".join([f"## {title}", "", f"`{command}`", "", *sections])
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arguments.device + ("" if arguments.dtype == "fp32" else f"_{arguments.dtype}")
    (arguments.out / f"{name}.md").write_text(text)
    write_plot(arguments.out / f"{name}.png", next(iter(runs.values())), title)
    print(text)
    return OK


if __name__ == "__main__":
    sys.exit(main())
