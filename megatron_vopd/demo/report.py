"""Results of the demo: a table, and curves of its runs in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vopd.files.metrics_file import METRICS_NAME, read_metrics

_NAMES = {"vopd": "vOPD", "opd": "OPD"}
_COLOURS = {"vopd": "#3b6fd4", "opd": "#d1603d"}
# Metric, title, unit; the accuracy comes first and is not a metric of every step.
_CURVES = (
    ("kl/reverse", "KL to the teacher", "nats per token"),
    ("variance/advantage_over_reward", "Variance of advantage over reward", "ratio"),
    ("rollout/length_mean", "Response length", "tokens"),
)
# Curves of single steps are means over so many around each.
_WINDOW = 5


@dataclass(frozen=True)
class Bar:
    """A requirement that must hold, in words with the figures, and whether it does."""

    text: str
    is_met: bool


@dataclass(frozen=True)
class Results:
    """Figures of one demo; shares of right answers are 0 to 1.

    Attributes:
        parameters: model -> number.
        teacher: its share after training.
        accuracies: run -> step -> share; the first is that of the start.
        fresh_vllm: share of the exported vOPD student, sampled greedily by a fresh vLLM.
    """

    seed: int
    parameters: dict[str, int]
    teacher: float
    accuracies: dict[str, dict[int, float]]
    fresh_vllm: float
    bars: list[Bar] = field(default_factory=list)

    def before(self, run: str) -> float:
        return self.accuracies[run][min(self.accuracies[run])]

    def after(self, run: str) -> float:
        return self.accuracies[run][max(self.accuracies[run])]


def table(results: Results) -> str:
    """Format rows of model, parameters, share of right answers, and points gained."""
    teacher, student = results.parameters["teacher"], results.parameters["student"]
    rows = [
        ("model", "parameters", "right", "gain"),
        ("teacher", f"{teacher:,}", f"{results.teacher:.1%}", ""),
        ("student, start", f"{student:,}", f"{results.before('vopd'):.1%}", ""),
    ]
    for run in results.accuracies:
        after, before = results.after(run), results.before(run)
        gain = f"{100 * (after - before):+.1f}"
        rows.append((f"student, {_NAMES[run]}", f"{student:,}", f"{after:.1%}", gain))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip()
        for row in rows
    )


def smoothed(values: list[float], window: int = _WINDOW) -> list[float]:
    """Return means over up to `window` values around each."""
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in around]


def save_plot(
    run_dirs: Mapping[str, Path], accuracies: Mapping[str, Mapping[int, float]], path: Path
) -> None:
    """Draw a picture of accuracy, KL, variance ratio and length over steps, a line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes: Any = figure.subplots(2, 2)
    first, *others = axes.flat
    first.set_title("Right answers, greedy", fontsize=10)
    first.set_ylabel("%")
    for run, found in accuracies.items():
        shares = [100 * share for share in found.values()]
        style = {"color": _COLOURS[run], "label": _NAMES[run]}
        first.plot(list(found), shares, marker="o", markersize=3, **style)
    first.set_ylim(0, 100)
    first.legend(frameon=False, loc="lower right")
    for axis, (key, title, unit) in zip(others, _CURVES, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
        for run, folder in run_dirs.items():
            lines = read_metrics(folder / METRICS_NAME).lines
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            steps, values = [step for step, _ in points], [value for _, value in points]
            axis.plot(steps, smoothed(values), color=_COLOURS[run], linewidth=1.2)
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
