"""`vopd demo`: a small student learns additions from a small teacher, on real parts.

    data        worked-out additions; a tokenizer; two Qwen3 models with random weights
    teacher     learns from given responses (`hard`), two ranks
    start       so does the student; the first of its exports that has a part of the answers right
                is where distillation starts (how soon that is differs by seed)
    vopd        the student learns on its own samples: four ranks, student tp 2 x pp 2, teacher
                tp 2 x dp 2, vLLM, a push of the weights after every step
    opd         the same without the baseline, where a comparison is asked for
    check       vLLM started afresh on the exported student

Every run is the training command with a file of examples/arithmetic and the overrides of `_stage`.
A stage that is complete in the folder is not made again.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_vopd.data.grading import Grader
from megatron_vopd.demo.additions import (
    ALPHABET,
    additions,
    count_additions,
    longest_prompt_tokens,
    longest_response_tokens,
    save_data,
)
from megatron_vopd.demo.models import save_model, share_right
from megatron_vopd.demo.report import Bar, Results, save_plot, table
from megatron_vopd.demo.stages import Stage, StageError, configured_steps, exported_steps, run_stage
from megatron_vopd.errors import FAILED, INTERRUPTED, MISTAKE, OK, RunFailure, UserError
from megatron_vopd.rollout.vllm.fresh_sampler import greedy_texts
from megatron_vopd.run.folder import hf_dir
from megatron_vopd.run.launch import ONE_MACHINE, Launch
from megatron_vopd.types import Prompt

CONFIGS = Path(__file__).parents[2] / "examples" / "arithmetic"
SETTINGS_NAME, SIZES_NAME, RESULTS_NAME = "demo.json", "sizes.json", "results.json"
PLOT_NAME = "plot.png"

# Hidden size and layers. Heads have 32 elements, the fewest that vLLM's attention on a CPU takes.
TEACHER_SIZE, STUDENT_SIZE = (128, 4), (64, 4)
# Beyond the longest correct response, so that a wrong one may be longer.
SPARE_TOKENS = 2
# Where distillation starts: so many right, of so many problems that were not trained on.
START_BAR, NUM_START_PROBLEMS = 0.15, 200
# The probe of a push is 48 tokens, whatever the task.
MIN_CONTEXT = 128

_TITLES = {
    "teacher": "teacher: learns from given responses",
    "start": "start: the student learns from a few of them",
    "vopd": "vopd: the student learns on its own samples, scored by the teacher",
    "opd": "opd: the same from the same start, without the baseline",
}
_BASELINES = {"vopd": "full", "opd": "none"}

# What must hold in the end; shares of the evaluation's problems.
TEACHER_BAR, GAIN_BAR, STUDENT_BAR = 0.95, 0.40, 0.90
# Two greedy answers of equal weights may differ where two tokens are as likely to the last digit.
MAX_OFF_BY = 2


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and steps of a demo. A folder belongs to one set of them, but for `compare`.

    Attributes:
        digits: of the numbers added.
        teacher_steps, start_steps, steps: of the three kinds of run; None: as in their files.
        compare: distil without the baseline, too.
        models_only: make data, teacher and start, for runs of one's own; distil nothing.
    """

    out: Path
    seed: int = 0
    digits: int = 3
    num_training: int = 32000
    num_evaluation: int = 500
    teacher_steps: int | None = None
    start_steps: int | None = None
    steps: int | None = None
    compare: bool = False
    models_only: bool = False

    def identity(self) -> dict[str, Any]:
        """Return the settings that a folder belongs to, as JSON values."""
        how_much = ("out", "compare", "models_only")
        return {key: value for key, value in asdict(self).items() if key not in how_much}


