"""Grades of responses, and statistics over them.

A response is right when its final answer is literally the reference, or, for mathematical
references, when math-verify finds them equal. That happens in a process of its own with a time
limit (see `grading_worker`); what takes longer counts as wrong.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vopd.data.answers import conclusion, is_mathematical, is_same_text, reference_of
from megatron_vopd.errors import GradingError, UserError
from megatron_vopd.types import Prompt

_START_SECONDS = 60.0
_GRACE_SECONDS = 5.0
# What is sent at once must fit into the pipe (64 KiB), or the write could wait for ever.
_MAX_REFERENCE, _MAX_TEXT = 2000, 8000


@dataclass(frozen=True)
class Outcome:
    """The part of a response that an evaluation keeps: grade, tokens, whether it was cut."""

    grade: float
    num_tokens: int
    is_truncated: bool


class Grader:
    """A grader of responses with one worker process, started when first needed.

    Used as a context manager, or closed by `close`. Calls may come from any one thread at a time.

    Args:
        time_limit_seconds: for each comparison; a response that takes longer is wrong.
    """

    def __init__(self, time_limit_seconds: float = 5.0) -> None:
        self.num_timeouts = 0
        self._limit = time_limit_seconds
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def grade(self, prompt: Prompt, response_text: str) -> float:
        """Return 1.0 for a right final answer, else 0.0.

        Raises:
            UserError: the prompt has no reference answer.
            GradingError: the worker cannot be started.
        """
        if prompt.answer is None:
            raise UserError(
                f"{prompt.prompt_id}: got no reference answer, expected one to grade with; set "
                "data.answer_field"
            )
        reference, text = reference_of(prompt.answer), conclusion(response_text)
        if is_same_text(reference, text):
            return 1.0
        if not is_mathematical(reference) or len(reference) > _MAX_REFERENCE:
            return 0.0
        return float(self._is_equal(reference, text[-_MAX_TEXT:]))

    def close(self) -> None:
        """End the worker. May be called twice."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()

    def _is_equal(self, reference: str, response: str) -> bool:
        worker = self._worker = self._worker or _start_worker()
        assert worker.stdin is not None
        request = json.dumps([reference, response, self._limit], ensure_ascii=False) + "\n"
        try:
            worker.stdin.write(request.encode(errors="replace"))
            worker.stdin.flush()
            answer = _read_line(worker, self._limit + _GRACE_SECONDS)
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            self.num_timeouts += 1
            self.close()
            return False
        return json.loads(answer) is True


def _start_worker() -> subprocess.Popen[bytes]:
    """Start a worker and wait until it is ready.

    Raises:
        GradingError: it ends, or is not ready in time.
    """
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "megatron_vopd.data.grading_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if _read_line(worker, _START_SECONDS) != b"ready\n":
        worker.kill()
        status = worker.wait()
        raise GradingError(
            f"the grading process did not start (status {status}); try: "
            "python -c 'import math_verify'"
        )
    return worker


def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Read one line, or what there is of it when the worker ends or `seconds` are over."""
    assert worker.stdout is not None
    descriptor = worker.stdout.fileno()
    deadline = time.monotonic() + seconds
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                break
            piece = os.read(descriptor, 4096)
            if not piece:
                break
            line += piece
    return line


def avg_at_k(grades_PG: Sequence[Sequence[float]]) -> float:
    """Return the mean grade over all responses of all prompts; NaN without any."""
    grades = [grade for grades_G in grades_PG for grade in grades_G]
    return math.fsum(grades) / len(grades) if grades else math.nan


def pass_at_k(grades_PG: Sequence[Sequence[float]], k: int) -> float:
    """Return the mean over prompts of the chance that k of its G responses hold a right one.

    Drawn without replacement: 1 - C(G - c, k) / C(G, k) with c right ones (grade > 1/2). NaN
    without prompts.

    Raises:
        ValueError: a prompt with fewer than k responses.
    """
    chances = []
    for grades_G in grades_PG:
        num, num_right = len(grades_G), sum(grade > 0.5 for grade in grades_G)
        if not 1 <= k <= num:
            raise ValueError(f"k: expected 1 to the {num} responses of a prompt, got {k}")
        chances.append(1 - math.comb(num - num_right, k) / math.comb(num, k))
    return math.fsum(chances) / len(chances) if chances else math.nan


def evaluation_metrics(
    task: str, outcomes: Sequence[Outcome], samples: int, k: int
) -> dict[str, float]:
    """Return `eval/<task>/{avg@samples,pass@k,length,truncated_frac}` of a task's responses.

    Args:
        outcomes: `samples` of each prompt, one prompt after the other.
    """
    number = len(outcomes)
    if number % samples:
        raise ValueError(f"expected {samples} outcomes per prompt, got {number}")
    grades = [outcome.grade for outcome in outcomes]
    grades_PG = [grades[start : start + samples] for start in range(0, number, samples)]
    num_tokens = sum(outcome.num_tokens for outcome in outcomes)
    num_truncated = sum(outcome.is_truncated for outcome in outcomes)
    return {
        f"eval/{task}/avg@{samples}": avg_at_k(grades_PG),
        f"eval/{task}/pass@{k}": pass_at_k(grades_PG, k),
        f"eval/{task}/length": num_tokens / number if number else math.nan,
        f"eval/{task}/truncated_frac": num_truncated / number if number else math.nan,
    }
