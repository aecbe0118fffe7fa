"""A user's mistake as data: one line with the key, what was got, what was expected, the remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_vopd.types import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """`value` on one printable ASCII line of bounded length, whatever it holds."""
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


class ConfigError(UserError):
    """A configuration that cannot be used; `problems` holds every reason, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def without_failed(problems: Iterable[Problem], failed: Sequence[str]) -> list[Problem]:
    """The problems that depend on none of the `failed` keys (or sections)."""

    def depends(key: str) -> bool:
        return any(key == bad or key.startswith(f"{bad}.") for bad in failed)

    return [problem for problem in problems if not any(depends(key) for key in problem.keys)]
