"""Length curricula: a ladder of response lengths, climbed by entropy, by steps, or not at all.

The entropy gate (arXiv 2605.16826; docs/how/method.md, section 5): at a check, the student's mean
entropy per token over held-out prompts, measured at the current length, must be at least a
threshold for the next rung; otherwise the length holds. No check lowers it. The paper publishes
neither threshold nor ladder nor interval: the defaults are ours.

All kinds share one interface, and know no device, rank or file:

    if curriculum.due(step):
        curriculum.update(step, measure() if curriculum.needs_entropy else None)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol


class Curriculum(Protocol):
    """The interface of a length curriculum.

    Attributes:
        remark: a log line, what the last `update` or `load_state_dict` did and why; empty when
            there is nothing to report.
    """

    remark: str

    @property
    def max_response_tokens(self) -> int:
        """Longest response of the current stage, in tokens."""
        ...

    @property
    def needs_entropy(self) -> bool:
        """True when `update` needs a measured entropy."""
        ...

    def due(self, step: int) -> bool:
        """Return True when `update` is to be called after `step` optimizer steps."""
        ...

    def update(self, step: int, entropy: float | None) -> None:
        """Decide the stage from here on, and set `remark`.

        Args:
            entropy: mean over held-out prompts at the current length, nats per token; None: not
                measured, as `needs_entropy` is False.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return the metrics `curriculum/*` of the current stage."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values that `load_state_dict` restores."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`, which drops whatever happened since it was taken; set `remark`."""
        ...


def _checked_ladder(ladder: Sequence[int]) -> tuple[int, ...]:
    rising = all(low < high for low, high in pairwise(ladder))
    if not ladder or not rising or ladder[0] < 1:
        raise ValueError(f"ladder: expected ascending lengths >= 1, got {list(ladder)}")
    return tuple(ladder)


def _rung(stage: int, ladder: Sequence[int]) -> str:
    return f"{ladder[stage]} tokens (rung {stage + 1} of {len(ladder)})"


def _ladder_remark(state: dict[str, Any], stage: int, ladder: Sequence[int]) -> str:
    """Describe what a ladder other than the checkpoint's means; empty when it is the same."""
    before, length = state.get("ladder"), state["max_response_tokens"]
    if before is None or list(before) == list(ladder):
        return ""
    stays = f"responses stay at {_rung(stage, ladder)}"
    if ladder[stage] != length:
        near = "longest rung below" if ladder[stage] < length else "first rung, as none is below"
        stays = f"responses go from {length} to {_rung(stage, ladder)}, the {near} {length}"
    return f"curriculum: the ladder was {list(before)} and is {list(ladder)}; {stays}"


class EntropyGatedLength:
    """A ladder whose next rung is taken when the student's entropy is high enough.

    arXiv 2605.16826; docs/how/method.md, section 5.

    Args:
        ladder: response lengths in tokens, ascending.
        min_entropy: threshold in nats per token; None: by fraction.
        min_entropy_fraction: threshold as a share of the run's first measurement; unused when
            `min_entropy` is given.
        interval: optimizer steps between checks, and the fewest that a rung lasts.
        ema: weight of the past in the smoothed entropy; 0 = the last measurement alone. It
            restarts at each rung: carried over, it would lag behind a closing gate.

    Raises:
        ValueError: an argument out of its range.
    """

    needs_entropy = True

    def __init__(
        self,
        ladder: Sequence[int],
        min_entropy: float | None = None,
        min_entropy_fraction: float | None = 0.5,
        interval: int = 50,
        ema: float = 0.0,
    ) -> None:
        self._ladder = _checked_ladder(ladder)
        self.remark = ""
        if min_entropy is None and min_entropy_fraction is None:
            raise ValueError("min_entropy: expected it or min_entropy_fraction, got neither")
        for name, value in (("min_entropy", min_entropy), ("fraction", min_entropy_fraction)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        if interval < 1 or not 0 <= ema < 1:
            raise ValueError(f"expected interval >= 1 and 0 <= ema < 1, got {interval} and {ema}")
        self._min_entropy, self._fraction = min_entropy, min_entropy_fraction
        self._interval, self._ema = interval, ema
        self._stage = 0
        self._stage_start = 0
        self._last_check = 0
        self._entropy: float | None = None
        self._restarts = True
        self._first_entropy: float | None = None

    @property
    def stage(self) -> int:
        """Index of the current rung."""
        return self._stage

    @property
    def max_response_tokens(self) -> int:
        """Longest response of the current stage."""
        return self._ladder[self._stage]

    @property
    def entropy(self) -> float | None:
        """Smoothed entropy that the last check compared, nats per token; None before the first."""
        return self._entropy

    @property
    def threshold(self) -> float | None:
        """Entropy to advance, nats per token; None: relative, and nothing measured yet."""
        if self._min_entropy is not None:
            return self._min_entropy
        if self._first_entropy is None or self._fraction is None:
            return None
        return self._fraction * self._first_entropy

    def due(self, step: int) -> bool:
        """Return True when an interval has passed since the last check."""
        return step - self._last_check >= self._interval

    def update(self, step: int, entropy: float | None) -> None:
        """Take a measurement made after `step` optimizer steps at the current length.

        A measurement before the stage has lasted one interval is remembered but never advances.

        Raises:
            ValueError: `entropy` is None or not finite.
        """
        if entropy is None or not math.isfinite(entropy):
            raise ValueError(f"entropy: expected a finite number of nats, got {entropy}")
        if self._first_entropy is None:
            self._first_entropy = entropy
        past = entropy if self._restarts or self._entropy is None else self._entropy
        self._entropy = self._ema * past + (1 - self._ema) * entropy
        self._last_check, self._restarts = step, False
        threshold = self.threshold
        assert threshold is not None
        last = self._stage == len(self._ladder) - 1
        stayed = step - self._stage_start >= self._interval
        before = self._stage
        if stayed and not last and self._entropy >= threshold:
            self._stage, self._stage_start, self._restarts = self._stage + 1, step, True
        self.remark = self._remark(step, entropy, threshold, before, stayed)

    def _remark(
        self, step: int, measured: float, threshold: float, before: int, stayed: bool
    ) -> str:
        """Describe a check in one line: measurement, threshold, why the length grows or holds."""
        assert self._entropy is not None
        sign = ">=" if self._entropy >= threshold else "<"
        smoothed = f" (measured {measured:.4f}, smoothed)" if self._ema else ""
        if self._stage > before:
            outcome = f"responses grow to {_rung(self._stage, self._ladder)}"
        else:
            why = "" if sign == "<" else ", the last" if stayed else ", until its interval is over"
            outcome = f"holds at {_rung(self._stage, self._ladder)}{why}"
        relative = self._min_entropy is None
        first = f" ({self._fraction:g} of the first)" if relative else ""
        compared = f"entropy {self._entropy:.4f}{smoothed} {sign} {threshold:.4f} nats{first}"
        return f"curriculum after step {step}: {compared}: {outcome}"

    def metrics(self) -> dict[str, float]:
        """Return stage and length, and smoothed entropy and threshold once they exist."""
        found = _metrics(self._stage, self.max_response_tokens, self._entropy)
        if self._entropy is not None and self.threshold is not None:
            found["curriculum/threshold"] = self.threshold
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return stage, ladder, length; start and last check (steps); smoothed and first entropy.

        `restarts`: the next measurement is the first of its stage.
        """
        return {
            "stage": self._stage,
            "ladder": list(self._ladder),
            "max_response_tokens": self.max_response_tokens,
            "stage_start": self._stage_start,
            "last_check": self._last_check,
            "entropy": self._entropy,
            "restarts": self._restarts,
            "first_entropy": self._first_entropy,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`.

        When the ladder has changed, the run stays at its length: on the rung of that length, or
        else on the longest one below it (the first, if there is none), where smoothing restarts.
        """
        length = state["max_response_tokens"]
        self._stage = _stage_of(length, self._ladder)
        self._last_check = state["last_check"]
        self._stage_start = state.get("stage_start", self._last_check)
        self._entropy, self._first_entropy = state.get("entropy"), state.get("first_entropy")
        self._restarts = state.get("restarts", True) or self.max_response_tokens != length
        self.remark = _ladder_remark(state, self._stage, self._ladder)


class FixedLength:
    """A length that is always the last rung of the ladder."""

    needs_entropy = False

    def __init__(self, ladder: Sequence[int]) -> None:
        self._ladder = _checked_ladder(ladder)
        self.remark = ""

    @property
    def max_response_tokens(self) -> int:
        return self._ladder[-1]

    def due(self, step: int) -> bool:
        """Return False: the length never changes."""
        return False

    def update(self, step: int, entropy: float | None = None) -> None:
        """Ignore the measurement: the length never changes."""

    def metrics(self) -> dict[str, float]:
        return _metrics(len(self._ladder) - 1, self.max_response_tokens, None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "ladder": list(self._ladder),
            "max_response_tokens": self.max_response_tokens,
            "last_check": 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing; set `remark` if the fixed length changed."""
        before, after = state["max_response_tokens"], self.max_response_tokens
        changed = f"curriculum: the length was fixed at {before} and is {after} tokens"
        self.remark = changed if before != after else ""


