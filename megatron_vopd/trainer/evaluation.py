"""Accuracy on held-out problems: sampled by the run's engines, graded on their leaders.

Each evaluation of a run samples the same problems with the same seeds, so that two of them differ
by the weights alone. The state of the training does not change: neither random states nor positions
in the data. Of a response only grade and length are kept (`exchange.share_outcomes`), 32 bytes on
the wire.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_vopd.data.grading import evaluation_metrics
from megatron_vopd.rollout.engine import Progress, Sampling
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.types import Prompt

KEY = "evaluation"  # where a checkpoint's `extra` holds the evaluator's state


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: mean of avg@n over the tasks, after `step` steps."""

    step: int
    value: float


def best_of(extra: Mapping[str, Any]) -> Best | None:
    """Return the best evaluation that a checkpoint's `extra` records; None: it records none."""
    known = (extra.get(KEY) or {}).get("best")
    return None if known is None else Best(**known)


class Evaluator:
    """An evaluation of the engines' weights on fixed problems, and a record of the best one.

    Calls are collectives of the whole world.

    Attributes:
        metric: description of the value that `best` is the largest of.
        best: the best evaluation so far; None before the first one.

    Args:
        problems: task -> its problems, each with a reference answer.
        collector: collector with a grader, and with engines that hold weights.
        sampling: how each problem is sampled; its seed is the same at every evaluation.
        interval: steps between two evaluations.
        k: the k of pass@k.
        num_steps: steps of the run; the last one is evaluated whatever the interval.
    """

    def __init__(
        self,
        problems: Mapping[str, Sequence[Prompt]],
        collector: RolloutCollector,
        sampling: Sampling,
        interval: int,
        k: int,
        num_steps: int,
    ) -> None:
        self._problems, self._collector, self._sampling = problems, collector, sampling
        self._interval, self._k, self._num_steps = interval, k, num_steps
        self.metric = f"avg@{sampling.samples}, mean of {', '.join(problems)}"
        self.best: Best | None = None
        self._last_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Return True if an evaluation is scheduled after `step` steps and was not made yet."""
        scheduled = step % self._interval == 0 or step == self._num_steps
        return scheduled and step != self._last_step

    def __call__(
        self, step: int, policy_version: int, progress: Progress | None = None
    ) -> dict[str, float]:
        """Evaluate; return metrics `eval/<task>/*`, equal on every rank, and the seconds taken.

        Args:
            step: steps made so far.
            policy_version: version of the weights that the engines hold.
            progress: receives the progress of this rank's engine.

        Raises:
            StopRequested: on every rank; the evaluation counts as not made.
            EngineError: on every rank, when engines failed twice.
        """
        started, samples = time.perf_counter(), self._sampling.samples
        prompts = [prompt for problems in self._problems.values() for prompt in problems]
        outcomes = self._collector.outcomes(prompts, self._sampling, policy_version, progress)
        values: dict[str, float] = {}
        for task, problems in self._problems.items():
            own, outcomes = outcomes[: len(problems) * samples], outcomes[len(problems) * samples :]
            values |= evaluation_metrics(task, own, samples, self._k)
        accuracies = [values[f"eval/{task}/avg@{samples}"] for task in self._problems]
        value = math.fsum(accuracies) / len(accuracies)
        self._last_step = step
        if self.best is None or value > self.best.value:
            self.best = Best(step, value)
        return values | {"time/evaluation_seconds": time.perf_counter() - started}

    def state_dict(self) -> dict[str, Any]:
        """Return the best and the last evaluation, with a fingerprint of the problems, as JSON."""
        best = None if self.best is None else asdict(self.best)
        return {"of": self._fingerprint(), "step": self._last_step, "best": best}

    def load_state_dict(self, state: Mapping[str, Any], has_best: bool) -> str:
        """Restore the part of `state` that later evaluations can be compared with.

        Args:
            state: from `state_dict`, of this run or of the one it resumes from.
            has_best: True if the weights of the best evaluation are still on disk.

        Returns:
            A log line that says what was dropped and why; empty if all was restored.
        """
        again = "the search for the best starts again"
        if state["of"] != self._fingerprint():
            return f"evaluation: other problems or settings than before; {again}"
        self._last_step, best = state["step"], best_of({KEY: state})
        if best is not None and not has_best:
            return f"evaluation: step_{best.step}, the best, is gone; {again}"
        self.best = best
        return ""

    def _fingerprint(self) -> str:
        """Hash the problems and sampling settings that make two evaluations comparable."""
        asked = [
            (task, [(prompt.ids, prompt.answer) for prompt in problems])
            for task, problems in self._problems.items()
        ]
        return hashlib.blake2b(repr((asked, self._sampling)).encode(), digest_size=16).hexdigest()
