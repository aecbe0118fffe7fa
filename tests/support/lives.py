"""The whole life of one rank of an example, on small models: groups, models, pushes, steps, save.

Everything is the package's own code but for what needs the other ranks' values: which responses the
leaders sampled (all as long as they may be), what rank 0 writes when a checkpoint is saved (nothing
is), the shape that a pipeline stage is told to receive (all rows are equally long), and the experts
that tokens go to (the same for all tokens, so that what one rank sends is what the other expects).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.router import TopKRouter

from megatron_vopd import vocab_parallel
from megatron_vopd.checkpoint import staging
from megatron_vopd.collectives import all_ranks
from megatron_vopd.config.schema import OptimizerSection
from megatron_vopd.curriculum import EntropyGatedLength
from megatron_vopd.data.stream import PromptStream
from megatron_vopd.megatron.groups import independent_groups, student_groups
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.megatron.student import Student, load_student
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.rollout import push
from megatron_vopd.run import checkpoints
from megatron_vopd.run.checkpoints import RunCheckpoints
from megatron_vopd.run.engines import Pusher
from megatron_vopd.trainer import collector
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.exchange import Graded
from megatron_vopd.trainer.trainer import Trainer
from megatron_vopd.types import Layout, Prompt, Rollout
from tests.support.recorded_world import Event, join
from tests.support.scripted import ScriptedEngine
from tests.support.settings import step_settings
from tests.support.steps import objective
from tests.support.tiny_models import TinyModel

VOCAB = 61
PROMPT, RESPONSE = 3, 6
ROW = PROMPT + RESPONSE - 1  # a multiple of every tp size here


@dataclass(frozen=True)
class Example:
    """Layouts and models of a run, and the settings on which the order of collectives depends."""

    name: str
    student: Layout
    teacher: Layout
    student_model: TinyModel
    teacher_model: TinyModel
    sequence_parallel: bool = False
    recompute: Any = "none"
    staleness: int = 0
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.name}-{self.student.world_size}"


def live(example: Example, folder: Path, rank: int) -> list[Event]:
    """Live as `rank` in this process, which is used up by it; return what was noted.

    Args:
        folder: holds the models of the example, as `TinyModel.save` leaves them.
    """
    torch.set_num_threads(1)
    recorder = join(rank, example.student.world_size)
    options = ModelOptions(
        torch.float32, "cpu", "local", example.sequence_parallel, example.recompute
    )
    groups = student_groups(example.student)
    section = OptimizerSection(schedule="constant")
    student_dir = str(folder / str(example.student_model))
    student = all_ranks(load_student, student_dir, groups, options, section, 100)
    own = independent_groups(example.teacher)
    frozen = ModelOptions(trained=False)
    known = (own, student.facts, groups, frozen)
    teacher = all_ranks(Teacher, str(folder / str(example.teacher_model)), *known)
    with _answers(recorder, example, student):
        trainer, pusher = _trainer(example, student, teacher)
        with mock.patch.object(push, "machine_id", lambda: None):  # as where ranks are on GPUs
            pusher(0)
            trainer.fit(2)
        identity = {"config": {}, "model": {}, "teachers": {}}
        run_dir = Path(tempfile.mkdtemp(dir=folder))
        saved = (run_dir, Path(student_dir), student, trainer, identity, 2, lambda _: None)
        RunCheckpoints(*saved).save()
    assert trainer.policy_version == trainer.step == 2, "both updates are applied"
    return recorder.events


def _trainer(example: Example, student: Student, teacher: Teacher) -> tuple[Trainer, Pusher]:
    groups, dp = student.groups, example.student.dp
    engine = ScriptedEngine(VOCAB) if groups.is_leader else None
    # Between stages all rows have one shape; without stages most replicas have nothing but filling.
    few = dp if example.student.pp > 1 else 2
    sequences = tuple(tuple(range(1, ROW + 2)) for _ in range(few))
    pusher = Pusher(student, engine, push.Probe(sequences, tolerance=1e9), ROW)
    prompts = [Prompt(f"p{i}", (1, 2, i % VOCAB)) for i in range(few + 2 * example.rows * dp)]
    settings = step_settings(
        objective=objective("vopd_full", chunk=4),
        num_prompts=dp * example.rows,
        samples_per_prompt=1,
        max_tokens_per_microbatch=ROW,
        max_staleness=example.staleness,
        spike_factor=1e9,
    )
    stream = PromptStream(prompts[few:], seed=3)
    source = RolloutCollector(groups, engine, stream, settings, VOCAB, "cpu", push=pusher)
    curriculum = EntropyGatedLength((RESPONSE,), interval=2)
    parts = (student, {"teacher": teacher}, source, curriculum, settings)
    return Trainer(*parts, held_out=prompts[:few]), pusher


@contextmanager
def _answers(recorder: Any, example: Example, student: Student) -> Iterator[None]:
    """Give this rank what the other ranks would have told it."""
    shapes, share = P2PCommunicator._communicate_shapes, collector.share_rollouts
    scores = TopKRouter.gating

    def communicate_shapes(self: Any, *args: Any) -> Any:
        config = self.config
        size = config.tensor_model_parallel_size if config.sequence_parallel else 1
        recorder.shape = (ROW // size, 1, config.hidden_size)
        return shapes(self, *args)

    def share_rollouts(own: Any, prompts: Sequence[Prompt], samples: int, device: str) -> Any:
        version = int(own[0].rollout.policy_version) if own else 0
        logprobs = (-1.0,) * RESPONSE
        ids = tuple(range(1, RESPONSE + 1))
        everyone = [
            Graded(i, Rollout(prompt, 0, ids, logprobs, "length", version), 0.0)
            for i, prompt in enumerate(prompts)
        ]
        # A rank without an engine sends nothing; sizes are the leaders' all the same.
        share(everyone[: -(-len(everyone) // example.student.dp)], prompts, samples, device)
        return everyone

    def gating(self: Any, *args: Any) -> torch.Tensor:
        return 0 * scores(self, *args)

    folder = tempfile.mkdtemp()
    results, helped = {"make": folder}, checkpoints.with_all_ranks

    def rank_0(action: Any, *_: Any) -> Any:
        all_ranks(lambda: None)
        return results.get(action.__name__)

    def with_all_ranks(action: Any) -> Any:
        found = helped(action)  # rank 0's; the others would have been told
        return (False, []) if found is None else found

    with ExitStack() as stack:
        for place, name, stand_in in (
            (P2PCommunicator, "_communicate_shapes", communicate_shapes),
            (TopKRouter, "gating", gating),
            (collector, "share_rollouts", share_rollouts),
            (checkpoints, "rank_0", rank_0),
            (checkpoints, "with_all_ranks", with_all_ranks),
            (staging, "rank_0", rank_0),
            (vocab_parallel, "compare", lambda _facts: None),  # of the bounds of all shards
        ):
            stack.enter_context(mock.patch.object(place, name, stand_in))
        yield
