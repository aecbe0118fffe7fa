"""The training step: sample, score, distil, update, push. `train_step` reads like the paper.

Its parts are built elsewhere (`run/build.py`). Where the mathematics is: the advantage
A_t = r_t - V(c_t) (arXiv 2605.07865, Eq. 10) in `objectives.advantages`, and all other objectives
beside it; the loss -A log p(a), summed over tokens and divided by their number over the whole
step, in `loss.RowLoss`.

Every rank runs the same statements on the same plan, so ranks wait for one another only inside the
collectives of `collectives`, `exchange`, `metrics`, `megatron.teacher`, `vocab_parallel`,
megatron-core and the weight push.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_vopd.collectives import StopFlag, first_reason
from megatron_vopd.curriculum import Curriculum
from megatron_vopd.errors import StopRequested
from megatron_vopd.megatron.microbatch import Row
from megatron_vopd.megatron.student import Student, clip_gradients, learning_rate
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.objectives import group_advantages
from megatron_vopd.rollout.engine import Sampling, step_seed
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.exchange import Graded
from megatron_vopd.trainer.guard import StepGuard
from megatron_vopd.trainer.loss import RowLoss
from megatron_vopd.trainer.metrics import reduce_sums, rollout_metrics
from megatron_vopd.trainer.packing import pack
from megatron_vopd.trainer.settings import StepSettings
from megatron_vopd.trainer.student_logprobs import mean_entropy
from megatron_vopd.trainer.teacher_cache import Caches, cached_score
from megatron_vopd.types import Prompt, Rollout

PHASES = ("rollout", "teacher", "forward_backward", "optimizer", "weight_sync", "curriculum")


class MetricsSink(Protocol):
    """The recorder of a step's metrics and log lines, on one rank."""

    def record(self, step: int, values: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Update:
    """The outcome of a step's gradient, the same on every rank.

    Attributes:
        grad_norm: norm before clipping.
        skip_reason: why the gradient was not applied; empty: it was.
    """

    grad_norm: float
    learning_rate: float
    skip_reason: str = ""

    @property
    def applied(self) -> bool:
        return not self.skip_reason


class Phases:
    """Seconds spent in the phases of one step, on this rank.

    Attributes:
        can_give_up: True until the weights change: the step can be abandoned without a trace.
        seconds: phase -> seconds so far.

    Args:
        before: called when a phase begins, as long as the step can be given up.
    """

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self._before = before
        self.can_give_up = True
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block as (a part of) phase `name`."""
        if self.can_give_up:
            self._before()
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """Return `time/*_seconds` of each phase, of the rest (`other`) and of all (`total`)."""
        total = time.perf_counter() - self._started
        named = {f"time/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        other = total - sum(self.seconds.values())
        return named | {"time/other_seconds": other, "time/total_seconds": total}


class Trainer:
    """One run's student, teachers, data and engine, and the step that joins them.

    Attributes:
        step: steps made, skipped ones included.
        policy_version: updates applied; the engines' weights carry it.

    Args:
        teachers: teachers by key of the configuration; empty for objectives without a teacher.
        collector: source of the responses.
        curriculum: length limit of the responses.
        settings: all other numbers of a step.
        sink: recorder of the metrics; None on ranks that record none.
        held_out: prompts on whose responses the entropy is measured that gates the curriculum.
        stop: a request to stop, checked before each phase until the weights change; None: never.
        caches: kept teacher states of given responses, by the teacher's key; None: none are kept.
    """

    def __init__(
        self,
        student: Student,
        teachers: Mapping[str, Teacher],
        collector: RolloutCollector,
        curriculum: Curriculum,
        settings: StepSettings,
        sink: MetricsSink | None = None,
        held_out: Sequence[Prompt] = (),
        stop: StopFlag | None = None,
        caches: Caches | None = None,
    ) -> None:
        self.student, self.teachers, self.collector = student, teachers, collector
        self.curriculum, self.settings = curriculum, settings
        self.sink, self.held_out, self.stop = sink, held_out, stop
        self.caches = caches or {}
        self.loss = RowLoss(student, teachers, settings.objective)
        self.guard = StepGuard(settings.spike_factor, settings.max_consecutive_skips)
        self.packing = student.packing(settings.max_tokens_per_microbatch)
        self.step = self.policy_version = 0

    def train_step(self) -> dict[str, float]:
        """Run one step on every rank of the world.

        Returns:
            Its metrics, the same on every rank except `time/*` and `perf/*`.

        Raises:
            EngineError: an engine failed or answered wrongly, and again after a restart.
            SkipLimitError: too many steps in a row were skipped.
            StopRequested: no weight has changed; the positions of data and curriculum may have.
        """
        phase = Phases(self._raise_if_stopping)
        with phase("curriculum"):
            limit = self._response_limit()
        with phase("rollout"):
            graded = self.collector.take(self.step, limit, self.policy_version)
        rollouts = [one.rollout for one in graded]
        replicas = pack(rollouts, self.packing, self._task_advantages(graded))
        with phase("teacher"):
            teacher_hidden = self._scored(rollouts, replicas)
        with phase("forward_backward"):
            self.loss.forward_backward(replicas, teacher_hidden)
        with phase("optimizer"):
            update = self._update(rollouts)
        if update.applied:
            self._publish(phase)
        self.step += 1
        return self._report(rollouts, update, phase)

    def fit(self, num_steps: int, after_step: Callable[[int], bool] | None = None) -> None:
        """Run steps until `num_steps` have been made in all, or a stop is requested.

        A step that a stop interrupts is undone: the trainer is as the last whole step left it.

        Args:
            after_step: called on every rank with the number of steps made (checkpoints,
                evaluation, a request to stop); False ends the run.
        """
        proceed = True
        while proceed and self.step < num_steps:
            before = self.state_dict()
            try:
                self.train_step()
            except StopRequested:
                self.load_state_dict(before)
                return
            proceed = after_step is None or after_step(self.step)
        self.collector.settle(self.policy_version)

    def _raise_if_stopping(self) -> None:
        if self.stop is not None and self.stop.anywhere():
            raise StopRequested("asked to stop")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and moments, as JSON values.

        The same on every rank. A collective: it waits for a generation in flight.
        """
        return {
            "step": self.step,
            "policy_version": self.policy_version,
            "guard": self.guard.state_dict(),
            "scheduler": self.student.scheduler.num_steps,
            "curriculum": self.curriculum.state_dict(),
            "collector": self.collector.state_dict(self.policy_version),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values of `state_dict`; weights and moments are left as they are."""
        self.step, self.policy_version = state["step"], state["policy_version"]
        self.guard.load_state_dict(state["guard"])
        scheduler = self.student.scheduler
        scheduler.step(state["scheduler"] - scheduler.num_steps)
        self.curriculum.load_state_dict(state["curriculum"])
        self.collector.load_state_dict(state["collector"])

    def _response_limit(self) -> int:
        """Update the curriculum if it is due; return the longest response of this step, tokens."""
        curriculum = self.curriculum
        if curriculum.due(self.step):
            entropy = self._held_out_entropy() if curriculum.needs_entropy else None
            curriculum.update(self.step, entropy)
            if self.sink is not None and curriculum.remark:
                self.sink.say(curriculum.remark)
        return curriculum.max_response_tokens

    def _held_out_entropy(self) -> float:
        """Sample responses to the held-out prompts; return their mean entropy, nats per token."""
        settings = self.settings
        sampling = Sampling(
            max_tokens=self.curriculum.max_response_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=step_seed(settings.seed, self.step),
            stop_ids=settings.stop_ids,
        )
        rollouts = self.collector.sample(self.held_out, sampling, self.policy_version)
        longest = settings.max_tokens_per_microbatch
        return mean_entropy(self.student, rollouts, longest, settings.temperature)

    def _scored(
        self, rollouts: Sequence[Rollout], replicas: Sequence[Sequence[Row]]
    ) -> list[torch.Tensor]:
        """Return the teachers' hidden states of this rank's rows, read from disk or computed."""
        groups, device = self.student.groups, self.student.options.device
        return cached_score(self.teachers, self.caches, rollouts, replicas, groups, device)

    def _task_advantages(self, graded: Sequence[Graded]) -> list[float] | None:
        """Return the weighted, group-normalised grade of each response, 0 where it has no grade.

        None if the weight is 0.
        """
        weight = self.settings.task_reward_weight
        if weight == 0:
            return None
        known = [one for one in graded if not math.isnan(one.grade)]
        values = group_advantages([one.rollout for one in known], [one.grade for one in known])
        found = {one.order: weight * value for one, value in zip(known, values, strict=True)}
        return [found.get(one.order, 0.0) for one in graded]

    def _update(self, rollouts: Sequence[Rollout]) -> Update:
        """Apply the gradient on all ranks, or on none of them (R7)."""
        optimizer = self.student.optimizer
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        loss = self.loss.loss_sum if self.student.groups.is_last_stage else 0.0
        skip_reason = self.guard.skip_reason(loss, grad_norm)
        if not any(rollout.response_ids for rollout in rollouts):
            skip_reason = "no response has a token"
        skip_reason = first_reason(skip_reason, self.student.options.device)
        update = Update(grad_norm, learning_rate(optimizer), skip_reason)
        if skip_reason:
            self._save_for_replay(rollouts, update)
            self.guard.skip(self.step, skip_reason)
        else:
            clip_gradients(optimizer, self.student.clip_grad, grad_norm)
            optimizer.step_with_ready_grads()
            self.guard.accept(grad_norm)
        self.student.scheduler.step(1)
        return update

    def _publish(self, phase: Phases) -> None:
        """Give the engines the updated weights as the next policy version."""
        phase.can_give_up = False
        self.policy_version += 1
        with phase("rollout"):
            self.collector.settle(self.policy_version)
        with phase("weight_sync"):
            self.collector.push(self.policy_version)

    def _save_for_replay(self, rollouts: Sequence[Rollout], update: Update) -> None:
        """Write the rollouts of a skipped step as JSON, on rank 0, if the settings ask for it."""
        folder = self.settings.replay_dir
        if folder is None or dist.get_rank() != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        batch = {
            "step": self.step,
            "policy_version": self.policy_version,
            "skip_reason": update.skip_reason,
            "rollouts": [asdict(rollout) for rollout in rollouts],
        }
        (folder / f"step_{self.step}.json").write_text(json.dumps(batch) + "\n")

    def _report(
        self, rollouts: Sequence[Rollout], update: Update, phase: Phases
    ) -> dict[str, float]:
        """Return all metrics of the step (docs/how/method.md, section 8); the sink records them."""
        reduced = reduce_sums(self.loss.sums, self.student.counts_tokens)
        values = reduced | rollout_metrics(rollouts) | self.curriculum.metrics()
        values |= {
            "optim/grad_norm": update.grad_norm,
            "optim/lr": update.learning_rate,
            "optim/skipped": float(not update.applied),
            "perf/peak_memory_bytes": _peak_memory_bytes(self.student.options.device),
            "time/loss_operator_seconds": self.loss.operator_seconds,
        }
        values |= phase.metrics()
        values["perf/tokens_per_second"] = values["loss/num_tokens"] / values["time/total_seconds"]
        if self.sink is not None:
            self.sink.record(self.step, values)
        return values


def _peak_memory_bytes(device: str) -> float:
    """Return the peak memory of this rank since its start: of its GPU, or of its process on CPU."""
    if device == "cpu":
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(torch.cuda.max_memory_allocated())
