"""What ptxas makes of the CUDA kernels: registers, spills, blocks per SM, instructions a column.

Nothing runs: nvcc compiles for one architecture, nvdisasm lists the machine code, and the cost of a
column is read off the cheapest way around the loop that loads its columns by 16-byte vectors.
`python -m tests.support.sass` prints the table of docs/how/kernels.md, section 5; options after it
go to nvcc (`-DMEGATRON_VOPD_THREADS=512`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

ARCH = "sm_90"
# One SM of compute capability 9.0: limits of resident warps and blocks, the register file and its
# unit of allocation per warp, shared memory and what every block reserves of it.
SM_WARPS, SM_BLOCKS, SM_REGISTERS, REGISTER_UNIT = 64, 32, 65536, 256
SM_SHARED, BLOCK_SHARED = 228 * 1024, 1024
# Shared memory of a top-k at 151,936 columns: 4,096 candidates and a key per block of 256.
TOPK_SHARED = 4096 * 8 + (151_936 // 256 + 2) * 4


@dataclass(frozen=True)
class Loop:
    """What one turn of a main loop does: columns of a thread, and per column or block of them.

    Attributes:
        columns: of one thread in one turn.
        tensors: rows that are read.
        exponentials: of each column.
        reductions: over the warp, of each 8 columns of a thread.
        multiply_adds: of each column; None: whatever the cheapest way takes.
    """

    columns: int
    tensors: int
    exponentials: int
    reductions: int = 0
    multiply_adds: int | None = None


@dataclass(frozen=True)
class Kernel:
    """A kernel: its source, a piece of its mangled name, bytes of an element, and its loops."""

    source: str
    mangled: str
    element_size: int
    loops: dict[str, Loop]
    dynamic_shared: int = 0


def _kernels() -> dict[str, Kernel]:
    # Nine multiply-adds: the form of d^ for models that are close, one more than the other form.
    statistics = {"": Loop(16, 2, 2, multiply_adds=9)}
    with_keys = {"": Loop(16, 2, 2, reductions=1, multiply_adds=9)}
    result = {}
    for dtype, mangled, size in (("fp32", "f", 4), ("bf16", "13__nv_bfloat16", 2)):
        name = f"stats_kernelI{mangled}Lb"
        result[f"statistics {dtype}"] = Kernel("stats", f"{name}0", size, statistics)
        result[f"statistics and top-k {dtype}"] = Kernel(
            "stats", f"{name}1", size, with_keys, TOPK_SHARED
        )
    # Of the loops that read the teacher, both that need the second exponential.
    loops = {"policy": Loop(8, 1, 1), "reverse": Loop(8, 2, 1), "forward": Loop(8, 2, 2)}
    for dtype, mangled, size in (
        ("fp32", "ffE", 4),
        ("fp32 to bf16", "f13__nv_bfloat16", 4),
        ("bf16", "13__nv_bfloat16S", 2),
    ):
        name = f"gradient_kernelI{mangled}"
        result[f"gradient {dtype}"] = Kernel("gradient", name, size, loops)
    return result


KERNELS = _kernels()
# Ways with more exponentials are not followed: no loop has so many in one turn.
MOST_EXPONENTIALS = 32
# 16-byte loads, other loads, exponentials, reductions over the warp, multiply-adds, accesses of the
# stack.
Work = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Instruction:
    """One line of machine code, with the labels in front of it."""

    labels: tuple[str, ...]
    text: str

    @property
    def target(self) -> str | None:
        """Return the label that it branches to."""
        found = re.search(r"\bBRA\b.*`\((\S+)\)", self.text)
        return found[1] if found else None

    @property
    def falls_through(self) -> bool:
        """Return False where the next line is never executed after it."""
        return not re.match(r"(BRA `|EXIT|RET\b|RET\.)", self.text)


@dataclass(frozen=True)
class Figures:
    """One kernel: what it occupies, and instructions per column by loop.

    Attributes:
        spill_bytes: of the whole kernel; hot_spills: accesses of the stack in turns of main loops.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    per_column: dict[str, float]
    hot_spills: int

    def blocks_per_sm(self) -> int:
        """Return how many thread blocks fit on one SM, by registers, warps and shared memory."""
        warps = -(-self.threads // 32)
        unit = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        # Each quarter of the SM has its own registers, and whole warps.
        by_registers = 4 * (SM_REGISTERS // 4 // unit) // warps
        by_shared = SM_SHARED // (self.shared_bytes + BLOCK_SHARED)
        return min(by_registers, SM_WARPS // warps, by_shared, SM_BLOCKS)


def disassembler() -> str | None:
    """Return the path of nvdisasm: on PATH, in its own package, or in that of triton."""
    found = shutil.which("nvdisasm")
    if found is not None:
        return found
    packages = Path(sysconfig.get_path("purelib"))
    for pattern in ("nvidia/*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm"):
        for path in packages.glob(pattern):
            return str(path)
    return None


def missing() -> str | None:
    """Return why the machine code cannot be read here, else None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on this machine: the CUDA kernels are not compiled here"
    if disassembler() is None:
        return "nvdisasm is not on this machine: pip install nvidia-cuda-nvdisasm"
    return None


def parse(section: str) -> list[Instruction]:
    """Return the instructions of one `.text` section, without padding."""
    code, labels = [], []
    for line in section.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels.append(label[1])
            continue
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        if instruction and not instruction[1].startswith("NOP"):
            code.append(Instruction(tuple(labels), instruction[1]))
            labels = []
    return code


def _kind(instruction: Instruction) -> Work:
    """Return what one instruction is: 1 at its place in `Work`, or zeros."""
    text = instruction.text
    wide = re.search(r"\bLDG\.E\S*\.128\b", text) is not None
    other = not wide and re.search(r"\bLDG\b", text) is not None
    stack = re.search(r"\b(LDL|STL)\b", text) is not None
    exponential, reduction, fma = "MUFU.EX2" in text, "REDUX" in text, "FFMA" in text
    return int(wide), int(other), int(exponential), int(reduction), int(fma), int(stack)


def ways_around(code: list[Instruction], first: int, last: int) -> dict[Work, int]:
    """Return the fewest instructions from `first` to `last`, forwards, by what they do."""
    at = {label: i for i, line in enumerate(code) for label in line.labels}
    states: dict[int, dict[Work, int]] = {first: {(0, 0, 0, 0, 0, 0): 0}}
    for i in range(first, last + 1):
        here = states.pop(i, None)
        if here is None:
            continue
        a, b, c, d, e, f = _kind(code[i])
        done = {
            (k[0] + a, k[1] + b, k[2] + c, k[3] + d, k[4] + e, k[5] + f): n + 1
            for k, n in here.items()
        }
        if i == last:
            return done
        target = code[i].target
        following = [i + 1] if code[i].falls_through else []
        if target is not None and i < at.get(target, -1) <= last:
            following.append(at[target])
        for successor in following:
            there = states.setdefault(successor, {})
            for key, count in done.items():
                if key[2] > MOST_EXPONENTIALS:
                    continue
                there[key] = min(count, there.get(key, count))
    return {}


def turns(code: list[Instruction]) -> list[dict[Work, int]]:
    """Return the ways around every loop, by what they do."""
    at = {label: i for i, line in enumerate(code) for label in line.labels}
    loops = ((at.get(line.target or "", last + 1), last) for last, line in enumerate(code))
    return [ways_around(code, first, last) for first, last in loops if first <= last]


def main_loop(
    loops: list[dict[Work, int]], loop: Loop, element_size: int
) -> tuple[int, int] | None:
    """Return instructions and accesses of the stack in one turn of a main loop.

    The cheapest way around counts, over columns that all come in vectors: what an edge of the row
    or a change of references costs is left out. Of several loops that do the same, the dearest
    counts. None: there is no such loop.
    """
    loads = loop.columns * loop.tensors * element_size // 16
    exponentials, reductions = loop.exponentials * loop.columns, loop.reductions * loop.columns // 8
    found = []
    for ways in loops:
        fitting = [
            (count, work[5])
            for work, count in ways.items()
            if work[:4] == (loads, 0, exponentials, reductions)
            and loop.multiply_adds in (None, work[4] / loop.columns)
        ]
        found += [min(fitting)] if fitting else []
    return max(found, default=None)


def listings(flags: tuple[str, ...] = ()) -> dict[str, tuple[str, str]]:
    """Compile the kernels; by source, what ptxas says of them and their whole disassembly."""

    def compiled(source: str) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            binary = str(Path(folder) / "kernels.cubin")
            command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", *flags]
            command += [f"-arch={ARCH}", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin"]
            command += [str(ROOT / f"csrc/cuda/{source}.cu"), "-o", binary]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(run.stderr)
            listing = subprocess.run(
                [disassembler() or "", binary], capture_output=True, text=True, check=True
            )
        return run.stderr, listing.stdout

    sources = sorted({kernel.source for kernel in KERNELS.values()})
    with ThreadPoolExecutor() as pool:
        return dict(zip(sources, pool.map(compiled, sources), strict=True))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1], 0) if found else 0


def figures(flags: tuple[str, ...] = ()) -> dict[str, Figures]:
    """Return the figures of every kernel of the operator; needs nvcc and nvdisasm."""
    by_source = listings(flags)
    result = {}
    for name, kernel in KERNELS.items():
        report, listing = by_source[kernel.source]
        entry = rf"Compiling entry function '\S*{kernel.mangled}\S*'(.*?Used[^\n]*)"
        (said,) = re.findall(entry, report, re.DOTALL)
        sections = re.split(r"^\t\.section\t", listing, flags=re.MULTILINE)
        text, info = (
            next(part for part in sections if re.match(rf"{kind}\.\S*{kernel.mangled}", part))
            for kind in (r"\.text", r"\.nv\.info")
        )
        loops = turns(parse(text))
        found = {
            loop: main_loop(loops, does, kernel.element_size) for loop, does in kernel.loops.items()
        }
        result[name] = Figures(
            registers=_number(r"Used (\d+) registers", said),
            spill_bytes=_number(r"(\d+) bytes spill stores", said)
            + _number(r"(\d+) bytes spill loads", said),
            stack_bytes=_number(r"(\d+) bytes stack frame", said),
            shared_bytes=_number(r"(\d+) bytes smem", said) + kernel.dynamic_shared,
            threads=_number(r"EIATTR_MAX_THREADS(?:.*\n)+?.*\.word\s+(0x[0-9a-f]+)", info),
            per_column={
                loop: turn[0] / kernel.loops[loop].columns for loop, turn in found.items() if turn
            },
            hot_spills=sum(turn[1] for turn in found.values() if turn),
        )
    return result


def table(found: dict[str, Figures]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| kernel | threads | registers | spills (in the loop) | shared | blocks per SM (warps) "
        "| instructions a column |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, f in found.items():
        costs = ", ".join(f"{loop} {cost:.1f}".strip() for loop, cost in f.per_column.items())
        blocks = f.blocks_per_sm()
        lines.append(
            f"| {name} | {f.threads} | {f.registers} | {f.spill_bytes} B ({f.hot_spills}) "
            f"| {f.shared_bytes} B | {blocks} ({blocks * f.threads // 32}) | {costs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    reason = missing()
    if reason is not None:
        sys.exit(reason)
    print(table(figures(tuple(sys.argv[1:]))))
