"""The doctor's lines about the machine: cores, network, variables of ranks, memory, disk."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from megatron_vopd.preflight.doctor.line import Line, Seen, note, ok, problem

GIB = 2**30
# The demo was measured at 4.8 GiB; the others are floors below which nothing works.
MIN_MEMORY_GIB, MIN_SHM_GIB, MIN_DISK_GIB = 5.0, 1.0, 2.0
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def ranks_line(seen: Seen) -> Line:
    """Check the variables by which torchrun tells a rank its place."""
    given = {name: seen.environment[name] for name in RANK_VARIABLES if name in seen.environment}
    if not given:
        return ok("no rank's variables set; torchrun sets them")
    shown = ", ".join(f"{name}={text}" for name, text in given.items())
    remedy = f"unset {' '.join(given)}, or start by torchrun"
    numbers = {name: _natural(text) for name, text in given.items()}
    bad = [name for name, number in numbers.items() if number is None]
    if bad:
        return problem(shown, f"{' and '.join(bad)} to be a number >= 0", remedy)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        place, total = numbers.get(rank), numbers.get(size)
        if total == 0 or (place is not None and total is not None and place >= total):
            return problem(shown, f"{rank} below {size}", remedy)
    return note(f"{shown}: left over, unless torchrun started this")


def _natural(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def cores_line(seen: Seen) -> Line:
    """Check the cores that this process may use against the ranks of this machine."""
    cores, total = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    ranks = _natural(seen.environment.get("LOCAL_WORLD_SIZE", "")) or len(seen.gpus)
    text = f"{cores} of {total}"
    if seen.on_gpu and cores < ranks:
        remedy = "give srun --cpus-per-task and --cpu-bind=none, or look at taskset"
        return problem(f"{text} for {ranks} ranks", "a core for each rank", remedy)
    if cores < min(total, 2):
        return note(
            f"{text}: this process is bound (taskset, srun, container); ranks will share it"
        )
    return ok(text)


def network_line(seen: Seen) -> Line:
    """Check the interfaces that gloo and NCCL are asked to use, and this machine's own name."""
    facts = seen.facts["network"]
    if "error" in facts:
        return problem(facts["error"], "a list of interfaces", "look at `ip link`")
    there = list(facts["interfaces"])
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        asked = seen.environment.get(name, "")
        if asked and not _matches(name, asked, there):
            remedy = "set it to the one that reaches the other nodes, or unset it"
            return problem(f"{name}={asked}", f"one of {', '.join(there)}", remedy)
    host, address = facts["hostname"], facts["address"]
    if not address and "GLOO_SOCKET_IFNAME" not in seen.environment:
        remedy = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME (lo on one node)"
        return problem(f"hostname {host} without an address", "a name that resolves", remedy)
    text = f"{', '.join(there)}; {host} is {address or 'unknown'}"
    if seen.on_gpu and (address.startswith("127.") or address == "::1"):
        return note(f"{text}: several nodes need GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME")
    return ok(text)


def _matches(variable: str, asked: str, there: list[str]) -> bool:
    """Return whether one is left: gloo takes names; NCCL prefixes, `=name` or `^prefix`."""
    names = [name for name in asked.lstrip("=^").split(",") if name]
    if variable.startswith("GLOO") or asked.startswith("="):
        return any(name in there for name in names)
    found = [one for one in there if any(one.startswith(name) for name in names)]
    return len(found) < len(there) if asked.startswith("^") else bool(found)


def settings_line(seen: Seen) -> Line:
    """Check variables that change how CUDA's memory and queues behave."""
    if not seen.on_gpu:
        return ok("none that matter on a CPU")
    remarks = []
    known = seen.environment
    allocator = known.get("PYTORCH_CUDA_ALLOC_CONF", "") + known.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in allocator:
        remarks.append("with expandable_segments, pushes by CUDA IPC have not run on a GPU yet")
    if (connections := known.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")) != "1":
        text = f"CUDA_DEVICE_MAX_CONNECTIONS={connections}: unset it for tensor and context"
        remarks.append(f"{text} parallelism; the training command sets 1")
    return note("; ".join(remarks)) if remarks else ok("none that hinders training")


def memory_line(seen: Seen) -> Line:
    """Check the memory that is free here, within the limit of a container."""
    free = free_memory()
    if free is None:
        return note("unknown: no /proc/meminfo")
    text = f"{free / GIB:.1f} GiB free"
    if free < MIN_MEMORY_GIB * GIB:
        remedy = "end what uses it, or raise the container's limit"
        return problem(text, f"{MIN_MEMORY_GIB:.0f} GiB, which the demo needs", remedy)
    return ok(text)


def free_memory() -> int | None:
    """Return the bytes that processes can still take; None where the kernel does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    free = int(found[1]) * 1024 if found else None
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = (CGROUP / "memory.stat").read_text()
    except (OSError, ValueError):
        return free
    if limit == "max":
        return free
    # Pages of files that the kernel can drop are counted as used.
    cached = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
    left = int(limit) - used + (int(cached[1]) if cached else 0)
    return left if free is None else min(left, free)


def shm_line(seen: Seen) -> Line:
    """Check /dev/shm, through which the processes of vLLM, NCCL and gloo talk."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return problem(f"{error.strerror}: /dev/shm", "shared memory", "mount a tmpfs there")
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in /dev/shm"
    if usage.free < MIN_SHM_GIB * GIB:
        remedy = "start the container with --shm-size=16g or --ipc=host, or empty it"
        return problem(text, f"{MIN_SHM_GIB:.0f} GiB", remedy)
    return ok(text)


def disk_line(seen: Seen) -> Line:
    """Check the disks of the current folder and of temporary files."""
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    texts = []
    for name, folder in places.items():
        free = shutil.disk_usage(folder).free
        text = f"{free / GIB:.0f} GiB free {'for' if ' ' in name else ''} {name}".replace("  ", " ")
        if not os.access(folder, os.W_OK):
            return problem(
                f"{folder}, which cannot be written", "a folder to write in", "change it"
            )
        if free < MIN_DISK_GIB * GIB:
            remedy = "free some, or set TMPDIR" if " " in name else "free some, or set run.dir"
            return problem(f"{text} ({folder})", f"{MIN_DISK_GIB:.0f} GiB", remedy)
        texts.append(text)
    return ok(", ".join(texts))
