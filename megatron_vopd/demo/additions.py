"""Additions of whole numbers, worked out column by column, as data of a run.

A problem of two digits, and its response, which ends with the sum on a line of its own:

    57+68=      7+8+0=15
                5+6+1=12
                125

Each line is a column from the right: two digits, the carry, and their sum in two digits. A response
to an addition of d digits has 9 d + d + 1 (or d + 2) tokens, its end-of-sequence id included.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_vopd.errors import UserError

MAX_DIGITS = 100
# Characters that prompts and responses are made of; each is one token.
ALPHABET = "0123456789+=\n"


@dataclass(frozen=True)
class Addition:
    """The problem left + right, both of the same number of digits."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        return str(self.left + self.right)

    @property
    def response(self) -> str:
        """The columns from the right, one to a line, then the sum."""
        lines, carry = [], 0
        columns = zip(reversed(str(self.left)), reversed(str(self.right)), strict=True)
        for a, b in columns:
            total = int(a) + int(b) + carry
            lines.append(f"{a}+{b}+{carry}={total:02}")
            carry = total // 10
        return "\n".join([*lines, self.answer])


def longest_response_tokens(digits: int) -> int:
    """Return the tokens of the longest correct response, the end-of-sequence id included."""
    return 9 * digits + (digits + 1) + 1


def longest_prompt_tokens(digits: int) -> int:
    """Return the tokens of a prompt: two numbers and two signs."""
    return 2 * digits + 2


def count_additions(number: int, digits: int) -> int:
    """Count the problems of two numbers of `digits` digits, of which `number` are wanted.

    Raises:
        UserError: `digits` is out of range, or there are not so many problems.
    """
    if not 1 <= digits <= MAX_DIGITS:
        raise UserError(f"digits: got {digits}, expected 1 to {MAX_DIGITS}; choose another number")
    count = (9 * 10 ** (digits - 1)) ** 2
    if not 1 <= number <= count:
        raise UserError(
            f"additions of {digits} digits: got {number}, expected 1 to {count}; ask for fewer, or "
            "for more digits"
        )
    return count


def additions(number: int, digits: int, seed: int) -> list[Addition]:
    """Draw `number` different problems in random order; equal arguments give equal problems.

    Args:
        digits: of both numbers, which do not begin with 0.

    Raises:
        UserError: there are not so many problems.
    """
    count = count_additions(number, digits)
    low, high = 10 ** (digits - 1), 10**digits
    draw = random.Random(f"additions {digits} {seed}")
    if 2 * number > count:
        pairs = [(a, b) for a in range(low, high) for b in range(low, high)]
        return [Addition(a, b) for a, b in draw.sample(pairs, number)]
    found: dict[Addition, None] = {}
    while len(found) < number:
        found[Addition(draw.randrange(low, high), draw.randrange(low, high))] = None
    return list(found)


def save_problems(path: Path, problems: Iterable[Addition], with_response: bool) -> None:
    """Write JSON lines with `prompt`, `answer` and, where asked for, `response`."""
    lines = []
    for problem in problems:
        record = {"prompt": problem.prompt, "answer": problem.answer}
        if with_response:
            record["response"] = problem.response
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines), encoding="ascii")


def save_data(folder: Path, num_training: int, num_evaluation: int, digits: int, seed: int) -> None:
    """Write `train.jsonl` (with responses) and `evaluation.jsonl`, without a problem in common."""
    problems = additions(num_training + num_evaluation, digits, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_problems(folder / "train.jsonl", problems[num_evaluation:], with_response=True)
    save_problems(folder / "evaluation.jsonl", problems[:num_evaluation], with_response=False)
