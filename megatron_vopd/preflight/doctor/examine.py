"""The doctor: probes in processes of their own, a line for each part, one exit status.

Nothing of this package but `errors` and nothing beyond the standard library is imported, so that it
works where torch, pydantic or the package itself is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vopd.errors import INTERRUPTED, MISTAKE, OK
from megatron_vopd.preflight.doctor import machine, packages
from megatron_vopd.preflight.doctor import probe as probes
from megatron_vopd.preflight.doctor.line import Line, Seen, environment, problem

PROBE_SECONDS = 120.0


class Row(NamedTuple):
    """A part: how it is judged, and the probes whose facts that takes."""

    judge: Callable[[Seen], Line]
    probes: tuple[str, ...] = ()


# In the order of the report; a broken part comes before those that it breaks.
ROWS: dict[str, Row] = {
    "python": Row(packages.python_line),
    "package": Row(packages.dependencies_line),
    "torch": Row(packages.torch_line, ("torch",)),
    "gpu": Row(packages.gpu_line, ("torch",)),
    "nccl": Row(packages.nccl_line, ("torch",)),
    "nvcc": Row(packages.nvcc_line, ("torch",)),
    "extension": Row(packages.extension_line, ("torch", "extension")),
    "te": Row(packages.te_line, ("torch", "transformer-engine", "megatron-core")),
    "apex": Row(packages.apex_line, ("apex",)),
    "megatron-core": Row(
        packages.megatron_line, ("torch", "megatron-core", "transformer-engine", "apex")
    ),
    "transformers": Row(packages.transformers_line, ("torch", "transformers")),
    "vllm": Row(packages.vllm_line, ("torch", "vllm")),
    "ranks": Row(machine.ranks_line),
    "cores": Row(machine.cores_line, ("torch",)),
    "network": Row(machine.network_line, ("network",)),
    "variables": Row(machine.settings_line),
    "memory": Row(machine.memory_line),
    "shm": Row(machine.shm_line),
    "disk": Row(machine.disk_line),
}
NEEDS_TORCH = ("extension", "megatron-core", "transformers", "transformer-engine", "vllm")


def probe(name: str, seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """Run a probe as a process; return its facts, or `error`: why it gave none.

    Args:
        name: key of `probe.PROBES`.
        seconds: deadline, after which the process is killed.
    """
    command = [sys.executable, "-P", "-W", "ignore", str(Path(probes.__file__)), name]
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        run = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds, env=quiet
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end of its import within {seconds:.0f} seconds"}
    except OSError as error:
        return {"error": f"{sys.executable}: {error.strerror}"}
    for line in reversed(run.stdout.decode(errors="replace").splitlines()):
        if line.startswith(probes.MARK):
            return json.loads(line.removeprefix(probes.MARK))
    signals = {-number: number.name for number in signal.Signals}
    ending = signals.get(run.returncode, f"status {run.returncode}")
    said = [line for line in run.stderr.decode(errors="replace").splitlines() if line.strip()]
    last_words = f": {said[-1]}" if said else ""
    return {"error": f"an import that ended the process with {ending}{last_words}"}


def seen_facts(rows: Collection[str]) -> dict[str, dict[str, Any]]:
    """Run the probes that `rows` need: torch's first, and the others only if it works."""
    wanted = {name for row in rows for name in ROWS[row].probes}
    facts = {"torch": probe("torch")} if "torch" in wanted else {}
    broken = "error" in facts.get("torch", {})
    later = sorted(wanted - {"torch"})
    skipped = [name for name in later if broken and name in NEEDS_TORCH]
    facts |= {name: {"skipped": "torch"} for name in skipped}
    tried = [name for name in later if name not in skipped]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        facts |= dict(zip(tried, pool.map(probe, tried), strict=True))
    return facts


