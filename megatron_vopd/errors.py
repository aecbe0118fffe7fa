"""Errors as data: one line that says what, where, what was expected and the remedy.

`UserError` and its kinds are mistakes of the user (exit status MISTAKE); `RunFailure` and its kinds
end a run (exit status FAILED).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Exit statuses of the commands, the tools and a rank; `run.status` adds those for launch scripts.
OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """Return `value` on one printable ASCII line of bounded length, whatever it holds."""
    text = _SHORT.repr(value)
    return text.encode("ascii", "backslashreplace").decode("ascii")


@dataclass(frozen=True)
class Problem:
    """One mistake, or one notice. `key` is `section.key`, or `file:line`, or a model's key.

    `involves` lists further keys that the statement depends on: when one of them is itself
    invalid, the statement is not made.
    """

    key: str
    got: str
    expected: str
    remedy: str
    involves: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.key}: got {self.got}, expected {self.expected}; {self.remedy}"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, *self.involves)


@dataclass(frozen=True)
class Notice:
    """Something worth knowing that is no mistake."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


class UserError(ValueError):
    """A mistake of the user: one line that says what, where, expected and the remedy.

    Commands print it without a traceback and exit with status MISTAKE.
    """


class ConfigError(UserError):
    """A configuration that cannot be used; `problems` holds every reason, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def refusal(key: object, got: str, expected: str, remedy: str) -> ConfigError:
    """Return the error for a single mistake: `raise refusal(...)`."""
    return ConfigError([Problem(str(key), got, expected, remedy)])


class LayoutError(UserError):
    """A parallel layout that the world or the model cannot be divided into."""


def without_failed(problems: Iterable[Problem], failed: Sequence[str]) -> list[Problem]:
    """Return the problems that depend on none of the `failed` keys (or sections)."""

    def depends(key: str) -> bool:
        return any(key == bad or key.startswith(f"{bad}.") for bad in failed)

    return [problem for problem in problems if not any(depends(key) for key in problem.keys)]


class StopRequested(Exception):  # noqa: N818 (nothing went wrong)
    """A request to stop the run; raised on every rank."""


class RunFailure(RuntimeError):  # noqa: N818 (named for what it ends, not for a mistake)
    """A failure that ends a well-configured run: one line without a traceback, status FAILED."""


class EngineError(RunFailure):
    """An engine that failed, hung or answered wrongly; names phase, engine, what was seen."""


class GradingError(RunFailure):
    """A grading process that does not start or does not answer."""


class SkipLimitError(RunFailure):
    """A run in which too many steps in a row were skipped."""
