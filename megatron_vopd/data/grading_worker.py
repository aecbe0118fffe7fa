"""A process that compares answers as mathematics, one JSON line in, one out.

It exists to be killed. An answer such as 9^(9^9) computes in C, where no Python signal handler gets
a word in, and takes all memory; math-verify's own time limit is such a handler, and works in a main
thread only. Here the alarm keeps its default action: the kernel ends the process at the deadline,
whatever it does, and `grading` starts another. The process also ends when its input does.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

_MEMORY_BYTES = 4 * 2**30


def is_equal(reference: str, response: str) -> bool:
    """Return whether math-verify finds the reference in the response."""
    from math_verify import parse, verify

    marked = reference if "$" in reference or "\\boxed" in reference else f"\\boxed{{{reference}}}"
    gold = parse(marked, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    said = parse(response, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return bool(gold) and bool(said) and verify(gold, said, timeout_seconds=None)


def main() -> None:
    """Serve until standard input ends; each line is [reference, response, seconds]."""
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    is_equal("1", "$1$")
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        reference, response, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            result = is_equal(reference, response)
        except (Exception, MemoryError, RecursionError):
            result = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
