"""Whole training steps on a device, and the same steps on the CPU beside them.

    check_trainer.py steps --device cuda --out FOLDER [--small]   two steps of each case
    check_trainer.py compare CPU_FOLDER CUDA_FOLDER               loss, gradients, weights
    check_trainer.py skip --device cuda [--small]                 a step that must not change a bit
    check_trainer.py resume --device cuda                         saved, resumed, next step bitwise

Prints a line for each check; exits with 1 when one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.gpu.training import CASES, FULL, SMALL, Size, enter, make, setup_of
from tests.support import resumable
from tests.support.steps import whole_weights, worst_error

# Of loss, gradient norm and weights; and of each gradient, which in bf16 is a sum of rounded terms.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 5e-2)}
NUM_STEPS = 2


def run_steps(device: str, size: Size, root: Path, out: Path) -> Iterator[str]:
    """Run every case (on the CPU without those that only save memory), and keep what came out."""
    enter(device)
    names = CASES if device == "cuda" else [name for name in CASES if "-" not in name]
    for name in names:
        steps = [size.rollouts(seed) for seed in range(NUM_STEPS)]
        trainer = make(setup_of(name, size, root, device), steps, size.row)
        numbers = []
        for _ in steps:
            metrics = trainer.train_step()
            numbers.append({key: metrics[key] for key in ("loss/mean", "optim/grad_norm")})
        found = {f"gradient {key}": value for key, value in trainer.gradients.items()}
        found |= {f"weight {key}": value for key, value in whole_weights(trainer.student).items()}
        out.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.cpu().contiguous() for key, value in found.items()}
        save_file(tensors, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps(numbers))
        print(f"{name}: {numbers}")
        if not all(torch.isfinite(value).all() for value in tensors.values()):
            yield f"{name}: a gradient or a weight is not finite"


def compare(first: Path, second: Path) -> Iterator[str]:
    """Compare each case of the second folder with the same case of the first, or with its base."""
    for path in sorted(second.glob("*.json")):
        name = path.stem
        expected = first / f"{name}.json"
        # Recomputing and offloading change nothing: their twin is the plain case.
        expected = expected if expected.exists() else first / f"{name.partition('-')[0]}.json"
        yield from _compare_case(name, expected, path)


def _compare_case(name: str, expected: Path, found: Path) -> Iterator[str]:
    bar, gradient_bar = TOLERANCES[name.partition("-")[0]]
    worst = 0.0
    numbers = [json.loads(path.read_text()) for path in (expected, found)]
    for before, after in zip(*numbers, strict=True):
        for key, value in before.items():
            # The loss is a mean of advantages of about 1, which nearly cancel.
            worst = max(worst, abs(after[key] - value) / max(abs(value), 0.1))
    tensors = [load_file(path.with_suffix(".safetensors")) for path in (expected, found)]
    errors = {}
    for kind in ("gradient", "weight"):
        of_kind = [{k: v.float() for k, v in t.items() if k.startswith(kind)} for t in tensors]
        errors[kind] = worst_error(of_kind[1], of_kind[0])
    print(f"{name}: numbers {worst:.1e}, gradients {errors['gradient']:.1e}, "
          f"weights {errors['weight']:.1e} (bars {bar:.0e}, {gradient_bar:.0e})")  # fmt: skip
    if not (worst <= bar and errors["weight"] <= bar and errors["gradient"] <= gradient_bar):
        yield f"{name}: {found} differs from {expected}"


def skipped(device: str, size: Size, root: Path) -> Iterator[str]:
    """Make one step's loss infinite: no weight may change, and freed memory must go back."""
    enter(device)
    trainer = make(setup_of("bf16", size, root, device), [size.rollouts(0)], size.row)
    head = trainer.teachers["teacher"].head_VD
    assert head is not None
    kept = head[0].clone()
    head[0] = float("nan")
    before = whole_weights(trainer.student)
    metrics = trainer.train_step()
    head[0] = kept
    if metrics["optim/skipped"] != 1:
        yield f"the step was not skipped: {metrics['optim/grad_norm']}"
    if any(not torch.equal(before[k], v) for k, v in whole_weights(trainer.student).items()):
        yield "a skipped step changed a weight"
    del before
    if device == "cuda":
        peak = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        held, used = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        print(f"after the skip: reserved {peak / 2**30:.2f} GiB, given back to {held / 2**30:.2f}, "
              f"allocated {used / 2**30:.2f}")  # fmt: skip
        if held > 1.25 * used + 2**28:
            yield "empty_cache does not give back what an engine would need"
    if trainer.train_step()["optim/skipped"] != 0:
        yield "the step after the skip was skipped too"


def resumed(device: str, root: Path) -> Iterator[str]:
    """Save after three steps, load in fresh objects, and compare the fourth bit by bit."""
    enter(device)
    tiny = SMALL_RESUMABLE.save(root, 0)
    for dtype in (torch.float32, torch.bfloat16):
        setup = replace(setup_of("fp32", SMALL, root, device), dtype=dtype)
        setup = replace(setup, student_dir=str(tiny), teacher_dirs={"teacher": str(tiny)})
        run_dir = root / f"run_{dtype}"
        first = resumable.make(setup, run_dir)
        for _ in range(3):
            first.trainer.train_step()
        folder = first.checkpoints.save({})
        first.trainer.train_step()
        expected = resumable.raw_state(first)
        second = resumable.make(setup, run_dir)
        second.checkpoints.load(folder)
        resumable.resume_engine(second)
        second.trainer.train_step()
        found = resumable.raw_state(second)
        differing = [key for key in expected if expected[key] != found.get(key)]
        print(f"{dtype}: {len(expected)} states, {len(differing)} differ after the resume")
        if differing or expected.keys() != found.keys():
            yield f"{dtype}: {differing[:5]} differ after the resume"


SMALL_RESUMABLE = replace(SMALL, vocab_size=resumable.VOCAB).model()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("steps", "skip", "resume"):
        command = commands.add_parser(name)
        command.add_argument("--device", choices=("cpu", "cuda"), required=True)
        command.add_argument("--small", action="store_true", help="models for any machine")
        command.add_argument("--models", type=Path, help="folder of the models; made where absent")
        command.add_argument("--out", type=Path, help="folder of the results")
    command = commands.add_parser("compare")
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        failures = list(compare(options.first, options.second))
    else:
        size = SMALL if options.small else FULL
        with tempfile.TemporaryDirectory() as folder:
            root = options.models or Path(folder)
            known = (options.device, size, root)
            if options.command == "steps":
                failures = list(run_steps(*known, options.out))
            elif options.command == "skip":
                failures = list(skipped(*known))
            else:
                failures = list(resumed(options.device, Path(folder)))
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
