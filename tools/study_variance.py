"""Variance and bias of the sampled gradient at fixed weights, baseline by baseline.

Gradients are sums over the tokens of a batch divided by one constant, so that the number of tokens
(which the sampled ends decide) adds no bias of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vopd.config.method import ObjectiveSection
from megatron_vopd.config.schema import DataSection, OptimizerSection, StudentSection
from megatron_vopd.errors import OK
from megatron_vopd.megatron.forward import forward_hidden
from megatron_vopd.megatron.groups import (
    Groups,
    independent_groups,
    init_single_process,
    student_groups,
)
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.megatron.student import Student, load_student
from megatron_vopd.megatron.teacher import Teacher, score
from megatron_vopd.objectives import Objective
from megatron_vopd.run import tool_options as tool
from megatron_vopd.run.settings import objective_of
from megatron_vopd.trainer.loss import RowLoss
from megatron_vopd.trainer.packing import pack
from megatron_vopd.types import Layout, Prompt, Rollout

SUMMARY = """\
Measure variance and bias of the sampled gradient. At two stages of training the student samples
batches of responses; on each, its gradient is computed under every baseline, by the loss of
training, and the exact gradient of the reverse KL at the same prefixes. Per baseline:

  variance  trace of the covariance of the gradient over batches, relative to plain OPD
  noise     that of (sampled - exact): what is left once the prefixes are fixed
  bias      (sampled - exact) along the mean exact gradient of the other batches, relative to its
            squared norm; 0 for an unbiased estimate. topk_reverse, which is biased, is measured
            too, to show that a bias would be seen.

Intervals are 95 %, by bootstrap over batches. OUT_DIR gets summary.md, results.json, variance.png.
Killed at any time, the same command resumes after the batches that are in --work."""
EXAMPLES = """\
  python tools/study_variance.py
  python tools/study_variance.py runs/variance --batches 8 --train-steps 10
  python tools/study_variance.py runs/variance_demo --student ./runs/demo/models/start \\
      --teacher ./runs/demo/teacher/hf/step_250 --prompts ./runs/demo/data/train.jsonl \\
      --max-tokens 34"""
OUT_DIR = Path("docs/evidence/studies/results/variance")

# Name -> estimator, baseline, size of the top-k.
BASELINES: dict[str, tuple[Any, Any, int]] = {
    "none": ("sampled", "none", 0),
    "full": ("sampled", "full", 0),
    "topk 5": ("sampled", "topk", 5),
    "topk 20": ("sampled", "topk", 20),
    "topk 100": ("sampled", "topk", 100),
    "optimal": ("sampled", "optimal", 0),
    "topk_reverse 5 (biased)": ("topk", "full", 5),
}
EXACT = "exact"
ROW_TOKENS = 4096
NUM_RESAMPLES = 2000
Found = dict[str, Any]  # of a stage: name -> figures
CHUNK = 65536  # parameters whose inner products are taken at a time
TINY = {"vocab_size": 300, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def objective(name: str) -> Objective:
    estimator, baseline, topk = ("exact", "full", 0) if name == EXACT else BASELINES[name]
    return objective_of(ObjectiveSection(estimator=estimator, baseline=baseline, topk=topk), 1.0)


@dataclass
class Bench:
    """The models of a stage, and prompts to answer."""

    student: Student
    teachers: dict[str, Teacher]
    prompts: list[Prompt]
    stop_ids: tuple[int, ...]
    options: argparse.Namespace

    @property
    def names(self) -> list[str]:
        """Names of what is measured: no top-k beyond the vocabulary."""
        vocab_size = self.student.facts.vocab_size
        return [*(name for name in BASELINES if BASELINES[name][2] <= vocab_size), EXACT]

    def sample(self, number: int) -> list[Rollout]:
        """Draw the batch of that number from the student's own softmax, token by token."""
        generator = torch.Generator().manual_seed(1000 * self.options.seed + number)
        order = torch.randperm(len(self.prompts), generator=generator).tolist()
        chosen = [self.prompts[i] for i in order[: self.options.prompts_per_batch]]
        drawn: list[list[int]] = [[] for _ in chosen]
        going = list(range(len(chosen)))
        for _ in range(self.options.max_tokens):
            logits_GV = self._next_logits([chosen[i] for i in going], [drawn[i] for i in going])
            ids = torch.multinomial(logits_GV.softmax(-1), 1, generator=generator)[:, 0].tolist()
            for i, token in zip(going, ids, strict=True):
                drawn[i].append(token)
            going = [i for i in going if drawn[i][-1] not in self.stop_ids]
            if not going:
                break
        return [
            Rollout(prompt, 0, tuple(ids), None, "length", 0)
            for prompt, ids in zip(chosen, drawn, strict=True)
        ]

    def _next_logits(self, prompts: Sequence[Prompt], drawn: Sequence[Sequence[int]]) -> Tensor:
        """Compute [G, V] fp32 logits after each prompt and what was drawn for it."""
        student, pairs = self.student, zip(prompts, drawn, strict=True)
        whole = [Rollout(prompt, 0, (*ids, 0), None, "length", 0) for prompt, ids in pairs]
        rows = [row.microbatch for row in pack(whole, student.packing(ROW_TOKENS))[0]]
        hidden = forward_hidden(student.model, student.groups, rows, "cpu")
        logits = torch.empty(len(whole), student.facts.vocab_size)
        for row, hidden_TD in zip(rows, hidden, strict=True):
            lengths = torch.tensor([len(whole[i].response_ids) for i in row.rollouts])
            last = lengths.cumsum(0) - 1
            head_VD = student.head_VD[: student.facts.vocab_size]
            logits[list(row.rollouts)] = (hidden_TD[last] @ head_VD.T).float().detach()
        return logits

    def gradient(self, name: str, rollouts: Sequence[Rollout]) -> Tensor:
        """Sum over the batch's tokens, divided by the most there can be; one flat fp32 vector."""
        replicas = pack(rollouts, self.student.packing(ROW_TOKENS))
        hidden = score(self.teachers, replicas, self.student.groups)
        loss = RowLoss(self.student, self.teachers, objective(name))
        loss.forward_backward(replicas, hidden)
        num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        most = self.options.prompts_per_batch * self.options.max_tokens
        flat = torch.cat([buffer.grad_data.flatten() for buffer in self.student.model.buffers])
        return flat.clone() * (num_tokens / most)

    def train(self, num_steps: int) -> None:
        """Make steps on the exact reverse KL, for a later stage where no checkpoint is given."""
        for step in range(num_steps):
            self.gradient(EXACT, self.sample(10**6 + step))
            self.student.optimizer.step()


