"""A run that is ready to train, and the sink that records its steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vopd.config import Config
from megatron_vopd.megatron.student import Student
from megatron_vopd.rollout.engine import Engine, Progress
from megatron_vopd.run.checkpoints import RunCheckpoints
from megatron_vopd.run.engines import Pusher
from megatron_vopd.run.log import MetricsWriter
from megatron_vopd.trainer.evaluation import Evaluator
from megatron_vopd.trainer.trainer import Trainer


@dataclass
class Run:
    """A run that is ready to train. Close it on every rank.

    Attributes:
        student_dir: HF folder that the student was loaded from.
        engine: the engine of this rank; None: it has none.
        pusher: gives the engines weights; None: the run needs no engine.
        resources: closes what was started.
        evaluator: None: the run is not evaluated.
        writer: takes metrics and log lines, on rank 0 alone.
        extra: JSON values that are saved with each checkpoint and come back with a resume, the
            same on every rank; for what is not the trainer's, such as the best evaluation.
    """

    config: Config
    run_dir: Path
    student_dir: str
    student: Student
    trainer: Trainer
    engine: Engine | None
    pusher: Pusher | None
    resources: ExitStack
    evaluator: Evaluator | None = None
    writer: MetricsWriter | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    checkpoints: RunCheckpoints = field(init=False)

    def say(self, text: str) -> None:
        """Print a log line, on the rank that has the terminal."""
        if self.writer is not None:
            self.writer.say(text)
        else:
            announce(text, self.config.logging.console)

    def progress(self, what: str) -> AbstractContextManager[Progress | None]:
        """Show a progress bar while the context is open, on the rank that has the terminal."""
        return nullcontext() if self.writer is None else self.writer.progress(what)

    def close(self) -> None:
        """End the engine and everything else that was started."""
        self.resources.close()


@dataclass(frozen=True)
class MetricsSink:
    """A sink that records steps with the metrics of the last generation and the last push."""

    writer: MetricsWriter
    engine: Engine | None
    pusher: Pusher | None

    def record(self, step: int, values: dict[str, float]) -> None:
        known: dict[str, float] = {}
        if self.engine is not None and self.engine.generation is not None:
            known |= self.engine.generation.metrics()
        if self.pusher is not None and self.pusher.report is not None:
            known |= self.pusher.report.metrics()
        self.writer.record(step, known | values)

    def say(self, text: str) -> None:
        self.writer.say(text)


def announce(text: str, is_shown: bool) -> None:
    """Print a log line on rank 0 at once, before there is a writer: loading takes minutes.

    Args:
        is_shown: `logging.console`.
    """
    if dist.get_rank() == 0 and is_shown:
        print(text, flush=True)
