"""A dry run: two steps on random tokens, to see whether everything fits before a long run.

Models, optimizer, teachers and data are those of the run, at its longest prompts' rows and at the
last rung of the length ladder, so memory is what the run will need; the second step is the first
in which the optimizer's moments are there all the time. No engine is started: on a GPU that one
shares, `rollout.memory_fraction` of the memory comes on top.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.collectives import from_all_ranks
from megatron_vopd.config import Config
from megatron_vopd.config.schema import CurriculumSection
from megatron_vopd.preflight.memory import Kind, Machine, RankMemory, estimate
from megatron_vopd.preflight.table import memory_lines
from megatron_vopd.rollout.engine import (
    GenerationReport,
    Progress,
    PushReport,
    Sampling,
    generation_report,
    response_seed,
)
from megatron_vopd.run.build import Parts, build, sound_models
from megatron_vopd.trainer.trainer import Trainer
from megatron_vopd.types import Prompt, Rollout

NUM_STEPS = 2
_GIB = 2**30


def at_full_length(config: Config) -> Config:
    """Return the configuration with the longest responses from the first step on."""
    longest = CurriculumSection(kind="fixed", ladder=(config.max_response_tokens,))
    return config.model_copy(update={"curriculum": longest})


class RandomEngine:
    """An `Engine` that answers every prompt with uniformly random ids of the full length."""

    num_replicas = 1

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.policy_version: int | None = 0
        self.generation: GenerationReport | None = None
        self.shared_dtype: torch.dtype | None = None

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """Return ids that end no response, with the log-prob of the uniform distribution."""
        ids = [i for i in range(self._vocab_size) if i not in sampling.stop_ids]
        logprobs = (-math.log(len(ids)),) * sampling.max_tokens
        version = self.policy_version or 0
        rollouts = []
        for prompt in prompts:
            for sample in range(sampling.samples):
                draw = random.Random(response_seed(sampling.seed, prompt.prompt_id, sample))
                response = tuple(draw.choices(ids, k=sampling.max_tokens))
                rollouts.append(Rollout(prompt, sample, response, logprobs, "length", version))
        self.generation = generation_report(rollouts, 0.0)
        return rollouts

    def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PushReport:
        """Accept every push, and read it to the end."""
        num_bytes = sum(tensor.nbytes for _, tensor in tensors)
        self.policy_version = policy_version
        return PushReport(policy_version, num_bytes, 0.0)

    def probe_logprobs(
        self, sequences: Sequence[Sequence[int]], replica: int = 0
    ) -> list[list[float]]:
        """Raise NotImplementedError: without weights, no log-prob would be true."""
        raise NotImplementedError("a random engine has no weights")

    def refuse_weights(self, reason: str) -> None:
        self.policy_version = None

    def sleep(self) -> None:
        """Ignore the request: this engine holds no memory."""

    def wake(self) -> None:
        """Ignore the request: this engine never sleeps."""

    def close(self) -> None:
        """Ignore the request: nothing was started."""


def rehearse(config: Config, parts: Parts) -> list[str]:
    """Make the steps; return a table, line by line, of the memory estimated and measured.

    A collective of the whole world. On a CPU the measured peak is that of the process since its
    start; what it holds beside tensors is measured and counted as a part.
    """
    trainer, engine = parts.trainer, parts.engine
    assert engine is not None, "a dry run without its random engine"
    values: dict[str, float] = {}
    for _ in range(NUM_STEPS):
        engine.policy_version = trainer.policy_version
        values = trainer.train_step()
    on_cpu = trainer.student.options.device == "cpu"
    own = values["perf/peak_memory_bytes"], bytes_beside_tensors() if on_cpu else 0
    measured = from_all_ranks(lambda: own)
    ranks = [
        replace(memory, held={"beside tensors, measured": beside, **memory.held})
        for memory, (_, beside) in zip(estimated(config, trainer), measured, strict=True)
    ]
    lines = [*memory_lines(ranks), "", "rank  tp  pp  dp   estimated    measured peak"]
    for memory, (peak, _) in zip(ranks, measured, strict=True):
        at = memory.place
        sizes = f"{memory.peak / _GIB:7.3f} GiB  {peak / _GIB:11.3f} GiB"
        lines.append(f"{memory.rank:4}  {at.tp:2}  {at.pp:2}  {at.dp:2}  {sizes}")
    seconds, tokens = values["time/total_seconds"], values["loss/num_tokens"]
    return [*lines, f"one step of {tokens:.0f} response tokens: {seconds:.1f} s; nothing was saved"]


def estimated(config: Config, trainer: Trainer) -> list[RankMemory]:
    """Estimate the memory of each rank from the run's models, layouts and device."""
    student, teachers = trainer.student, trainer.teachers
    kind: Kind = "cpu"
    memory = 0.0
    if student.options.device != "cpu":
        kind = student.options.layer_spec
        memory = float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    facts = {"student": student.facts} | {key: one.facts for key, one in teachers.items()}
    layouts = {"student": student.groups.layout}
    layouts |= {key: one.groups.layout for key, one in teachers.items()}
    return estimate(config, facts, layouts, Machine(kind, memory))


def bytes_beside_tensors() -> int:
    """Return this process's resident bytes outside live tensors: Python, libraries, buffers."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return resident - sum(storages.values())


def dry_run(config: Config, device: str) -> None:
    """Build everything, make the two steps, print what they needed. Every rank calls it."""
    config = at_full_length(config)
    models = sound_models(config, device)
    with ExitStack() as stack:
        parts = build(config, models, device, lambda _, ids: (RandomEngine(ids), None), stack)
        lines = rehearse(config, parts)
    if dist.get_rank() == 0:
        print("\n".join(lines))