def make_tiny_models(folder: Path) -> tuple[str, str]:
    """Write a random student and a random teacher of sharper predictions; returns their folders."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    paths = []
    for name, seed, spread in (("student", 0, 0.1), ("teacher", 1, 0.25)):
        if not (folder / name).exists():
            torch.manual_seed(seed)
            sizes = {**TINY, "tie_word_embeddings": True}
            config = Qwen3Config(**dict[str, Any](sizes), initializer_range=spread)
            part = folder / f"{name}.tmp"
            AutoModelForCausalLM.from_config(config).save_pretrained(part)
            part.rename(folder / name)
        paths.append(str(folder / name))
    return paths[0], paths[1]


def read_prompts(options: argparse.Namespace) -> tuple[list[Prompt], tuple[int, ...]]:
    """Return prompts and stop ids: of the given data, or random ids for the tiny pair."""
    if options.prompts is None:
        draw = np.random.default_rng(options.seed)
        ids = [tuple(map(int, draw.integers(0, TINY["vocab_size"], 8))) for _ in range(512)]
        return [Prompt(f"random:{i}", row) for i, row in enumerate(ids)], ()
    from megatron_vopd.data.prompts import PromptTokenizer
    from megatron_vopd.data.records import read_records
    from megatron_vopd.hf.folder import read_model_folder

    section = StudentSection(path=options.student, chat_template=options.chat_template)
    records = list(read_records(options.prompts, "--prompts"))
    rows = PromptTokenizer.of(section.path, section).prompt_ids(records, DataSection().prompt_field)
    prompts = [Prompt(record.name, ids) for record, ids in zip(records, rows, strict=True)]
    return prompts, tuple(read_model_folder(options.student).eos_ids)


def stages(options: argparse.Namespace, groups: Groups) -> Iterator[tuple[str, Bench]]:
    """Yield each stage's name and models; the later one is trained here where none is given."""
    fp32 = ModelOptions(dtype=torch.float32)
    pace = options.learning_rate
    section = OptimizerSection(learning_rate=pace, schedule="constant", distributed=False)
    student = load_student(options.student, groups, fp32, section, 10**6)
    own = independent_groups(Layout(1))
    teacher = Teacher(options.teacher, own, student.facts, groups, fp32)
    bench = Bench(student, {"teacher": teacher}, *read_prompts(options), options)
    yield "start", bench
    if options.later is None:
        bench.train(options.train_steps)
    else:
        bench = replace(bench, student=load_student(options.later, groups, fp32, section, 10**6))
    yield "later", bench


