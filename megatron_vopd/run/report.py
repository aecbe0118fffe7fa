"""Report of a run in one HTML file: curves of its metrics as inline SVG, no other file loaded.

Colours follow the reader's light or dark setting; a pointer over a curve shows its values. Every
text that comes from the run is escaped.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vopd.errors import UserError
from megatron_vopd.files.atomic_file import replace
from megatron_vopd.files.metrics_file import METRICS_NAME, Recorded, read_metrics

REPORT_NAME = "report.html"
_MAX_POINTS, _MAX_HOVERS, _FEW_POINTS = 400, 100, 30
_WIDTH, _HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 26
_COLOURS = ("#3b6fd4", "#d1603d", "#3a9a6a", "#9457c9", "#b3842a", "#c2457f", "#4f9fb5", "#777777")

# What cannot be drawn: values beyond are left out, differences below count as none.
_LARGEST, _SMALLEST = 1e300, 1e-300

# Title, pattern of the metrics drawn together, unit.
_CHARTS: tuple[tuple[str, str, str], ...] = (
    ("Accuracy", r"eval/.+/(avg|pass)@\d+", "share of right answers"),
    ("Length in evaluation", r"eval/.+/length.*", "tokens"),
    ("KL to the teacher", r"kl/(reverse|forward)", "nats per token"),
    ("Entropy", r"entropy/(student|teacher)|curriculum/entropy", "nats per token"),
    ("Variance of advantage over reward", r"variance/.+", "ratio"),
    ("Advantage and reward", r"(advantage|reward)/(mean|std)", "nats"),
    ("Top-k", r"topk/.+|kl/topk.+", "mass, nats^2"),
    ("Response length", r"rollout/length.+|curriculum/max_response_tokens", "tokens"),
    ("How responses end", r"rollout/.+_frac|eval/.+/truncated_frac", "share of responses"),
    ("Engine against trainer", r"mismatch/.+", ""),
    ("Loss", r"loss/(?!num_).+", "per token"),
    ("Gradient norm", r"optim/grad_norm", ""),
    ("Learning rate", r"optim/lr", ""),
    ("Time per step", r"time/.+", "seconds"),
    ("Throughput", r"perf/tokens_per_second", "tokens per second"),
)


@dataclass(frozen=True)
class Curve:
    """A metric's points (step, value) that can be drawn, by ascending step."""

    name: str
    points: tuple[tuple[float, float], ...]


