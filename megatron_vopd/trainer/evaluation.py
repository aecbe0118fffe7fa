"""Accuracy on held-out problems: sampled by the run's engines, graded on their leaders.

Each evaluation of a run asks the same problems with the same seeds, so that two of them differ by
the weights alone. Nothing of the training is touched: no random state, no position in the data.
What stays of a response is its grade and length (`sharing.share_outcomes`), 32 bytes on the wire.
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

KEY = "evaluation"  # of a checkpoint's `extra`


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: mean of avg@n over the tasks, after `step` steps."""

    step: int
    value: float


def best_of(extra: Mapping[str, Any]) -> Best | None:
    """The best evaluation that a checkpoint knows of."""
    known = (extra.get(KEY) or {}).get("best")
    return None if known is None else Best(**known)


class Evaluator:
    """Evaluates the weights that the engines have. Calls are collectives of the whole world.

    Attributes:
        metric: what `best` is the largest of, in words.
        best: None before the first evaluation.

    Args:
        problems: task -> its problems, each with a reference answer.
        collector: with a grader, and engines that hold weights.
        sampling: how each problem is sampled; its seed is the same at every evaluation.
        interval: steps between two evaluations.
        k: of pass@k.
        num_steps: of the run; the last one is evaluated whatever the interval.
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
        """Whether `step` steps are a point to evaluate at, and were not evaluated yet."""
        scheduled = step % self._interval == 0 or step == self._num_steps
        return scheduled and step != self._last_step

    def __call__(
        self, step: int, policy_version: int, progress: Progress | None = None
    ) -> dict[str, float]:
        """Metrics `eval/<task>/*` and the time taken, the same on every rank but for the time.

        Raises:
            StopRequested: nothing was noted.
            EngineError: on every rank, from engines that failed twice.
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
        """JSON values."""
        best = None if self.best is None else asdict(self.best)
        return {"of": self._fingerprint(), "step": self._last_step, "best": best}

    def load_state_dict(self, state: Mapping[str, Any], has_best: bool) -> str:
        """Go on from `state`, as far as it can be compared; returns a remark for the reader, or "".

        Args:
            has_best: whether the weights of the best evaluation are still there.
        """
        if state["of"] != self._fingerprint():
            return "evaluation: other problems or settings than before; the best is sought anew"
        self._last_step, best = state["step"], best_of({KEY: state})
        if best is not None and not has_best:
            return f"evaluation: step_{best.step}, the best, is gone; the best is sought anew"
        self.best = best
        return ""

    def _fingerprint(self) -> str:
        """Of all that must be equal for two evaluations to be comparable."""
        asked = [
            (task, [(prompt.ids, prompt.answer) for prompt in problems])
            for task, problems in self._problems.items()
        ]
        return hashlib.blake2b(repr((asked, self._sampling)).encode(), digest_size=16).hexdigest()
