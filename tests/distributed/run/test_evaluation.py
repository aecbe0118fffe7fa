"""Evaluation within a run: its values, and that it leaves no trace in what is trained.

The scripted engine answers a problem the same way whatever the weights; grades here follow the
policy version, so that accuracy rises and falls over a run as the tests need it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vopd.collectives import StopFlag
from megatron_vopd.config import Config
from megatron_vopd.files.metrics_file import read_metrics
from megatron_vopd.megatron.groups import init_world
from megatron_vopd.rollout.engine import PushReport, Sampling, step_seed
from megatron_vopd.rollout.push import make_probe
from megatron_vopd.run.begin import resume_evaluation
from megatron_vopd.run.engines import Pusher
from megatron_vopd.run.folder import saved_steps
from megatron_vopd.run.log import MetricsWriter
from megatron_vopd.run.loop import train
from megatron_vopd.run.run import MetricsSink, Run
from megatron_vopd.run.settings import evaluator_of
from megatron_vopd.run.start import choose_resume
from megatron_vopd.trainer import evaluation
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.types import Layout, Prompt, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case
from tests.support.resumable import VOCAB, Made, make, raw_state, resume_engine
from tests.support.scripted import ScriptedEngine
from tests.support.steps import Setup
from tests.support.tiny_models import TinyModel

STUDENT = TinyModel("qwen3", True, VOCAB, overrides=(("num_hidden_layers", 2),))
PROBLEMS = {
    "sums": [Prompt(f"sums.jsonl:{i}", (i, 7), str(i)) for i in range(5)],
    "words": [Prompt(f"words.jsonl:{i}", (i, i, 9), "w") for i in range(2)],
}
SAMPLING = Sampling(5, samples=2, temperature=0.5, seed=step_seed(0, "evaluation"), stop_ids=(3,))
# Policy version -> grade; two, four and six steps are evaluated, and the last.
ACCURACY = {0: 0.25, 2: 0.875, 4: 0.5, 6: 0.75, 7: 0.875, 8: 0.625}


class Terminated(ScriptedEngine):
    """An engine that is sent a SIGTERM while it samples for the evaluation after step 4."""

    def generate(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Rollout]:
        if self.policy_version == 4 and sampling == SAMPLING:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return super().generate(prompts, sampling, progress)


class Broken(ScriptedEngine):
    """An engine that dies once in an evaluation, and has no weights until the next push."""

    def generate(self, prompts: Any, sampling: Sampling, progress: Any = None) -> list[Rollout]:
        if sampling == SAMPLING and self.policy_version == 2 and not self._faults:
            self._faults = {self.num_generations: "exception"}
        return super().generate(prompts, sampling, progress)


class Pushes(Pusher):
    """A pusher of versions without weights, which remembers them."""

    def __init__(self, engine: ScriptedEngine) -> None:
        nothing: Any = None
        super().__init__(nothing, engine, make_probe(VOCAB), longest=VOCAB)
        self.engine, self.versions = engine, []

    def __call__(self, policy_version: int) -> PushReport:
        self.versions.append(policy_version)
        self.report = self.engine.update_weights([], policy_version)
        return self.report


@dataclass
class Started:
    run: Run
    pushes: Pushes
    made: Made


def _start(
    setup: Setup,
    run_dir: Path,
    engine: ScriptedEngine | None = None,
    evaluates: bool = True,
    staleness: int = 0,
    stop: StopFlag | None = None,
    steps: int = 7,
    problems: Mapping[str, list[Prompt]] = PROBLEMS,
) -> Started:
    """Start as `run.begin` does: a new run, or the one in `run_dir` resumed."""
    engine = engine or ScriptedEngine(VOCAB)
    pushes = Pushes(engine)
    made = make(setup, run_dir, staleness=staleness, stop=stop, engine=engine)
    trainer, collector = made.trainer, made.trainer.collector
    collector._push = pushes
    section = {"interval": 2, "samples": 2, "k": 1, "temperature": 0.5, "max_tokens": 5}
    config = Config.model_validate(
        {
            "student": {"path": setup.student_dir},
            "teacher": {"path": setup.student_dir},
            "train": {"steps": steps},
            "checkpoint": {"interval": 3, "export_hf": False},
            "evaluation": section,
        }
    )
    run = Run(
        config,
        run_dir,
        setup.student_dir,
        made.student,
        trainer,
        collector._engine,
        pushes,
        ExitStack(),
    )
    run.checkpoints = made.checkpoints
    if evaluates:
        own = RolloutCollector(
            made.groups,
            collector._engine,
            None,
            replace(trainer.settings, max_staleness=0),
            VOCAB,
            "cpu",
            grader=lambda rollout: ACCURACY[rollout.policy_version],
            push=pushes,
            stop=stop,
        )
        run.evaluator = evaluator_of(config.evaluation, problems, own, (3,), 0, steps)
    resume = choose_resume(run_dir, "auto")
    if resume.folder is not None:
        run.extra = run.checkpoints.load(resume.folder)
        resume_evaluation(run)
    if dist.get_rank() == 0:
        last_step = -1 if resume.folder is None else resume.step
        run.writer = MetricsWriter(run_dir, False, False, False, steps, last_step)
        trainer.sink = MetricsSink(run.writer, collector._engine, pushes)
    resume_engine(made)
    return Started(run, pushes, made)


def _train(started: Started) -> str:
    """Train to the end and close the metrics, as the end of a process does; return the reason."""
    reason = train(started.run)
    if started.run.writer is not None:
        started.run.writer.close()
    return reason


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return metrics but for times, memory and the pushes' reports."""
    clocks = ("time/", "perf/", "rollout/tokens_per", "weight_sync/")
    return [
        {key: value for key, value in line.items() if not key.startswith(clocks)}
        for line in read_metrics(run_dir / "metrics.jsonl").lines
    ]


