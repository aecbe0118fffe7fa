"""The memory estimate as text: a row per part, a column per pipeline stage (its largest rank)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vopd.errors import Notice
from megatron_vopd.preflight.engine_memory import ASSUMED
from megatron_vopd.preflight.memory import RankMemory

GIB = 2**30
_DEFAULT_REMEDY = "raise parallel.tp or parallel.pp"
_REMEDIES = {
    "optimizer": "use more ranks with optimizer.distributed=true, or raise parallel.tp",
    "teacher weights": "raise teacher.tp or teacher.pp, or set teacher.offload=true",
    "activations": "lower train.max_tokens_per_microbatch, or set student.recompute=full",
    "hidden states": "lower rollout.num_prompts, or set teacher.offload=true",
    "engine": "lower rollout.memory_fraction",
    f"sleeping engine {ASSUMED}": "use rollout.engine=server",
    "NCCL chunks": "raise parallel.tp or parallel.pp",
}


def memory_lines(ranks: Sequence[RankMemory]) -> list[str]:
    """Format a table in GiB: one line per part that is not empty; `<` marks the peak's phase.

    Args:
        ranks: estimates of all ranks; a column shows the largest one of a pipeline stage.
    """
    columns = largest_by_stage(ranks)
    rows = [("pipeline stage", [f"{memory.place.pp}" for memory in columns])]
    rows.append(("its largest rank", [f"{memory.rank}" for memory in columns]))
    held = dict.fromkeys(name for memory in columns for name in memory.held)
    rows += [(name, [_gib(memory.held.get(name, 0)) for memory in columns]) for name in held]
    phases = dict.fromkeys(name for memory in columns for name in memory.phases)
    for phase in phases:
        parts = dict.fromkeys(
            part
            for memory in columns
            for part, size in memory.phases.get(phase, {}).items()
            if size
        )
        for part in parts:
            cells = [_cell(memory, phase, part) for memory in columns]
            rows.append((f"{phase}: {part}", cells))
    rows.append(("peak", [_gib(memory.peak) for memory in columns]))
    if any(memory.host for memory in columns):
        rows.append(("host memory", [_gib(memory.host) for memory in columns]))
    width = max(len(name) for name, _ in rows)
    return [name.ljust(width) + "".join(cell.rjust(10) for cell in cells) for name, cells in rows]


def largest_line(largest: RankMemory, gpu_memory: float) -> str:
    """Say how much of a GPU the largest rank needs, and what the estimate leaves out.

    Args:
        gpu_memory: memory of one GPU, GB (10^9 bytes).
    """
    parts = [part for phase in largest.phases.values() for part in phase]
    assumed = any(ASSUMED in part for part in parts)
    return (
        f"largest: rank {largest.rank}, {largest.peak / 1e9:.1f} of {gpu_memory:g} GB "
        f"({largest.worst_phase}); the trainer's CUDA context, NCCL's buffers and fragmentation "
        f"come on top{f'; {ASSUMED} is not yet measured on a GPU' if assumed else ''}"
    )


def memory_notice(largest: RankMemory, gpu_memory: float) -> Notice:
    """Return a notice that a rank needs too much, with the remedy for its largest part.

    Args:
        gpu_memory: memory of one GPU, GB (10^9 bytes).
    """
    parts = dict(largest.held) | dict(largest.phases[largest.worst_phase])
    part = max(parts, key=lambda name: parts[name])
    text = (
        f"rank {largest.rank} needs about {largest.peak / 1e9:.0f} GB of {gpu_memory:g}, most of "
        f"it for {part}; {_REMEDIES.get(part, _DEFAULT_REMEDY)}"
    )
    return Notice("memory", text)


def largest_by_stage(ranks: Sequence[RankMemory]) -> list[RankMemory]:
    """Return the largest rank of each pipeline stage of the student, the first among equals."""
    stages = sorted({memory.place.pp for memory in ranks})
    return [
        max((memory for memory in ranks if memory.place.pp == stage), key=lambda one: one.peak)
        for stage in stages
    ]


def _cell(memory: RankMemory, phase: str, part: str) -> str:
    size = memory.phases.get(phase, {}).get(part, 0.0)
    return _gib(size) + ("<" if phase == memory.worst_phase else " ")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
