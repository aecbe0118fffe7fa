"""The step guard (R7): which updates are not applied, and when a run should stop. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megatron_vopd.errors import SkipLimitError

# Accepted gradient norms whose median a new one is compared with.
WINDOW = 128
# With fewer accepted steps only non-finite numbers are skipped: early norms vary widely.
MIN_HISTORY = 4


class StepGuard:
    """A check of each update against non-finite numbers and the median of accepted gradient norms.

    Its state is the same on every rank, and saved in checkpoints.

    Args:
        spike_factor: a norm above this many times the median is refused.
        max_consecutive_skips: refused steps in a row that end the run.
    """

    def __init__(self, spike_factor: float = 10.0, max_consecutive_skips: int = 5) -> None:
        self.spike_factor = spike_factor
        self.max_consecutive_skips = max_consecutive_skips
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._skips = 0

    def skip_reason(self, loss: float, grad_norm: float) -> str:
        """Return why this rank's numbers forbid applying the step; empty if they do not.

        Args:
            loss: this rank's part, or the sum; only its finiteness matters.
            grad_norm: norm of the whole gradient before clipping.
        """
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm {grad_norm}"
        if len(self._norms) >= MIN_HISTORY:
            median = statistics.median(self._norms)
            if grad_norm > self.spike_factor * median:
                return (
                    f"gradient norm {grad_norm:.4g} above {self.spike_factor:g} x the running "
                    f"median {median:.4g}"
                )
        return ""

    def accept(self, grad_norm: float) -> None:
        """Record the gradient norm of an applied step; set the count of skips in a row to 0."""
        self._norms.append(grad_norm)
        self._skips = 0

    def skip(self, step: int, reason: str) -> None:
        """Count a step that was not applied.

        Args:
            step: its number, for the message.
            reason: why it was skipped, for the message.

        Raises:
            SkipLimitError: it is number `max_consecutive_skips` of a row of skipped steps.
        """
        self._skips += 1
        if self._skips >= self.max_consecutive_skips:
            raise SkipLimitError(
                f"step {step}: {self._skips} steps in a row were skipped (train."
                f"max_consecutive_skips), the last for: {reason}; look at the saved batches, lower "
                "optimizer.learning_rate or raise train.spike_factor"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the norms of the window and the skips in a row, as JSON values."""
        return {"norms": list(self._norms), "skips": self._skips}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the norms and the skips in a row from `state`."""
        self._norms = deque(state["norms"], maxlen=WINDOW)
        self._skips = state["skips"]
