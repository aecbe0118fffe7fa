"""The responses of a step: sampled by the leaders' engines, given with the data, or both.

Every rank draws the same prompts. Data-parallel leader d asks its engine for prompts d, d + dp, ...
and grades the answers; then all ranks share them. When an engine fails, all ranks push the current
weights again, which restarts it, and ask a second time: each response has its own seed, so the
answer is what it would have been. With `max_staleness: 1` the leaders' engines
sample the next step's responses while the current one trains, in a thread that only waits for the
engine's process: megatron-core and collectives stay in the main thread. A push waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_vopd.collectives import StopFlag, first_error
from megatron_vopd.data.grading import Outcome
from megatron_vopd.data.responses import shortened
from megatron_vopd.errors import EngineError
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.rollout.engine import Engine, Progress, Sampling, step_seed
from megatron_vopd.rollout.validate import check_rollouts
from megatron_vopd.trainer.exchange import Graded, share_outcomes, share_rollouts
from megatron_vopd.trainer.settings import StepSettings
from megatron_vopd.types import Prompt, Rollout

# A generation in a thread is waited for this much longer than the engine's deadline.
GRACE_SECONDS = 30.0


class PromptSource(Protocol):
    """A stream of prompts whose position a checkpoint saves and a resumed run restores."""

    def next(self, n: int) -> list[Prompt]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ResponseSource(Protocol):
    """A stream of given responses whose position a checkpoint saves and a resumed run restores."""

    def next(self, n: int) -> list[Rollout]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Grader = Callable[[Rollout], float]
Push = Callable[[int], Any]  # policy version -> report; a collective that restarts failed engines
Answer = list[tuple[Rollout, float]]


class DroppedWeights(Protocol):
    """A record of whether engines that drop their weights in their sleep hold some.

    Both methods are called by every rank of the world.
    """

    def ensure(self, policy_version: int) -> None:
        """Push these weights unless the engines hold them."""
        ...

    def note_dropped(self) -> None:
        """Note that the engines may have dropped their weights."""
        ...


@dataclass(frozen=True)
class Request:
    """Prompts and sampling of one call to the engines; only `progress` differs between ranks."""

    prompts: list[Prompt]
    sampling: Sampling
    progress: Progress | None = None


class RolloutCollector:
    """The source of graded responses for training and evaluation, the same on every rank.

    All public methods are collectives of the whole world.

    Args:
        engine: engine of this rank when it is a data-parallel leader, else None.
        prompts: prompts that the engines answer; None when all responses are given.
        settings: how many responses a step takes, and how they are sampled.
        vocab_size: number of ids that student and teachers share; sampled ids must be below it.
        device: device of the tensors that are gathered.
        responses: given responses; None unless the settings ask for some.
        grader: rollout -> grade, called on the leaders; None: no grades.
        push: gives all engines the student's weights under a version; None: a failed engine is not
            restarted.
        stop: a request to stop, which ends the wait for an engine; None: the wait is never cut
            short.
        dropped: where engines drop their weights after a step's responses, since a push follows;
            where none does (a skipped step), they are pushed again first. None: they keep them.
    """

    def __init__(
        self,
        groups: Groups,
        engine: Engine | None,
        prompts: PromptSource | None,
        settings: StepSettings,
        vocab_size: int,
        device: str,
        responses: ResponseSource | None = None,
        grader: Grader | None = None,
        push: Push | None = None,
        stop: StopFlag | None = None,
        dropped: DroppedWeights | None = None,
    ) -> None:
        self._groups, self._engine, self._settings = groups, engine, settings
        self._prompts, self._responses, self._grader = prompts, responses, grader
        self._vocab_size, self._device, self._push = vocab_size, device, push
        self._stop, self._dropped = stop, dropped
        self._flight: _Flight | None = None
        self._ready: list[Graded] | None = None

    def take(self, step: int, limit: int, policy_version: int) -> list[Graded]:
        """Return the responses of `step`; with staleness 1, start sampling those of the next step.

        Args:
            step: number of the step, of which the seed of its sampling is made.
            limit: longest response, in tokens; longer given ones are cut.
            policy_version: version of the trainer's weights.

        Raises:
            EngineError: on every rank, when an engine on any rank failed or answered wrongly, and
                again after it was restarted.
            StopRequested: on every rank, when a stop was requested while an engine sampled.
        """
        self.settle(policy_version)
        graded, self._ready = self._ready, None
        asks = self._settings.num_asked > 0
        if graded is None:
            request = self._request(step, limit) if asks else None
            graded = [] if request is None else self._collect(request, policy_version, False)
        if self._settings.max_staleness and asks:
            self._flight = _Flight(self._generate, self._request(step + 1, limit))
        if self._settings.num_given:
            assert self._responses is not None, "given responses without a source"
            given = self._responses.next(self._settings.num_given)
            start = len(graded)
            graded += [Graded(start + i, shortened(r, limit)) for i, r in enumerate(given)]
        return graded

    def settle(self, policy_version: int) -> None:
        """Wait for the generation in flight, if any, and keep its responses for `take`."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        deadline = self._settings.deadline_seconds + GRACE_SECONDS
        # A request to stop does not end this wait: weights may have changed since the step began,
        # so that these responses could not be sampled again.
        own = self._answers(
            flight.request,
            lambda: flight.result(deadline),
            lambda: self._generate(flight.request),
            policy_version,
        )
        self._ready = self._share(flight.request, own)

    def push(self, policy_version: int) -> None:
        """Give the engines the student's weights, after any generation from the old ones."""
        self.settle(policy_version)
        if self._push is not None:
            self._push(policy_version)

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, policy_version: int
    ) -> list[Rollout]:
        """Sample responses to `prompts`, which are not from the stream; return them on every rank.

        Raises:
            EngineError, StopRequested: as `take`.
        """
        self.settle(policy_version)
        graded = self._collect(Request(list(prompts), sampling), policy_version, True)
        return [one.rollout for one in graded]

    def outcomes(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        policy_version: int,
        progress: Progress | None = None,
    ) -> list[Outcome]:
        """Sample and grade responses to `prompts`, which are not from the stream.

        Args:
            progress: receives the progress of this rank's engine.

        Returns:
            Grades and lengths by prompt, then by sample, on every rank.

        Raises:
            EngineError, StopRequested: as `take`.
        """
        self.settle(policy_version)
        own = self._ask(Request(list(prompts), sampling, progress), policy_version, True)
        return share_outcomes(own, self._device)

    def state_dict(self, policy_version: int) -> dict[str, Any]:
        """Return positions in the data, and responses that are not yet trained on.

        JSON values, but for `TensorNumbers`. Waits for the generation in flight, if any.
        """
        self.settle(policy_version)
        ready = self._ready
        return {
            "prompts": None if self._prompts is None else self._prompts.state_dict(),
            "responses": None if self._responses is None else self._responses.state_dict(),
            "ready": None if ready is None else [_values_of(graded) for graded in ready],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values of `state_dict`; a generation in flight is dropped."""
        # It belongs to the step that is given up. Its thread is not waited for.
        self._flight = None
        if self._prompts is not None:
            self._prompts.load_state_dict(state["prompts"])
        if self._responses is not None:
            self._responses.load_state_dict(state["responses"])
        ready = state["ready"]
        self._ready = None if ready is None else [_graded_from(values) for values in ready]

    def _request(self, step: int, limit: int) -> Request:
        """Draw the prompts of `step` from the stream."""
        settings = self._settings
        sampling = Sampling(
            max_tokens=limit,
            samples=settings.samples_per_prompt,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=step_seed(settings.seed, step),
            stop_ids=settings.stop_ids,
        )
        assert self._prompts is not None, "responses asked for without a stream of prompts"
        return Request(self._prompts.next(settings.num_asked), sampling)

    def _collect(self, request: Request, policy_version: int, keeps_weights: bool) -> list[Graded]:
        return self._share(request, self._ask(request, policy_version, keeps_weights))

    def _share(self, request: Request, own: list[Graded]) -> list[Graded]:
        return share_rollouts(own, request.prompts, request.sampling.samples, self._device)

    def _ask(self, request: Request, policy_version: int, keeps_weights: bool) -> list[Graded]:
        """Return this rank's answers, sampled now; a request to stop ends the wait for them.

        Args:
            keeps_weights: no push follows: the next request asks for the same weights.
        """
        keeps_weights = keeps_weights or self._dropped is None
        if self._dropped is not None:
            self._dropped.ensure(policy_version)

        def answer() -> Answer:
            with nullcontext() if self._stop is None else self._stop.abortable():
                answers = self._generate(request)
            if self._engine is not None:
                # Teacher and student have the device until the next push or generation.
                self._engine.sleep(keeps_weights)
            return answers

        try:
            return self._answers(request, answer, answer, policy_version)
        finally:
            if self._dropped is not None and not keeps_weights:
                self._dropped.note_dropped()

    def _generate(self, request: Request) -> Answer:
        """Sample and grade this leader's share of the answers; also called in a thread."""
        own = self._own_prompts(request)
        if not own:
            return []
        assert self._engine is not None, "a data-parallel leader without an engine"
        rollouts = self._engine.generate(own, request.sampling, request.progress)
        nothing = float("nan")
        return [(r, self._grader(r) if self._grader else nothing) for r in rollouts]

    def _own_prompts(self, request: Request) -> list[Prompt]:
        """Return the prompts that this rank's engine answers: none unless it is a leader."""
        at = self._groups.coordinates
        return request.prompts[at.dp :: self._groups.layout.dp] if at.is_leader else []

    def _answers(
        self,
        request: Request,
        answer: Callable[[], Answer],
        again: Callable[[], Answer],
        version: int,
    ) -> list[Graded]:
        """Return this rank's answers from `answer`.

        If an engine fails on any rank, restart the engines by a push on all ranks and return the
        answers from `again`.
        """
        try:
            return self._answers_once(request, answer, version)
        except EngineError:
            if self._push is None:
                raise
        self._push(version)
        return self._answers_once(request, again, version)

    def _answers_once(
        self, request: Request, answer: Callable[[], Answer], version: int
    ) -> list[Graded]:
        """Return this rank's answers with their places; raise a failure of one rank on all."""
        own, error = [], None
        samples, at, layout = (
            request.sampling.samples,
            self._groups.coordinates,
            self._groups.layout,
        )
        try:
            prompts = self._own_prompts(request)
            answers = answer()
            rollouts = [rollout for rollout, _ in answers]
            lag = self._settings.max_staleness
            check_rollouts(rollouts, prompts, request.sampling, version, lag, self._vocab_size)
            for position, (rollout, grade) in enumerate(answers):
                index, sample = divmod(position, samples)
                order = (at.dp + index * layout.dp) * samples + sample
                own.append(Graded(order, rollout, grade))
        except Exception as caught:  # of any type: the other ranks wait for this rank's outcome
            error = caught
        first_error(error)
        return own


class _Flight:
    """A generation in a daemon thread, which dies with the process."""

    def __init__(self, generate: Callable[[Request], Any], request: Request) -> None:
        self.request = request
        self._generate = generate
        self._answer: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._generate(self.request)
        except Exception as error:  # raised in the main thread, by `result`
            self._error = error

    def result(self, timeout_seconds: float) -> Any:
        """Return the answer of the thread, or raise its error; EngineError after the timeout."""
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise EngineError(
                f"rollout: no answer after {timeout_seconds:g} s (rollout.deadline_seconds)"
            )
        if self._error is not None:
            raise self._error
        return self._answer


def _values_of(graded: Graded) -> dict[str, Any]:
    """Return values that share the rollout's ids and log-probs: this runs before every step."""
    prompt = vars(graded.rollout.prompt)
    return {**vars(graded), "rollout": {**vars(graded.rollout), "prompt": prompt}}


def _graded_from(values: dict[str, Any]) -> Graded:
    """Rebuild a `Graded` from the result of `_values_of`, which may have gone through JSON."""
    rollout, prompt = values["rollout"], values["rollout"]["prompt"]
    logprobs = rollout["rollout_logprobs"]
    return Graded(
        values["order"],
        Rollout(
            Prompt(prompt["prompt_id"], tuple(prompt["ids"]), prompt["answer"], prompt["teacher"]),
            rollout["sample"],
            tuple(rollout["response_ids"]),
            None if logprobs is None else tuple(logprobs),
            rollout["finish_reason"],
            rollout["policy_version"],
        ),
        values["grade"],
    )
