"""Grades with the real math-verify in its own process, and statistics by enumeration."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from megatron_vopd.data.answers import final_answer, last_boxed
from megatron_vopd.data.grading import (
    Grader,
    Outcome,
    avg_at_k,
    evaluation_metrics,
    pass_at_k,
)
from megatron_vopd.errors import UserError
from megatron_vopd.types import Prompt


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(time_limit_seconds=2.0) as grader:
        yield grader


def prompt(answer: str | None) -> Prompt:
    return Prompt("math.jsonl:1", (1,), answer)


RIGHT = [
    (r"\frac{1}{2}", r"so \boxed{0.5}"),
    ("42", "The answer is 42."),
    ("42", "We get 6 * 7, so the final answer is **42**"),
    ("1,000", "$1000$"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\frac{\pi}{2})}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("first 2, then #### 18", "#### 18"),
    (r"\text{even}", r"\boxed{even}"),
    ("72", "<think>perhaps 71</think>It is \\boxed{72}."),
    ("Paris", "I think of Rome.\nThe answer is: Paris."),
    ("B", "(B) Rome"),
    ("B", r"\boxed{\text{B}}"),
    ("(C)", "The correct option is C"),
    ("Paris", 'The answer is "Paris".'),
    ("Paris", "**Answer:** Paris"),
]
WRONG = [
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
    ("42", ""),
    ("42", "I do not know."),
    ("Paris", r"\boxed{Pairs}"),
    ("A", "Answer: B) An answer"),
    (".5", r"\boxed{5}"),
    ("5!", r"\boxed{5}"),
    ("f'", r"\boxed{f}"),
    ("2**3", r"\boxed{23}"),
    ("2", r"<think>\boxed{2}</think>It is \boxed{3}"),
    ("2", r"<think>surely \boxed{2}"),
    ("2", r"<think>perhaps \boxed{2}</think>I cannot say."),
    ("7", r"\boxed{" * 200),
]


@pytest.mark.parametrize(("answer", "response"), RIGHT)
def test_right_answers(answer: str, response: str, grader: Grader) -> None:
    assert grader.grade(prompt(answer), response) == 1.0


@pytest.mark.parametrize(("answer", "response"), WRONG)
def test_wrong_answers(answer: str, response: str, grader: Grader) -> None:
    assert grader.grade(prompt(answer), response) == 0.0


def test_what_is_no_mathematics_starts_no_process() -> None:
    with Grader() as grader:
        assert grader.grade(prompt("Paris"), "Rome") == 0.0
        assert grader.grade(prompt("1+" * 1001 + "1"), r"\boxed{1002}") == 0.0, "too long"
        assert grader._worker is None
        assert grader.grade(prompt("1+1"), r"\boxed{2}") == 1.0
        assert grader._worker is not None


def test_what_never_ends_is_wrong_and_the_next_is_graded() -> None:
    """A power computes in C, where math-verify's own limit never fires."""
    with Grader(time_limit_seconds=0.5) as grader:
        assert grader.grade(prompt("0.5"), r"\boxed{\frac{1}{2}}") == 1.0
        start = time.monotonic()
        assert grader.grade(prompt("7"), r"\boxed{9^{9^{9^{9}}}}") == 0.0
        assert time.monotonic() - start < 4 and grader.num_timeouts == 1
        assert grader.grade(prompt("0.5"), r"\boxed{\frac{1}{2}}") == 1.0


def test_a_worker_that_is_killed_or_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vopd.data.grading._GRACE_SECONDS", 0.2)
    with Grader(time_limit_seconds=0.3) as grader:
        long = "\u4e00" * 200_000 + r"\boxed{\frac{1}{2}}"  # more than a pipe holds
        for stop in (signal.SIGKILL, signal.SIGSTOP):
            assert grader.grade(prompt("0.5"), long) == 1.0
            assert grader._worker is not None
            os.kill(grader._worker.pid, stop)
            assert grader.grade(prompt("0.5"), long) == 0.0
        assert grader.num_timeouts == 2


def test_grading_off_the_main_thread(grader: Grader) -> None:
    grades: list[float] = []
    handler = signal.getsignal(signal.SIGALRM)
    thread = threading.Thread(
        target=lambda: grades.append(grader.grade(prompt("0.5"), r"\boxed{\frac{1}{2}}"))
    )
    thread.start()
    thread.join()
    assert grades == [1.0] and signal.getsignal(signal.SIGALRM) is handler


def test_the_worker_ends_with_its_grader() -> None:
    grader = Grader()
    grader.grade(prompt("0.5"), r"\boxed{\frac{1}{2}}")
    assert grader._worker is not None
    pid = grader._worker.pid
    grader.close()
    grader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_reference_answer(grader: Grader) -> None:
    with pytest.raises(UserError, match=r"math\.jsonl:1: got no reference answer"):
        grader.grade(prompt(None), "42")


def test_boxed_and_final_answers() -> None:
    assert last_boxed(r"a \boxed{1} b \boxed{\frac{1}{2}} c \boxed{3") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{3") is None
    assert final_answer("The answer is 1.\nNo: the answer is 2.") == "2."
    assert final_answer("one\ntwo\n") == "two" and final_answer("") == ""


@pytest.mark.parametrize("num", [1, 2, 5, 6])
def test_pass_at_k_counts_subsets(num: int) -> None:
    for grades in itertools.product([0.0, 1.0], repeat=num):
        for k in range(1, num + 1):
            subsets = list(itertools.combinations(grades, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k([grades], k) == pytest.approx(share, abs=1e-12)
        assert pass_at_k([grades], 1) == pytest.approx(avg_at_k([grades]))


def test_statistics_over_prompts() -> None:
    grades = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert avg_at_k(grades) == 0.5 and pass_at_k(grades, 2) == pytest.approx(2 / 3)
    assert pass_at_k([[0.0] * 999 + [1.0]], 500) == pytest.approx(0.5)
    assert math.isnan(avg_at_k([])) and math.isnan(pass_at_k([], 1))
    for k in (0, 3):
        with pytest.raises(ValueError, match="expected 1 to the 2"):
            pass_at_k(grades, k)


def test_evaluation_metrics() -> None:
    outcomes = [
        Outcome(grade, length, length > 2)
        for grade, length in ((1.0, 1), (0.0, 2), (0.0, 3), (0.0, 6))
    ]
    assert evaluation_metrics("m", outcomes, samples=2, k=2) == {
        "eval/m/avg@2": 0.25,
        "eval/m/pass@2": 0.5,
        "eval/m/length": 3.0,
        "eval/m/truncated_frac": 0.5,
    }
    with pytest.raises(ValueError, match="expected 2 outcomes per prompt, got 3"):
        evaluation_metrics("m", outcomes[:3], samples=2, k=2)
