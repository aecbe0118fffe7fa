"""The final answer that a response claims, compared with the reference as text.

Letters, names and words are compared as text. (As mathematics, `Paris` would be a product of five
symbols, and equal to `Pairs`.)
"""

from __future__ import annotations

import re

_SAYS = re.compile(
    r"(?:final answer|correct answer|correct option|answer|correct choice)"
    r"(?:\s+is)?\s*[:=]?\s*\**\s*(?P<said>[^\n]+)",
    re.IGNORECASE,
)
_MATHEMATICS = re.compile(r"[0-9\\^_+*/=<>|]")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    """Return the content of the last complete \\boxed{...}, braces matched; None without one."""
    start = len(text)
    while (start := text.rfind("\\boxed{", 0, start)) >= 0:
        depth = 0
        for i in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : i]
    return None


def reference_of(answer: str) -> str:
    """Return what follows the last `####` of a reference that shows its work, else all of it."""
    return answer.rsplit("####", 1)[-1].strip()


def conclusion(response: str) -> str:
    """Return what follows the model's thinking; empty when the thinking did not end."""
    if "</think>" in response:
        return response.rsplit("</think>", 1)[-1].strip()
    return "" if "<think>" in response else response.strip()


def final_answer(text: str) -> str:
    """Return the last boxed expression of a conclusion; without one what follows the last
    "answer is"; without either the last line.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    said = [match["said"] for match in _SAYS.finditer(text)]
    if said:
        return said[-1]
    return text.splitlines()[-1] if text else ""


def normalised(text: str) -> str:
    """Return `text` without markup, emphasis and final full stop, case folded, spaces single.

    What may be mathematics stays: `.5`, `5!`, `f'`, `2**3`, `(1, 2)`.
    """
    text = _WRAPPED.sub(r"\1", text).replace("$", "")
    text = " ".join(text.split()).casefold().strip(" *").rstrip(" .,;:*")
    quoted = re.fullmatch(r"([\"'`])(.*)\1|\(([a-z])\)", text)
    return text if quoted is None else (quoted[2] or quoted[3] or "").strip()


def is_mathematical(answer: str) -> bool:
    """Return whether a reference is compared as mathematics where it differs as text."""
    return bool(_MATHEMATICS.search(answer))


def is_same_text(reference: str, text: str) -> bool:
    """Return whether a conclusion's final answer is the reference, but for case and markup."""
    said = final_answer(text)
    if normalised(said) == normalised(reference):
        return bool(normalised(reference))
    # Multiple choice: "B) Rome", "(B) Rome" or "B. Rome" for B.
    if re.fullmatch(r"\(?[A-Za-z]\)?", reference):
        letter = re.match(r"\(?([A-Za-z])[).:](?:\s|$)", said.strip(" $*"))
        return letter is not None and normalised(letter[1]) == normalised(reference)
    return False
