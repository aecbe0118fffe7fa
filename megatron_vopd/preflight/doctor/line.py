"""One line of the doctor's report, and what the lines are made from."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

State = Literal["ok", "note", "problem"]
MAX_TEXT = 240
UNTRIED = "not tried, because "


class Line(NamedTuple):
    """The finding about one part: `ok`, `note` (worth knowing), `problem` (does not work)."""

    state: State
    text: str

    @property
    def is_untried(self) -> bool:
        """True where another part has to be mended before this one can be looked at."""
        return self.text.startswith(UNTRIED)


@dataclass(frozen=True)
class Seen:
    """The question of an examination, and what the probes found.

    Attributes:
        on_gpu: asked for training on GPUs, else for tests and demo on a CPU.
        engine: `local`, if vLLM must be here; `server`, if it runs elsewhere.
        facts: by name of the probe; `error` in one says that it failed, and how; `skipped` names
            the package that must be mended first.
        environment: variables of this process.
    """

    on_gpu: bool
    engine: str
    facts: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, str]

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """Return the GPUs that torch can use."""
        return list(self.facts.get("torch", {}).get("gpus", []))


def ok(text: str) -> Line:
    """Return the line of a part that works."""
    return Line("ok", plain(text))


def note(text: str) -> Line:
    """Return the line of a part that works, with something worth knowing."""
    return Line("note", plain(text))


def problem(got: str, expected: str, remedy: str) -> Line:
    """Return the line of a part that does not work."""
    return Line("problem", f"got {plain(got)}, expected {expected}; {remedy}")


def plain(text: str, length: int = MAX_TEXT) -> str:
    """Return `text` on one line of ASCII of at most `length` characters."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode("ascii")
    return line if len(line) <= length else f"{line[: length - 3]}..."


def unless_broken(seen: Seen, name: str, remedy: str, check: Callable[[Any], Line]) -> Line:
    """Return `check` of the facts of probe `name`, or the line that says why there are none."""
    facts = seen.facts[name]
    if "skipped" in facts:
        return note(f"{UNTRIED}{facts['skipped']} does not work")
    if "error" in facts:
        return problem(facts["error"], "an import without an error", remedy)
    return check(facts)


def installed_version(*names: str) -> str | None:
    """Return the version of the first of these distributions that is installed; None: of none."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except Exception:  # absent, or its metadata cannot be read
            continue
    return None


def requirements(distribution: str, extra: str = "") -> dict[str, Any]:
    """Return by name the requirements that an installed distribution declares for this Python.

    Args:
        extra: those of this extra only; "": those without an extra.

    Returns:
        `packaging` requirements; none if the distribution or `packaging` is missing.
    """
    try:
        from packaging.requirements import Requirement

        declared = [Requirement(text) for text in importlib.metadata.requires(distribution) or []]
    except Exception:  # a broken `packaging`, or metadata that cannot be read
        return {}
    found = {}
    for one in declared:
        if one.marker is None:
            applies = not extra
        else:
            base = one.marker.evaluate({"extra": ""})
            applies = one.marker.evaluate({"extra": extra}) and base == (not extra)
        if applies:
            found[one.name.lower().replace("_", "-")] = one
    return found


def versioned(text: str, package: str, version: str, extra: str) -> Line:
    """Return the line of a package that works: a note if an extra here pins another version.

    Args:
        text: what the line says; the version that is pinned is added to it.
        package: normalised name in the extra.
        extra: `cpu`, `gpu` or `engine`.
    """
    pin = requirements("megatron_vopd", extra).get(package)
    if pin is None or pin.specifier.contains(version, prereleases=True):
        return ok(text)
    return note(f"{text}, tested with {str(pin.specifier).removeprefix('==')}")


def environment() -> dict[str, str]:
    """Return the variables of this process."""
    return dict(os.environ)