def curves(lines: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return all metrics by name, less those without a finite value."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and _is_finite(value):
                points.setdefault(name, []).append((line["step"], value))
    return [Curve(name, tuple(points[name])) for name in sorted(points)]


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_LARGEST < value < _LARGEST


def thinned(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """Keep at most `limit` points: the smallest and the largest value of each stretch, in order."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round values from at most `low` to at least `high`, about `count` of them."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-12 * size or size < _SMALLEST:
        pad = 0.1 * size if size > _SMALLEST else 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """Format a number for a reader: four significant digits, thousands with separators."""
    if abs(value) >= 1e4 and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    """The axes of one chart: they turn values into places in the drawing."""

    x_ticks: list[float]
    y_ticks: list[float]

    @classmethod
    def of(cls, drawn: Sequence[Curve]) -> _Frame:
        xs = [x for curve in drawn for x, _ in curve.points]
        ys = [y for curve in drawn for _, y in curve.points]
        return cls([min(xs), max(xs)], ticks(min(ys), max(ys)))

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        share = (value - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(frame: _Frame) -> Iterable[str]:
    for value in frame.y_ticks:
        y = f"{frame.y(value):.1f}"
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{number(value)}</text>'
    for value, anchor in zip(frame.x_ticks, ("start", "end"), strict=True):
        x = f"{frame.x(value):.1f}"
        yield f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">step {number(value)}</text>'


def _path(curve: Curve, frame: _Frame, colour: str) -> Iterable[str]:
    drawn = thinned(curve.points, _MAX_POINTS)
    line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in drawn)
    yield f'<polyline points="{line}" stroke="{colour}"/>'
    name = html.escape(curve.name)
    alone = ' class="alone"' if len(curve.points) <= _FEW_POINTS else ""
    for x, y in thinned(curve.points, _MAX_HOVERS):
        place = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" fill="{colour}"'
        title = f"<title>{name} at step {number(x)}: {number(y)}</title>"
        yield f"<circle{alone} {place}>{title}</circle>"


def chart(title: str, unit: str, drawn: Sequence[Curve]) -> str:
    """Draw a figure: one line per curve, a legend with last values, and points to hover over."""
    frame = _Frame.of(drawn)
    body = list(_axes(frame))
    legend = []
    for i, curve in enumerate(drawn):
        colour = _COLOURS[i % len(_COLOURS)]
        body += _path(curve, frame, colour)
        last = number(curve.points[-1][1])
        name = html.escape(curve.name)
        legend.append(f'<li><i style="background:{colour}"></i>{name} <b>{last}</b></li>')
    name = html.escape(title)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">'
    caption = f"<figcaption>{name} <span>{html.escape(unit)}</span></figcaption>"
    items = "".join(legend)
    return f"<figure>{caption}{svg}{''.join(body)}</svg><ul>{items}</ul></figure>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #6b6b6b; --line: #e2e2e2; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #9a9a9a; --line: #333; --paper: #161616 } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1060px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } p { color: var(--soft) }
main { display: grid; gap: 1.6rem; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)) }
figure { margin: 0; min-width: 0 } figcaption { font-weight: 600 }
figcaption span { font-weight: 400; color: var(--soft) }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: var(--soft) }
.grid { stroke: var(--line) } polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
circle { opacity: 0 } circle.alone, circle:hover { opacity: 1 }
ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.1rem;
  font-size: .85rem } ul i { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
pre { overflow: auto; border: 1px solid var(--line); padding: .8rem; font-size: .85rem }
"""


def report_html(name: str, recorded: Recorded, config_text: str | None) -> str:
    """Write the whole page as text.

    Args:
        name: of the run.
        config_text: resolved configuration; None: not shown.
    """
    lines = recorded.lines
    figures, left = [], curves(lines)
    for title, pattern, unit in _CHARTS:
        drawn = [curve for curve in left if re.fullmatch(pattern, curve.name)]
        left = [curve for curve in left if curve not in drawn]
        if drawn:
            figures.append(chart(title, unit, drawn))
    figures += [chart(curve.name, "", [curve]) for curve in left]
    steps = described(recorded)
    if recorded.is_torn:
        steps += "; the last line was torn and is left out"
    title = html.escape(name)
    settings = ""
    if config_text is not None:
        text = html.escape(config_text)
        settings = f"<details><summary>Configuration</summary><pre>{text}</pre></details>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{steps}</p>"
        f"<main>{''.join(figures)}</main>{settings}</body></html>\n"
    )


def described(recorded: Recorded) -> str:
    """Count the recorded steps, in words; the evaluation before the first is none."""
    steps = [line["step"] for line in recorded.lines if line["step"] > 0]
    if not steps:
        return "no step yet, but an evaluation before the first"
    return f"{len(steps)} recorded steps, {steps[0]} to {steps[-1]}"


def write_report(run_dir: Path) -> tuple[Path, Recorded]:
    """Write `run_dir/report.html` from its metrics.jsonl (and config.yaml, when there).

    Raises:
        UserError: no metrics, damaged metrics, or a folder that cannot be written.
    """
    recorded = read_metrics(run_dir / METRICS_NAME)
    if not recorded.lines:
        raise UserError(f"{run_dir / METRICS_NAME}: no recorded step; let the run complete one")
    try:
        config = run_dir / "config.yaml"
        text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; check the run folder") from None
    out = run_dir / REPORT_NAME
    replace(out, report_html(run_dir.resolve().name, recorded, text))
    return out, recorded