def measure(bench: Bench, folder: Path) -> None:
    """Compute the gradients of every batch that is not there yet, one file for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(bench.options.batches):
        path = folder / f"batch_{number}.pt"
        if path.exists():
            continue
        started = time.perf_counter()
        rollouts = bench.sample(number)
        found = torch.stack([bench.gradient(name, rollouts) for name in bench.names])
        part = path.with_suffix(".tmp")
        torch.save(found, part)
        os.replace(part, path)
        seconds = time.perf_counter() - started
        print(f"{folder.name}: batch {number + 1} of {bench.options.batches}, {seconds:.1f} s")


def gram_matrix(folder: Path, num_batches: int) -> np.ndarray:
    """Compute inner products [names * batches, names * batches] fp64 of a stage's gradients."""
    paths = [folder / f"batch_{n}.pt" for n in range(num_batches)]
    files = [torch.load(path, mmap=True, weights_only=True) for path in paths]
    num_names, size = files[0].shape
    total = np.zeros((num_names * num_batches,) * 2)
    for start in range(0, size, CHUNK):
        part = torch.stack([file[:, start : start + CHUNK].double() for file in files], 1)
        flat = part.reshape(num_names * num_batches, -1)
        total += (flat @ flat.T).numpy()
    return total


def interval(values: np.ndarray) -> list[float]:
    return [float(np.quantile(values, q)) for q in (0.025, 0.975)]


def summarise(gram: np.ndarray, names: Sequence[str], num_batches: int, seed: int) -> Found:
    """Return, per name, variance and noise relative to plain OPD, and bias, with intervals."""
    n = num_batches
    block = gram.reshape(len(names), n, len(names), n)
    exact = names.index(EXACT)
    draws = np.random.default_rng(seed).integers(0, n, (NUM_RESAMPLES, n))
    # Row 0 is the sample itself, the others are resamples: weights of the batches.
    weights = np.stack([np.bincount(row, minlength=n) / n for row in [np.arange(n), *draws]])

    def variance(inner: np.ndarray) -> np.ndarray:
        """Return the covariance's trace under each row of weights, from inner products [n, n]."""
        mean_square = np.einsum("bi,ij,bj->b", weights, inner, weights)
        return (weights @ inner.diagonal() - mean_square) * n / (n - 1)

    def noise(i: int) -> np.ndarray:
        cross = block[i, :, exact] + block[exact, :, i]
        return variance(block[i, :, i] - cross + block[exact, :, exact])

    plain, plain_noise = variance(block[0, :, 0]), noise(0)
    others = (1 - np.eye(n)) / (n - 1)
    scale = float((block[exact, :, exact] * others).sum() / n)  # squared norm, without its noise
    found: Found = {}
    for i, name in enumerate(names):
        ratio, noise_ratio = variance(block[i, :, i]) / plain, noise(i) / plain_noise
        along = ((block[i, :, exact] - block[exact, :, exact]) * others).sum(1) / scale
        biases = weights @ along
        found[name] = {
            "variance_ratio": [float(ratio[0]), *interval(ratio[1:])],
            "noise_ratio": [float(noise_ratio[0]), *interval(noise_ratio[1:])],
            "bias": [float(biases[0]), *interval(biases[1:])],
        }
    found["exact_gradient_norm"] = max(scale, 0.0) ** 0.5
    found["plain_noise_to_signal"] = float(plain_noise[0]) / scale if scale > 0 else None
    return found


def shown(triple: Sequence[float]) -> str:
    return f"{triple[0]:.3f} [{triple[1]:.3f}, {triple[2]:.3f}]"