def run_demo(settings: DemoSettings, fresh: bool = False) -> int:
    """Make everything under headings; returns the exit status: 0 only when every bar was met.

    Args:
        fresh: remove what an earlier demo left in the folder.
    """
    started = time.monotonic()
    try:
        _require_packages()
        count_additions(settings.num_training + settings.num_evaluation, settings.digits)
        _prepare(settings, fresh)
        _make_models(settings)
        if settings.models_only:
            print(f"\nteacher: {_stages(settings)['teacher'].export}")
            print(f"start:   {_start_dir(settings.out)}")
            return OK
        results = _distilled(settings)
    except UserError as error:
        print(error, file=sys.stderr)
        return MISTAKE
    except (StageError, RunFailure, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return INTERRUPTED
    print(f"\n{table(results)}\n")
    for bar in results.bars:
        print(f"{'ok      ' if bar.is_met else 'NOT MET '} {bar.text}")
    minutes = (time.monotonic() - started) / 60
    print(f"\n{minutes:.1f} minutes; {settings.out / PLOT_NAME}, {settings.out / RESULTS_NAME}")
    return OK if all(bar.is_met for bar in results.bars) else FAILED


def _require_packages() -> None:
    for package, remedy in (
        ("vllm", "run `make engine` (vLLM for CPU)"),
        ("matplotlib", "run `pip install matplotlib`"),
    ):
        if find_spec(package) is None:
            raise UserError(f"{package}: got nothing, expected it beside this package; {remedy}")
    if not CONFIGS.is_dir():
        raise UserError(
            f"{CONFIGS}: not there, expected the configurations of the demo; install the package "
            "from a clone with `pip install --no-build-isolation -e .`"
        )


def _prepare(settings: DemoSettings, fresh: bool) -> None:
    """Make or recognise the demo's folder; raises UserError for a folder that is not its own."""
    out, own = settings.out, settings.out / SETTINGS_NAME
    wanted = settings.identity()
    if own.is_file():
        if fresh:
            shutil.rmtree(out)
        elif (found := _read(own)) != wanted:
            keys = [key for key in wanted if found.get(key) != wanted[key]]
            other = ", ".join(f"{key}={found.get(key)}" for key in keys)
            expected = ", ".join(f"{key}={wanted[key]}" for key in keys)
            raise UserError(
                f"{own}: got a demo with {other}, expected {expected}; choose another --out, or "
                "start over with --fresh"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: got a folder that is not of a demo; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(wanted, indent=2) + "\n", encoding="ascii")
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}, expected a folder to write into; choose another "
            "--out"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def _make_models(settings: DemoSettings) -> None:
    """Make the data, the teacher, and the model from which distillation starts."""
    out, stages = settings.out, _stages(settings)
    _shown("data and models", lambda: _save_inputs(settings), (out / SIZES_NAME).is_file())
    for name in ("teacher", "start"):
        _show_run(name, stages[name])
    title, start = "start: where it has a part of the answers right", stages["start"]
    _shown(title, lambda: _choose_start(settings, start), _start_dir(out).is_dir())


def _distilled(settings: DemoSettings) -> Results:
    """Make and check the distillations; returns the results, which are also written and drawn."""
    out, stages = settings.out, _stages(settings)
    runs = {name: stages[name] for name in _BASELINES if name in stages}
    for name, stage in runs.items():
        _show_run(name, stage)
    export = stages["vopd"].export
    num_right = _shown("check: vLLM on the exported student", lambda: _fresh(settings, export))
    accuracies = {name: stage.accuracies() for name, stage in runs.items()}
    results = Results(
        seed=settings.seed,
        parameters=_read(out / SIZES_NAME),
        teacher=list(stages["teacher"].accuracies().values())[-1],
        accuracies=accuracies,
        fresh_vllm=num_right / settings.num_evaluation,
    )
    results.bars.extend(_bars(results, settings.num_evaluation))
    text = json.dumps(asdict(results), indent=2) + "\n"
    (out / RESULTS_NAME).write_text(text, encoding="ascii")
    save_plot({name: stage.run_dir for name, stage in runs.items()}, accuracies, out / PLOT_NAME)
    return results


def _show_run(name: str, stage: Stage) -> None:
    _shown(_TITLES[name], lambda: run_stage(stage), stage.is_done())


def _shown(title: str, action: Callable[[], Any], is_done: bool = False) -> Any:
    """Call `action` under a heading, unless it is done; returns its value."""
    print(f"\n== {title}", flush=True)
    if is_done:
        print("complete, from an earlier start", flush=True)
        return None
    started = time.monotonic()
    value = action()
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return value


def _save_inputs(settings: DemoSettings) -> None:
    """Write data, tokenizers and random models; the file with their sizes comes last."""
    out, seed, digits = settings.out, settings.seed, settings.digits
    save_data(out / "data", settings.num_training, settings.num_evaluation, digits, seed)
    context = max(MIN_CONTEXT, longest_prompt_tokens(digits) + _longest_response(digits))
    sizes = {"teacher": TEACHER_SIZE, "student": STUDENT_SIZE}
    found = {}
    for i, (name, size) in enumerate(sizes.items()):
        folder = out / "models" / name
        found[name] = save_model(folder, ALPHABET, 2 * seed + i, *size, context)
        print(f"{name}: Qwen3 with {found[name]:,} random parameters in {folder}")
    counts = f"{settings.num_training} problems to learn from, {settings.num_evaluation} held out"
    print(f"data: additions of {digits} digits, {counts}, for example")
    example = (out / "data" / "train.jsonl").read_text(encoding="ascii").partition("\n")[0]
    print(f"  {example}")
    (out / SIZES_NAME).write_text(json.dumps(found) + "\n", encoding="ascii")