class LinearLength:
    """A ladder whose next rung is taken every `interval` steps, whatever the entropy."""

    needs_entropy = False

    def __init__(self, ladder: Sequence[int], interval: int = 50) -> None:
        self._ladder = _checked_ladder(ladder)
        if interval < 1:
            raise ValueError(f"interval: expected >= 1, got {interval}")
        self.remark = ""
        self._interval = interval
        self._stage = 0
        self._last_check = 0

    @property
    def max_response_tokens(self) -> int:
        return self._ladder[self._stage]

    def due(self, step: int) -> bool:
        """Return True when an interval has passed since the last check."""
        return step - self._last_check >= self._interval

    def update(self, step: int, entropy: float | None = None) -> None:
        """Advance if the stage has lasted its interval."""
        self.remark = ""
        if not self.due(step):
            return
        self._last_check = step
        if self._stage < len(self._ladder) - 1:
            self._stage += 1
            grown = _rung(self._stage, self._ladder)
            self.remark = f"curriculum after step {step}: interval over: responses grow to {grown}"

    def metrics(self) -> dict[str, float]:
        return _metrics(self._stage, self.max_response_tokens, None)

    def state_dict(self) -> dict[str, Any]:
        """Return ladder, length of the stage and step of the last check."""
        return {
            "ladder": list(self._ladder),
            "max_response_tokens": self.max_response_tokens,
            "last_check": self._last_check,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`; a changed ladder as in EntropyGatedLength."""
        self._stage = _stage_of(state["max_response_tokens"], self._ladder)
        self._last_check = state["last_check"]
        self.remark = _ladder_remark(state, self._stage, self._ladder)


def _stage_of(length: int, ladder: Sequence[int]) -> int:
    """Return the index of the rung of that length, else of the longest below it, else 0."""
    return max(sum(rung <= length for rung in ladder) - 1, 0)


def _metrics(stage: int, max_response_tokens: int, entropy: float | None) -> dict[str, float]:
    result: dict[str, float] = {
        "curriculum/stage": stage,
        "curriculum/max_response_tokens": max_response_tokens,
    }
    return result if entropy is None else {**result, "curriculum/entropy": entropy}