def _evaluated(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    return {
        line["step"]: {key: value for key, value in line.items() if key.startswith("eval/")}
        for line in lines
        if any(key.startswith("eval/") for key in line)
    }


def _no_trace(setup: Setup, root: Path) -> Any:
    """Run with and without evaluation, in step and one step off: equal but for `eval/`."""
    found = []
    for staleness in (0, 1):
        runs = {}
        for evaluates in (True, False):
            run_dir = root / f"{evaluates}-{staleness}"
            one = _start(setup, run_dir, evaluates=evaluates, staleness=staleness)
            assert _train(one) == "done"
            state = raw_state(one.made)
            lines = _lines(run_dir) if dist.get_rank() == 0 else []
            runs[evaluates] = (state, lines, one.pushes.versions)
        found.append(runs)
    return found


def _interrupted(setup: Setup, root: Path) -> Any:
    """Stop in the evaluation after step 4, save and resume."""
    stop = StopFlag()
    stop.listen()
    engine = Terminated(VOCAB) if dist.get_rank() == 0 else None
    started = time.perf_counter()
    one = _start(setup, root / "stopped", engine, stop=stop)
    assert _train(one) == "preempted"
    seconds = time.perf_counter() - started
    saved = saved_steps(root / "stopped")
    two = _start(setup, root / "stopped")
    begun = two.run.trainer.step
    assert _train(two) == "done"
    lines = _lines(root / "stopped") if dist.get_rank() == 0 else []
    return raw_state(two.made), lines, saved, begun, seconds


def _failing(setup: Setup, root: Path) -> Any:
    engine = Broken(VOCAB) if dist.get_rank() == 1 else None
    one = _start(setup, root / "failing", engine)
    assert _train(one) == "done"
    lines = _lines(root / "failing") if dist.get_rank() == 0 else []
    return raw_state(one.made), lines, one.pushes.versions


def _best(setup: Setup, root: Path) -> Any:
    """Return what stays of a run to step 7, of its resume to 8, and without its best."""
    run_dir, found = root / "best", []

    def see() -> None:
        found.append((saved_steps(run_dir), json.loads((run_dir / "best.json").read_text())))
        dist.barrier()

    one = _start(setup, run_dir, steps=7)
    _train(one)
    see()
    two = _start(setup, run_dir, steps=7)
    _train(two)
    evaluated = two.run.evaluator is not None and two.run.evaluator._last_step
    see()
    if dist.get_rank() == 0:
        shutil.rmtree(run_dir / "checkpoints" / "step_2")
    dist.barrier()
    three = _start(setup, run_dir, steps=8)
    _train(three)
    see()
    other = {"sums": PROBLEMS["sums"]}
    four = _start(setup, run_dir, steps=8, problems=other)
    _train(four)
    see()
    five = _start(setup, run_dir, steps=8, evaluates=False)
    return found, evaluated, five.run.extra[evaluation.KEY]["best"]


def _everything(setup: Setup, root: Path) -> dict[str, Any]:
    init_world("cpu")
    own = replace(setup, case=Case("", Layout(2)), distributed=True)
    parts = (_no_trace, _interrupted, _failing, _best)
    return {part.__name__: part(own, root) for part in parts}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    student, teacher = STUDENT.save(root / "student", 0), STUDENT.save(root / "teacher", 1)
    setup = Setup(Case("", Layout(2)), str(student), {"teacher": str(teacher)}, Layout(2))
    return spawn(_everything, 2, setup, tmp_path_factory.mktemp("runs"))


def _expected(step: int) -> dict[str, float]:
    """Compute the values with one engine, by hand; pass@1 counts grades above 1/2."""
    engine, values = ScriptedEngine(VOCAB), {}
    engine.update_weights([], step)
    for task, problems in PROBLEMS.items():
        rollouts = engine.generate(problems, SAMPLING)
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        cut = [rollout.finish_reason == "length" for rollout in rollouts]
        values |= {
            f"eval/{task}/avg@2": ACCURACY[step],
            f"eval/{task}/pass@1": float(ACCURACY[step] > 0.5),
            f"eval/{task}/length": sum(lengths) / len(lengths),
            f"eval/{task}/truncated_frac": sum(cut) / len(cut),
        }
    return values


def test_values_and_when(seen: list[dict[str, Any]]) -> None:
    for runs in seen[0]["_no_trace"]:
        _, lines, _ = runs[True]
        assert [line["step"] for line in lines] == list(range(8))
        assert _evaluated(lines) == {step: _expected(step) for step in (0, 2, 4, 6, 7)}
        assert set(lines[0]) == {"step", *_expected(0)}, "no step was made"
    lengths = [_expected(0)[f"eval/{task}/length"] for task in PROBLEMS]
    assert len(set(lengths)) == 2 and 1 < min(lengths) < 5, "responses of different lengths"


def test_nothing_of_the_training_changes(seen: list[dict[str, Any]]) -> None:
    """Parameters, moments, random states, data order and responses are equal to the bit."""
    for rank, found in enumerate(seen):
        for runs in found["_no_trace"]:
            (state, lines, pushes), (plain, plain_lines, plain_pushes) = runs[True], runs[False]
            assert len(state) > 20 and state == plain
            assert pushes == plain_pushes == list(range(8)), "no push more than without"
            if rank == 0:
                trained = [
                    {key: value for key, value in line.items() if not key.startswith("eval/")}
                    for line in lines[1:]
                ]
                assert trained == plain_lines


def test_a_stop_in_an_evaluation(seen: list[dict[str, Any]]) -> None:
    """T1: the step is saved at once; the evaluation is made again, and all is as undisturbed."""
    for rank, found in enumerate(seen):
        state, lines, saved, begun, seconds = found["_interrupted"]
        undisturbed, expected, _ = found["_no_trace"][0][True]
        assert saved[0] == begun == 4 and seconds < 30
        assert state == undisturbed
        assert lines == (expected if rank == 0 else [])


def test_an_engine_that_fails_in_an_evaluation(seen: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(seen):
        state, lines, pushes = found["_failing"]
        undisturbed, expected, _ = found["_no_trace"][0][True]
        assert pushes == [0, 1, 2, 2, 3, 4, 5, 6, 7]
        assert state == undisturbed
        assert lines == (expected if rank == 0 else [])


def test_the_best_checkpoint_stays(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        (first, second, third, fourth), evaluated, left = found["_best"]
        metric = "avg@2, mean of sums, words"
        best = {"metric": metric, "value": 0.875, "step": 2, "checkpoint": "checkpoints/step_2"}
        # Step 7 is as good, and later; 3 and 6 are saved by the interval, 2 as the best then.
        assert first == ([7, 6, 2], best | {"hf": None})
        # Nothing is left to do, and nothing is evaluated twice.
        assert second == first and evaluated == 7
        # Without its weights the best is none: a later, lower value is.
        last = {"value": 0.625, "step": 8, "checkpoint": "checkpoints/step_8"}
        assert third == ([8, 7], best | last | {"hf": None})
        # Other problems: evaluated again, where the run ended.
        assert fourth[1] == third[1] | {"metric": "avg@2, mean of sums"}
        assert left == {"step": 8, "value": 0.625}
