"""The training step: sample, score, distil, update, push. `train_step` reads like the paper.

Everything it needs is handed to it ready-made. Where the mathematics is: the advantage
A_t = r_t - V(c_t) (arXiv 2605.07865, Eq. 10) in `objectives.advantages`, and all other objectives
beside it; the loss -A log p(a), summed over tokens and divided by their number over the whole
step, in `loss.RowLoss`.

Every rank runs the same statements on the same plan, so ranks wait for one another only inside the
named collectives of sharing, teacher, vocab_parallel, metrics and megatron-core.
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
from megatron_vopd.megatron.microbatch import Microbatch
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
    """Where a step's metrics go, and lines for the reader; on one rank."""

    def record(self, step: int, values: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Update:
    """What became of a step's gradient: applied, or skipped for `objection`; norm unclipped."""

    grad_norm: float
    learning_rate: float
    objection: str = ""

    @property
    def applied(self) -> bool:
        return not self.objection


class Phases:
    """Seconds spent in the named parts of one step, on this rank.

    Attributes:
        can_give_up: until the weights change.

    Args:
        before: called when a part begins, as long as the step can be given up.
    """

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self._before = before
        self.can_give_up = True
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.can_give_up:
            self._before()
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """`time/*_seconds`; `other` is what no phase names."""
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
        teachers: by key of the configuration; empty for objectives without a teacher.
        collector: of the responses.
        curriculum: length limit of the responses.
        sink: of the metrics; None on ranks that record none.
        held_out: prompts whose responses' entropy the curriculum is gated by.
        stop: a request to stop, looked at between the phases of a step; None: there is none.
        caches: of the teachers' states of given responses, by the teacher's key.
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
        """One step on every rank of the world; its metrics, the same on every rank but for times.

        Raises:
            EngineError: an engine failed or answered wrongly; no weight has changed.
            SkipLimitError: too many steps in a row were skipped.
            StopRequested: no weight has changed; data and curriculum may have moved on.
        """
        phase = Phases(self._go_on)
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
        """Steps until `num_steps` have been made, in all, or a stop is requested.

        A step that is given up leaves no trace: afterwards all is as the last whole step left it.

        Args:
            after_step: called on every rank with the number of steps made (checkpoints,
                evaluation, a request to stop); False ends the run.
        """
        going_on = True
        while going_on and self.step < num_steps:
            before = self.state_dict()
            try:
                self.train_step()
            except StopRequested:
                self.load_state_dict(before)
                return
            going_on = after_step is None or after_step(self.step)
        self.collector.settle(self.policy_version)

    def _go_on(self) -> None:
        if self.stop is not None and self.stop.anywhere():
            raise StopRequested("asked to stop")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and moments: JSON values, the same on every rank.

        A collective: it waits for a generation in flight.
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
        self.step, self.policy_version = state["step"], state["policy_version"]
        self.guard.load_state_dict(state["guard"])
        scheduler = self.student.scheduler
        scheduler.step(state["scheduler"] - scheduler.num_steps)
        self.curriculum.load_state_dict(state["curriculum"])
        self.collector.load_state_dict(state["collector"])

    def _response_limit(self) -> int:
        """Longest response of this step, after the curriculum had its look at the entropy."""
        curriculum = self.curriculum
        if curriculum.due(self.step):
            entropy = self._held_out_entropy() if curriculum.needs_entropy else None
            curriculum.update(self.step, entropy)
            if self.sink is not None and curriculum.remark:
                self.sink.say(curriculum.remark)
        return curriculum.max_response_tokens

    def _held_out_entropy(self) -> float:
        """Nats per token over fresh responses to the held-out prompts, at the current length."""
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
        self, rollouts: Sequence[Rollout], replicas: Sequence[Sequence[Microbatch]]
    ) -> list[torch.Tensor]:
        """The teachers' hidden states of this rank's rows, as far as they are not on disk."""
        groups, device = self.student.groups, self.student.options.device
        return cached_score(self.teachers, self.caches, rollouts, replicas, groups, device)

    def _task_advantages(self, graded: Sequence[Graded]) -> list[float] | None:
        """Weighted, group-normalised grade of each response; 0 where there is none."""
        weight = self.settings.task_reward_weight
        if weight == 0:
            return None
        known = [one for one in graded if not math.isnan(one.grade)]
        values = group_advantages([one.rollout for one in known], [one.grade for one in known])
        found = {one.order: weight * value for one, value in zip(known, values, strict=True)}
        return [found.get(one.order, 0.0) for one in graded]

    def _update(self, rollouts: Sequence[Rollout]) -> Update:
        """Apply the gradient, or on all ranks together leave every parameter as it is (R7)."""
        optimizer = self.student.optimizer
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        loss = self.loss.loss_sum if self.student.groups.is_last_stage else 0.0
        objection = self.guard.objection(loss, grad_norm)
        if not any(rollout.response_ids for rollout in rollouts):
            objection = "no response has a token"
        objection = first_reason(objection, self.student.options.device)
        update = Update(grad_norm, learning_rate(optimizer), objection)
        if objection:
            self._save_for_replay(rollouts, update)
            self.guard.skip(self.step, objection)
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
            # An engine on the same GPU takes its share again, which torch would keep for later.
            torch.cuda.empty_cache()
            self.collector.push(self.policy_version)

    def _save_for_replay(self, rollouts: Sequence[Rollout], update: Update) -> None:
        folder = self.settings.replay_dir
        if folder is None or dist.get_rank() != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        batch = {
            "step": self.step,
            "policy_version": self.policy_version,
            "objection": update.objection,
            "rollouts": [asdict(rollout) for rollout in rollouts],
        }
        (folder / f"step_{self.step}.json").write_text(json.dumps(batch) + "\n")

    def _report(
        self, rollouts: Sequence[Rollout], update: Update, phase: Phases
    ) -> dict[str, float]:
        """All metrics of the step (method.md section 8), recorded by the rank with a sink."""
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
    """Of this rank since its start: of the device, or of the process on a CPU."""
    if device == "cpu":
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(torch.cuda.max_memory_allocated())