def _start_dir(out: Path) -> Path:
    return out / "models" / "start"


def _choose_start(settings: DemoSettings, stage: Stage) -> None:
    """Copy the first export that meets START_BAR, or else the last one; whole or not at all."""
    out, num = settings.out, settings.num_evaluation
    problems = additions(settings.num_training + num, settings.digits, settings.seed)
    problems = problems[: min(num, NUM_START_PROBLEMS)]
    chosen = stage.export
    for step in sorted(exported_steps(stage.run_dir)):
        folder = hf_dir(stage.run_dir, step)
        share = share_right(folder, problems, _longest_response(settings.digits))
        print(f"after step {step}: {share:.1%} of {len(problems)} right", flush=True)
        if share >= START_BAR:
            chosen = folder
            break
    beside = _start_dir(out).with_suffix(".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(chosen, beside)
    beside.rename(_start_dir(out))


def _longest_response(digits: int) -> int:
    return longest_response_tokens(digits) + SPARE_TOKENS


def _stages(settings: DemoSettings) -> dict[str, Stage]:
    """Return name -> run, in the order in which they are made."""
    models = settings.out / "models"
    teacher = _stage(settings, "teacher", 2, settings.teacher_steps, models / "teacher")
    start = _stage(settings, "start", 2, settings.start_steps, models / "student")
    found = {"teacher": teacher, "start": start}
    for name, baseline in _BASELINES.items():
        if name == "opd" and not settings.compare:
            continue
        found[name] = _stage(
            settings,
            "distil",
            4,
            settings.steps,
            _start_dir(settings.out),
            name,
            f"objective.baseline={baseline}",
            f"teacher.path={teacher.export}",
        )
    return found


def _stage(
    settings: DemoSettings,
    name: str,
    num_ranks: int,
    steps: int | None,
    student: Path,
    run_name: str = "",
    *more: str,
) -> Stage:
    out, longest = settings.out.resolve(), _longest_response(settings.digits)
    overrides = [
        f"run.seed={settings.seed}",
        f"student.path={student.resolve()}",
        f"data.train={out / 'data' / 'train.jsonl'}",
        f"data.max_prompt_tokens={longest_prompt_tokens(settings.digits)}",
        f"curriculum.ladder=[{longest}]",
    ]
    if name != "distil":
        overrides.append(f"data.responses={out / 'data' / 'train.jsonl'}")
    if name != "start":
        overrides.append(f"data.evaluation={out / 'data' / 'evaluation.jsonl'}")
        overrides.append(f"evaluation.max_tokens={longest}")
    path = CONFIGS / f"{name}.yaml"
    if steps is None:
        steps = configured_steps(path)
    else:
        overrides.append(f"optimizer.warmup_steps={max(steps, 0) // 20}")
    overrides += [f"train.steps={steps}", *more]
    # Asked for: a demo needs one machine's settings, whatever its shell has for other runs.
    run_dir = out / (run_name or name)
    return Stage(Launch(path, tuple(overrides), num_ranks, run_dir, ONE_MACHINE), steps)


def _fresh(settings: DemoSettings, export: Path) -> int:
    """Count the problems that the exported student answers rightly in a fresh vLLM, by text."""
    path = settings.out / "data" / "evaluation.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    longest = _longest_response(settings.digits)
    texts = greedy_texts(
        export,
        [record["prompt"] for record in records],
        longest_prompt_tokens(settings.digits) + longest,
        longest,
        settings.out / "fresh_vllm.log",
    )
    with Grader() as grader:
        grades = [
            grader.grade(Prompt(str(i), (), record["answer"]), text)
            for i, (record, text) in enumerate(zip(records, texts, strict=True))
        ]
    return sum(grade > 0.5 for grade in grades)


def _bars(results: Results, num_problems: int) -> list[Bar]:
    before, after = results.before("vopd"), results.after("vopd")
    gain = after - before
    off_by = round(abs(results.fresh_vllm - after) * num_problems)
    return [
        Bar(
            f"the teacher has {results.teacher:.1%} right, at least {TEACHER_BAR:.0%}",
            results.teacher >= TEACHER_BAR,
        ),
        Bar(
            f"the student gained {100 * gain:.1f} points, at least {100 * GAIN_BAR:.0f}",
            gain >= GAIN_BAR,
        ),
        Bar(f"the student has {after:.1%} right, at least {STUDENT_BAR:.0%}", after >= STUDENT_BAR),
        Bar(
            f"its export in a fresh vLLM has {results.fresh_vllm:.1%} right: {off_by} of "
            f"{num_problems} more or fewer, at most {MAX_OFF_BY}",
            off_by <= MAX_OFF_BY,
        ),
    ]