def has_gpu() -> bool:
    """Return whether a driver shows a GPU of NVIDIA here."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def examine(target: str, engine: str, rows: Collection[str]) -> tuple[bool, dict[str, Line]]:
    """Check the parts `rows`; return whether it was for GPUs, and a line for each part.

    Args:
        target: `gpu`, `cpu`, or `auto`: gpu where a driver shows one.
        engine: `local` or `server`, as the setting `rollout.engine`.
        rows: keys of ROWS. The line of torch is added where its fault leaves one of them untried.
    """
    on_gpu = target == "gpu" or (target == "auto" and has_gpu())
    seen = Seen(on_gpu, engine, seen_facts(rows), environment())
    lines = {name: _judged(row, seen) for name, row in ROWS.items() if name in rows}
    if "torch" not in lines and any(line.is_untried for line in lines.values()):
        lines = {"torch": _judged(ROWS["torch"], seen), **lines}  # what kept them from being tried
    return on_gpu, lines


def _judged(row: Row, seen: Seen) -> Line:
    try:
        return row.judge(seen)
    except Exception as error:  # facts of a broken part may have any shape
        got = f"{type(error).__name__}: {error}"
        return problem(got, "facts that can be judged", "mend the parts above, then run it again")


def report(on_gpu: bool, lines: Mapping[str, Line]) -> str:
    """Return the report as text: a line for each part, then one that counts."""
    wide = max(map(len, lines))
    rows = [f"{line.state:8}{name:{wide}}  {line.text}" for name, line in lines.items()]
    bad = [name for name, line in lines.items() if line.state == "problem"]
    notes = sum(line.state == "note" for line in lines.values())
    what = "training on GPUs" if on_gpu else "tests and demo on a CPU"
    found = (
        f"{len(bad)} problem{'s' * (len(bad) != 1)} ({', '.join(bad)})" if bad else "no problems"
    )
    return "\n".join([*rows, f"for {what}: {found}, {notes} note{'s' * (notes != 1)}"])


_HELP = """\
Look at everything that a run needs on this machine, and print one line for each part: `ok`, `note`
(works, and is worth knowing) or `problem`, with what was found, what is expected and the remedy.
Packages are imported in processes of their own, so that one that crashes or hangs is a line too.
Nothing is started, downloaded or changed; 10 to 30 seconds.
Exit status: 0 no problems, 2 problems, 130 interrupted."""

_EXAMPLES = """\
examples:
  vopd doctor
  vopd doctor --for gpu --engine server
  vopd doctor --only torch,gpu,extension --json"""


def add_doctor(commands: Any) -> None:
    """Add `doctor` to the subcommands of `vopd`."""
    parser = commands.add_parser(
        "doctor",
        help="what of this installation does not work, and how to mend it",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=doctor, takes="vopd doctor takes options only (--help)")
    add = parser.add_argument
    add(
        "--for",
        dest="target",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="what the machine is for (default: gpu where a driver shows one, else cpu)",
    )
    add(
        "--engine",
        choices=("local", "server"),
        default="local",
        help="as rollout.engine: with server, vLLM need not be here (default: %(default)s)",
    )
    add(
        "--only",
        type=_rows,
        default=tuple(ROWS),
        metavar="PART[,PART]",
        help="these parts alone: " + ", ".join(ROWS),
    )
    add("--json", action="store_true", help="print JSON: target, status, and each part's line")


def _rows(text: str) -> tuple[str, ...]:
    """Parse names of parts; raises ArgumentTypeError, which names those that exist."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in ROWS:
            known = textwrap.shorten(", ".join(ROWS), 200)
            raise argparse.ArgumentTypeError(f"got {name[:40]!r}, expected some of {known}")
    return names


def doctor(options: argparse.Namespace) -> int:
    """Print the report and return the exit status: MISTAKE if there is a problem."""
    try:
        on_gpu, lines = examine(options.target, options.engine, options.only)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    status = MISTAKE if any(line.state == "problem" for line in lines.values()) else OK
    if options.json:
        parts = {name: line._asdict() for name, line in lines.items()}
        print(json.dumps({"for": "gpu" if on_gpu else "cpu", "status": status, "parts": parts}))
    else:
        print(report(on_gpu, lines))
    return status