def write_summary(out: Path, results: dict[str, Any]) -> None:
    settings, title = results["settings"], "# Variance of the sampled gradient at fixed weights"
    lines = [title, "", f"`{results['command']}`", "", results["versions"], ""]
    lines.append(
        f"{settings['batches']} batches of {settings['prompts_per_batch']} responses of up to "
        f"{settings['max_tokens']} tokens at each stage; 95 % intervals in brackets, by bootstrap "
        "over batches. Variance and noise are relative to baseline none; bias is along the exact "
        "gradient, relative to it, and an interval that holds 0 shows none."
    )
    for stage, found in results["stages"].items():
        signal = found["plain_noise_to_signal"]
        ratio = "not measurable" if signal is None else f"{signal:.3g}"
        noise = f"Noise of one batch under `none` over squared exact gradient: {ratio}."
        lines += ["", f"## {stage}", "", noise, ""]
        lines += ["| baseline | variance | noise | bias |", "| --- | --- | --- | --- |"]
        for name in [*BASELINES, EXACT]:
            if name not in found:
                continue
            cells = [shown(found[name][k]) for k in ("variance_ratio", "noise_ratio", "bias")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def plot(out: Path, results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    measured = results["stages"].values()
    names = [name for name in list(BASELINES)[:-1] if all(name in found for found in measured)]
    figure = Figure(figsize=(7, 3.5), layout="tight")
    axes = figure.subplots()
    for shift, (stage, found) in zip((-0.1, 0.1), results["stages"].items(), strict=False):
        values = np.array([found[name]["noise_ratio"] for name in names])
        errors = np.abs(values[:, 1:].T - values[:, 0])
        places = np.arange(len(names)) + shift
        axes.errorbar(places, values[:, 0], errors, fmt="o", capsize=3, label=stage)
    axes.set_xticks(np.arange(len(names)), names)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_ylabel("noise of the gradient / plain OPD")
    axes.legend()
    figure.savefig(out / "variance.png", dpi=130)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = tool.tool_parser(SUMMARY, EXAMPLES)
    add = parser.add_argument
    add("out", metavar="OUT_DIR", nargs="?", type=Path, default=OUT_DIR, help=f"({OUT_DIR})")
    work = "what is kept for a resume: batches, tiny models (default %(default)s)"
    add("--work", metavar="DIR", type=Path, default=Path("runs/study_variance"), help=work)
    add("--student", help="HF folder; without one, a tiny random pair is made")
    add("--later", help="HF folder of the same student later in training; else it is trained here")
    add("--teacher", help="HF folder; with --student")
    add("--prompts", help=".jsonl with --student")
    add("--chat-template", default="none", help="none (plain text) or tokenizer (default none)")
    some = tool.whole_number(1)
    add("--batches", type=tool.whole_number(3), default=64, help="at each stage (default 64)")
    add("--prompts-per-batch", type=some, default=16, help="(default 16)")
    add("--max-tokens", type=some, default=32, help="longest response (default 32)")
    add("--train-steps", type=some, default=60, help="of the later stage, without --later")
    add("--learning-rate", type=tool.positive_number, default=2e-3, help="of these steps")
    add("--seed", type=tool.whole_number(0), default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    if (options.student is None) != (options.teacher is None):
        parser.error("--student: expected together with --teacher")
    if options.student is not None and options.prompts is None:
        parser.error("--prompts: expected with --student")
    return options


def run(options: argparse.Namespace, command: str) -> int:
    """Measure both stages, and write what `command` found."""
    started = time.perf_counter()
    places = ("out", "work")
    settings = {key: str(value) for key, value in vars(options).items() if key not in places}
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    work = options.work / name  # other settings share nothing
    for folder in (options.out, work):
        tool.make_folder(folder)
    if options.student is None:
        options.student, options.teacher = make_tiny_models(work)
    init_single_process()
    torch.manual_seed(options.seed)
    found: dict[str, Found] = {}
    for stage, bench in stages(options, student_groups(Layout(1))):
        gram_path = work / f"{stage}.npy"
        if not gram_path.exists():
            measure(bench, work / stage)
            part = work / f"{stage}.tmp.npy"
            np.save(part, gram_matrix(work / stage, options.batches))
            os.replace(part, gram_path)
        for path in (work / stage).glob("batch_*"):
            path.unlink()
        found[stage] = summarise(np.load(gram_path), bench.names, options.batches, options.seed)
    results = {
        "command": command,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}",
        "settings": settings,
        "seconds_of_this_start": round(time.perf_counter() - started, 1),
        "stages": found,
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_summary(options.out, results)
    plot(options.out, results)
    print((options.out / "summary.md").read_text())
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(words)
    command = shlex.join(["python", "tools/study_variance.py", *words])
    return tool.run_tool(lambda: run(options, command))


if __name__ == "__main__":
    sys.exit(main())
