"""The training command as a user runs it: torchrun, real engines, what a run leaves behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import needs_vllm
from tests.support.harness import spawn
from tests.support.runs import command, descendants, environment, save_run, started


def slow_with_vllm(test: Any) -> Any:
    """Mark a test that needs vLLM, where others in the file do not."""
    for mark in needs_vllm:
        test = mark(test)
    return test


# Keys of method.md, section 8, that a run of vOPD without evaluation and top-k records.
KEYS = {
    "loss/mean",
    "kl/reverse",
    "kl/forward",
    "entropy/student",
    "entropy/teacher",
    "advantage/mean",
    "advantage/std",
    "reward/mean",
    "reward/std",
    "variance/advantage_over_reward",
    "mismatch/ratio_mean",
    "mismatch/kl",
    "mismatch/clipped_frac",
    "mismatch/baseline_residual",
    "rollout/length_mean",
    "rollout/length_max",
    "rollout/truncated_frac",
    "rollout/eos_frac",
    "curriculum/stage",
    "curriculum/max_response_tokens",
    "optim/grad_norm",
    "optim/lr",
    "optim/skipped",
    "time/rollout_seconds",
    "time/teacher_seconds",
    "time/forward_backward_seconds",
    "time/optimizer_seconds",
    "time/weight_sync_seconds",
    "time/total_seconds",
    "perf/tokens_per_second",
    "perf/peak_memory_bytes",
    "weight_sync/probe_gap",
}


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _listening(pids: set[int]) -> set[tuple[str, str]]:
    """Return (command's last words, hexadecimal address) of every TCP socket listened on.

    127.0.0.1 is 0100007F, every interface is 00000000.
    """
    owners = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                owners[os.readlink(link)] = pid
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            owner = owners.get(f"socket:[{fields[9]}]")
            if fields[3] == "0A" and owner is not None:
                words = Path(f"/proc/{owner}/cmdline").read_bytes().split(b"\0")
                what = "torchrun" if b"torch.distributed.run" in words else "other"
                found.add((what, fields[1].rsplit(":", 1)[0]))
    return found


def _finished(
    root: Path, name: str, num_ranks: int, *overrides: str
) -> tuple[Path, set[int], set[tuple[str, str]]]:
    """Run to the end; return the folder, every process of the run, every address listened on."""
    folder, run_dir = root / f"launch_{name}", root / "runs" / name
    arguments = command(num_ranks, str(root / "config.yaml"), f"run.name={name}", *overrides)
    pids: set[int] = set()
    addresses: set[tuple[str, str]] = set()
    with started(folder, *arguments) as launcher:
        deadline = time.monotonic() + 480
        while launcher.poll() is None and time.monotonic() < deadline:
            try:
                now = descendants(launcher.pid)
                addresses |= _listening(now)
                pids |= now
            except OSError:
                pass  # one ended while it was looked at
            time.sleep(0.5)
        said = (folder / "out").read_text() + (folder / "err").read_text()
        print(said)
        assert launcher.poll() == 0, said
    assert (folder / "err").read_text() == "", "a run that went well has nothing to complain about"
    return run_dir, pids, addresses


def _require_nothing_left(pids: set[int], shared_memory: set[str]) -> None:
    alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not alive, f"{len(alive)} processes are left"
    left = {name for name in os.listdir("/dev/shm") if name not in shared_memory}
    assert not [name for name in left if _is_ours(name, pids)], left


def _is_ours(name: str, pids: set[int]) -> bool:
    return any(str(pid) in name for pid in pids)


def _transformers_logprobs(folder: Path, sequences: list[list[int]]) -> list[list[float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for ids in sequences:
            logprobs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            found.append(logprobs[range(len(ids) - 1), ids[1:]].tolist())
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    save_run(root)
    return root


def _dry_run(root: str) -> Any:
    """On a rank: exit status, what was printed."""
    import torch.distributed as dist

    from megatron_vopd import train

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = train.main([f"{root}/config.yaml", "run.name=dry", "teacher.tp=2", "--dry-run"])
    return status, out.getvalue(), err.getvalue()


def test_dry_run(root: Path) -> None:
    (status, out, err), (other_status, other_out, other_err) = spawn(_dry_run, 2, str(root))
    assert (status, err, other_status, other_out, other_err) == (0, "", 0, "", "")
    lines = out.splitlines()
    print(out)
    assert lines[0] == "data: 24 prompts, 0 left out as too long, 0 held out"
    assert lines[1].startswith("student: loading ") and lines[1].endswith("(tp 1 x pp 1 x dp 2)")
    assert lines[2].startswith("teacher: loading ") and lines[2].endswith("(tp 2 x pp 1 x dp 1)")
    header = lines.index("rank  tp  pp  dp   estimated    measured peak")
    rows = [line.split() for line in lines[header + 1 : header + 3]]
    assert [row[:4] for row in rows] == [["0", "0", "0", "0"], ["1", "0", "0", "1"]]
    # A rank holds Python, torch and the models: more than 0.1 GiB, and never its neighbour's too.
    assert all(0.1 < float(row[at]) < 4 for row in rows for at in (4, 6))
    table = {line[:40].strip(): line[40:].split() for line in lines[3:header]}
    weights = (root / "student" / "model.safetensors").stat().st_size / 2**30
    assert abs(float(table["student weights"][0].rstrip("<")) - weights) < 0.01
    # 8 prompts with responses of the full 16 tokens.
    assert lines[-1].startswith("one step of 128 response tokens: ")
    assert not (root / "runs").exists()


@pytest.mark.timeout(900)
@slow_with_vllm
def test_whole_run(root: Path) -> None:
    """Student tp 2 x dp 2, teacher tp 2 x pp 2 and two engines make three steps and an export."""
    shared_memory = set(os.listdir("/dev/shm"))
    layout = ("parallel.tp=2", "teacher.tp=2", "teacher.pp=2")
    gated = ("curriculum.kind=entropy_gated", "curriculum.ladder=[16, 32]", "curriculum.interval=2")
    held_out = "curriculum.held_out_prompts=4"
    run_dir, pids, addresses = _finished(root, "whole", 4, *layout, *gated, held_out)

    lines = _lines(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line.keys() >= KEYS, sorted(KEYS - line.keys())
        assert all(line[key] is not None for key in KEYS), line
        assert line["optim/skipped"] == 0 and line["kl/reverse"] > 0
        assert line["weight_sync/probe_gap"] <= 1e-4 and line["mismatch/kl"] < 1e-6
        # The baseline centres: within five standard errors, where the reward is far off.
        error = line["advantage/std"] / line["loss/num_tokens"] ** 0.5
        assert abs(line["advantage/mean"]) < 5 * error < abs(line["reward/mean"])
    assert lines[0]["optim/lr"] == 1e-3
    # Measured once the interval is over, and the ladder climbed.
    assert lines[2]["curriculum/entropy"] > 0 and lines[2]["curriculum/max_response_tokens"] == 32

    _require_export(root, run_dir)
    assert (run_dir / "config.yaml").exists() and any((run_dir / "tensorboard").iterdir())
    # Only torchrun's own store listens on every interface (reliability.md).
    print(addresses)
    assert all(address.endswith("0100007F") for what, address in addresses if what == "other")
    _require_nothing_left(pids, shared_memory)


def _require_export(root: Path, run_dir: Path) -> None:
    """Assert that the exported folder is whole, trained, and what the engine sampled from.

    The engine proved at its last push that its log-probs of a probe are those of the trainer's
    weights (weight_sync/probe_gap); here another engine is started on the export.
    """
    from transformers import AutoTokenizer

    from tests.support.engine_logprobs import __file__ as script

    exported = run_dir / "hf" / "step_3"
    assert AutoTokenizer.from_pretrained(exported).chat_template is not None
    prompts = [[(7 * i + 3 * j) % 256 for j in range(8 + i)] for i in range(3)]
    run = subprocess.run(
        [sys.executable, script, str(exported), json.dumps(prompts)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.split("RESULT ")[1])
    sequences = [[*ids, *response["ids"]] for ids, response in zip(prompts, found, strict=True)]
    gap = change = 0.0
    before = _transformers_logprobs(root / "student", sequences)
    after = _transformers_logprobs(exported, sequences)
    for ids, response, old, new in zip(prompts, found, before, after, strict=True):
        sampled = new[len(ids) - 1 :]
        pairs = zip(sampled, response["logprobs"], strict=True)
        gap = max(gap, *(abs(a - b) for a, b in pairs))
        change = max(change, *(abs(a - b) for a, b in zip(old, new, strict=True)))
    print(f"export: engine against transformers {gap:.1e} nats; training changed {change:.3f}")
    assert gap <= 1e-4 and change > 1e-3


@pytest.mark.timeout(1500)
@slow_with_vllm
def test_context_parallelism_changes_nothing(root: Path) -> None:
    """Two steps at tp 2 x cp 2 and a third, resumed at tp 2: as three steps at tp 2 from the start.

    One engine in both runs, which samples the same responses; sequences are filled up to four.
    """
    same = ("parallel.tp=2", "teacher.tp=2", "optimizer.distributed=true", "run.seed=3")
    exact = ("objective.estimator=exact", "optimizer.eps=1e-4")
    run_dir, _, _ = _finished(root, "uncut", 2, *same, *exact)
    uncut = _lines(run_dir)
    cut = ("parallel.cp=2", "parallel.sequence_parallel=true", "train.steps=2")
    _finished(root, "cut", 4, *same, *exact, *cut)
    run_dir, _, _ = _finished(root, "cut", 2, *same, *exact)
    found = _lines(run_dir)
    assert [line["step"] for line in found] == [1, 2, 3]
    keys = ("loss/mean", "kl/reverse", "kl/forward", "entropy/student", "optim/grad_norm")
    for line, expected in zip(found, uncut, strict=True):
        assert line["loss/num_tokens"] == expected["loss/num_tokens"]
        errors = {key: abs(line[key] / expected[key] - 1) for key in keys}
        print(line["step"], errors)
        assert max(errors.values()) <= 1e-5, errors
        # The engine's log-probs are those of the trainer, who computes them over cp too.
        assert line["weight_sync/probe_gap"] <= 1e-4 and line["mismatch/kl"] < 1e-6
        assert line["optim/skipped"] == 0


@pytest.mark.timeout(900)
@slow_with_vllm
@pytest.mark.parametrize("layout", [(), ("teacher.tp=2",)])
def test_teacher_equals_student(root: Path, layout: tuple[str, ...]) -> None:
    """Exactly nothing to learn in the same layout; across layouts the order of sums differs."""
    name = "other_layout" if layout else "same_layout"
    path = root / "student"
    overrides = (f"teacher.path={path}", "optimizer.learning_rate=1e-30", "train.steps=2")
    run_dir, _, _ = _finished(root, name, 2, *overrides, "checkpoint.export_hf=false", *layout)
    for line in _lines(run_dir):
        keys = ("advantage/mean", "advantage/std", "reward/mean", "reward/std", "kl/reverse")
        values = {key: line[key] for key in (*keys, "kl/forward", "optim/grad_norm")}
        print(values)
        if layout:
            assert all(abs(values[key]) <= 1e-5 for key in keys), values
        else:
            assert not any(values.values()), values
