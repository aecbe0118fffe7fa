"""The output of `vopd check`: the resolved settings, the map of ranks, the memory table."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_vopd.config.schema import Config
from megatron_vopd.config.table import as_yaml
from megatron_vopd.preflight.checks import Findings
from megatron_vopd.preflight.memory import Kind, Machine, estimate
from megatron_vopd.preflight.table import largest_line, memory_lines, memory_notice
from megatron_vopd.types import Layout

MAX_RANKS_SHOWN = 64


def plain_console() -> Console:
    """Make a console of plain text that never cuts lines unless the output is a terminal."""
    is_terminal = sys.stdout.isatty()
    return Console(
        file=sys.stdout,
        markup=False,
        emoji=False,
        highlight=False,
        width=None if is_terminal else 10_000,
        force_terminal=is_terminal,
    )


def print_config(console: Console, config: Config) -> None:
    """Print one paragraph per section; settings that differ from the default are bold."""
    for section in type(config).model_fields:
        value = getattr(config, section)
        models = value if isinstance(value, dict) else {"": value}
        for name, model in models.items():
            if model is None:
                continue
            line = Text(f"{section}.{name}" if name else section, style="cyan")
            for key, field in type(model).model_fields.items():
                setting = getattr(model, key)
                changed = field.is_required() or setting != field.default
                line.append(f"  {key}=", style="default")
                line.append(as_yaml(setting), style="bold default" if changed else "default")
            console.print(line, soft_wrap=not console.is_terminal)


def print_ranks(console: Console, cuts: dict[str, Layout], num_ranks: int, reason: str) -> None:
    """Print a row per rank with its coordinates in every model's layout.

    Args:
        cuts: layouts by key of the model.
        reason: where `num_ranks` comes from, printed after it.
    """
    console.print(Text(f"\n{num_ranks} ranks ({reason})"))
    for key, layout in cuts.items():
        console.print(Text(f"{key}: {layout}"))
    axes = {
        key: [axis for axis in ("tp", "pp", "dp", "cp", "ep") if _is_shown(layout, axis)]
        for key, layout in cuts.items()
    }
    table = Table(box=None, pad_edge=False)
    table.add_column("rank", justify="right")
    for key in cuts:
        for axis in axes[key]:
            table.add_column(Text(f"{key} {axis}"), justify="right", no_wrap=True)
    for rank in range(min(num_ranks, MAX_RANKS_SHOWN)):
        row = [str(rank)]
        for key, layout in cuts.items():
            place = layout.coordinates(rank)
            row += [str(getattr(place, axis)) for axis in axes[key]]
        table.add_row(*row)
    console.print(table)
    if num_ranks > MAX_RANKS_SHOWN:
        console.print(Text(f"... and {num_ranks - MAX_RANKS_SHOWN} more ranks"))


def print_memory(console: Console, config: Config, findings: Findings, gpu_memory: float) -> None:
    """Print the memory that the largest ranks need, and a note if a GPU has less.

    Args:
        findings: layouts and models of `preflight`.
        gpu_memory: memory of one GPU, GB (10^9 bytes).
    """
    on_cpu = config.parallel.device == "cpu"
    kind: Kind = "cpu" if on_cpu else "local" if config.parallel.backend == "local" else "te"
    machine = Machine(kind, gpu_memory * 1e9)
    ranks = estimate(config, findings.facts, findings.cuts, machine)
    console.print(Text("\nestimated memory, GiB; < marks the phase of the peak"))
    for line in memory_lines(ranks):
        console.print(Text(line), soft_wrap=True)
    largest = max(ranks, key=lambda memory: memory.peak)
    if not on_cpu:
        console.print(Text(largest_line(largest, gpu_memory)), soft_wrap=True)
    if not on_cpu and largest.peak > machine.memory:
        notice = memory_notice(largest, gpu_memory)
        console.print(Text(f"note: {notice}"), soft_wrap=True)


def _is_shown(layout: Layout, axis: str) -> bool:
    return axis in ("tp", "pp", "dp") or getattr(layout, axis) > 1
