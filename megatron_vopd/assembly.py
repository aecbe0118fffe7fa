"""A run from its configuration: every part built in the order in which the ranks need it.

Every rank calls `assemble` with the same configuration. Whatever is wrong on one rank is raised on
all of them as one UserError; process groups and models are made in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_vopd import evaluation
from megatron_vopd.collector import Grader as GradeRollout
from megatron_vopd.collector import RolloutCollector
from megatron_vopd.config import Config
from megatron_vopd.config.schema import TeacherSection
from megatron_vopd.config.world import layouts
from megatron_vopd.curriculum import build_curriculum
from megatron_vopd.data import PromptTokenizer
from megatron_vopd.evaluation import Evaluator
from megatron_vopd.grading import Grader
from megatron_vopd.hf_mapping import LayerSpec
from megatron_vopd.hub import local_model_folder
from megatron_vopd.model import ModelOptions
from megatron_vopd.model_facts import ModelError
from megatron_vopd.parallel import (
    Groups,
    in_step,
    in_step_all,
    independent_groups,
    student_groups,
)
from megatron_vopd.preflight import preflight
from megatron_vopd.problems import ConfigError, Problem, shown
from megatron_vopd.rollout.engine import Engine, Progress
from megatron_vopd.run_caches import open_caches
from megatron_vopd.run_checkpoint import RunCheckpoints
from megatron_vopd.run_engine import Pusher, make_run_engine, run_probe
from megatron_vopd.run_folder import step_dir
from megatron_vopd.run_log import MetricsWriter
from megatron_vopd.run_resume import Resume
from megatron_vopd.run_sources import Sources, load_sources
from megatron_vopd.run_start import begin, record_config, run_identity
from megatron_vopd.settings import StepSettings, step_settings
from megatron_vopd.stop_ids import stop_ids
from megatron_vopd.stopping import StopFlag
from megatron_vopd.student import Student, load_student
from megatron_vopd.teacher import Teacher
from megatron_vopd.trainer import Trainer
from megatron_vopd.types import Rollout

Model = TypeVar("Model")

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Ranks without an engine wait in a collective while a leader's engine starts (LocalSettings.
# start_seconds) or answers (rollout.deadline_seconds), and a while longer for a busy machine.
START_SECONDS, MARGIN_SECONDS = 600.0, 300.0


@dataclass
class Run:
    """A run that is ready to train. Close it on every rank.

    Attributes:
        pusher: gives the engines weights; None: the run needs no engine.
        evaluator: None: the run is not evaluated.
        extra: JSON values that are saved with each checkpoint and come back with a resume, the
            same on every rank; for what is not the trainer's, such as the best evaluation.
    """

    config: Config
    run_dir: Path
    student_dir: str
    student: Student
    trainer: Trainer
    engine: Engine | None
    pusher: Pusher | None
    resources: ExitStack
    evaluator: Evaluator | None = None
    writer: MetricsWriter | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    checkpoints: RunCheckpoints = field(init=False)

    def say(self, text: str) -> None:
        """A line for the reader, on the rank that has the terminal."""
        if self.writer is not None:
            self.writer.say(text)
        else:
            _announce(self.config, text)

    def progress(self, what: str) -> AbstractContextManager[Progress | None]:
        """A bar for the reader, on the rank that has the terminal."""
        return nullcontext() if self.writer is None else self.writer.progress(what)

    def close(self) -> None:
        """End the engine and everything else that was started."""
        self.resources.close()


@dataclass(frozen=True)
class _Sink:
    """Steps go to the writer together with what the engine and the last push say of themselves."""

    writer: MetricsWriter
    engine: Engine | None
    pusher: Pusher | None

    def record(self, step: int, values: dict[str, float]) -> None:
        known: dict[str, float] = {}
        if self.engine is not None and self.engine.generation is not None:
            known |= self.engine.generation.metrics()
        if self.pusher is not None and self.pusher.report is not None:
            known |= self.pusher.report.metrics()
        self.writer.record(step, known | values)

    def say(self, text: str) -> None:
        self.writer.say(text)


def longest_wait_seconds(config: Config) -> float:
    """After which a rank that waits for the others says that one is gone."""
    return max(config.rollout.deadline_seconds, START_SECONDS) + MARGIN_SECONDS


def _announce(config: Config, text: str) -> None:
    """A line of the start, before there is a writer; on a large model the next takes minutes."""
    if dist.get_rank() == 0 and config.logging.console:
        print(text, flush=True)


def resolved_device(config: Config) -> str:
    """cpu or cuda; what is asked for and missing is an error."""
    asked, has_gpu = config.parallel.device, torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        remedy = "set parallel.device=cpu"
        raise _refused("parallel.device", "cuda", "a GPU that torch can use", remedy)
    return asked if asked != "auto" else "cuda" if has_gpu else "cpu"


def resolved_layer_spec(config: Config, device: str) -> LayerSpec:
    """te or local; what is asked for and missing is an error."""
    has_te = device == "cuda" and find_spec("transformer_engine") is not None
    asked = config.parallel.backend
    if asked == "te" and not has_te:
        expected = "transformer_engine installed, and a GPU"
        raise _refused("parallel.backend", "te", expected, "set parallel.backend=local")
    if asked != "auto":
        return cast(LayerSpec, asked)
    return "te" if has_te else "local"


def require_sound(config: Config) -> None:
    """Everything that `vopd check` would refuse, on this world; raises ConfigError."""
    findings = preflight(config, dist.get_world_size())
    if findings.problems:
        raise ConfigError(findings.problems)
    for notice in findings.notices:
        _announce(config, f"note: {notice}")


def assemble(
    config: Config, device: str, engine: Engine | None = None, stop: StopFlag | None = None
) -> Run:
    """Everything that training needs; no engine is started before the first push.

    Args:
        device: of the world that was joined by `parallel.init_world`.
        engine: instead of the configured one, on leaders (dry run): it gets no weights.
        stop: a request to stop, which ends a step that is not finished.

    Raises:
        UserError: on every rank, what one of them cannot work with.
    """
    in_step(lambda: require_sound(config))
    run_dir = Path(config.run.dir) / config.run.name
    with ExitStack() as stack:
        resume = begin(run_dir, config, stack) if engine is None else Resume(None, 0, ())
        run = _assembled(config, device, engine, run_dir, stack, stop)
        if engine is None:
            _go_on(run, resume)
        run.resources = stack.pop_all()
        return run


def _go_on(run: Run, resume: Resume) -> None:
    """Load the checkpoint, then record: metrics of steps that will be repeated are cut off."""
    for remark in resume.remarks:
        run.say(f"note: {remark}")
    if resume.folder is not None:
        run.extra = run.checkpoints.load(resume.folder)
        run.say(f"resumed: step {resume.step}, from {resume.folder}")
        _go_on_evaluating(run)
    record_config(run.run_dir, run.config)
    last_step = -1 if resume.folder is None else resume.step
    writer = in_step(lambda: _writer(run.config, run.run_dir, run.resources, last_step))
    if writer is not None:
        # Engines that only evaluate have nothing to say of a step.
        sources = (run.engine, run.pusher) if run.config.has_rollouts else (None, None)
        run.writer, run.trainer.sink = writer, _Sink(writer, *sources)


def _go_on_evaluating(run: Run) -> None:
    """Take the best evaluation from the checkpoint, where it can be compared with later ones."""
    evaluator, saved = run.evaluator, run.extra.get(evaluation.KEY)
    if evaluator is None or saved is None:
        return
    best = evaluation.best_of(run.extra)
    # The best is only worth something with its weights, which are the start's before any step.
    found = best is not None and (not best.step or step_dir(run.run_dir, best.step).is_dir())
    remark = evaluator.load_state_dict(saved, in_step_all(lambda: found)[0])
    if remark:
        run.say(f"note: {remark}")
    run.extra[evaluation.KEY] = evaluator.state_dict()


def _assembled(
    config: Config,
    device: str,
    stand_in: Engine | None,
    run_dir: Path,
    stack: ExitStack,
    stop: StopFlag | None,
) -> Run:
    student_dir = in_step(lambda: local_model_folder(config.student.path, "student.path"))
    ends = in_step(lambda: stop_ids(config))
    settings = step_settings(config, ends, run_dir / "skipped" if stand_in is None else None)
    tokenizer = in_step(lambda: PromptTokenizer.of(config.student))
    # Before the models, which take longer: a mistake in the data is told soon.
    sources = _sources(config, tokenizer, ends, student_dir)
    student, teachers = _models(config, device, student_dir)
    vocab_size = min(model.facts.vocab_size for model in (student, *teachers.values()))
    engine, pusher = stand_in, None
    if (settings.num_asked or config.evaluates) and stand_in is None:
        engine = in_step(lambda: make_run_engine(config, student, student_dir, run_dir, device))
        if engine is not None:
            stack.callback(engine.close)
        longest = config.train.max_tokens_per_microbatch
        pusher = Pusher(student, engine, run_probe(config, vocab_size), longest)
    grader = _grader(tokenizer, stack)

    def collector(
        prompts: Any, settings: StepSettings, responses: Any, grader: Any, pusher: Any
    ) -> RolloutCollector:
        known = (vocab_size, device, responses, grader, pusher, stop)
        return RolloutCollector(student.groups, engine, prompts, settings, *known)

    trainer = Trainer(
        student,
        teachers,
        collector(
            sources.prompts.stream,
            settings,
            sources.responses,
            grader if settings.task_reward_weight else None,
            pusher if config.has_rollouts else None,
        ),
        build_curriculum(config.curriculum),
        settings,
        held_out=sources.prompts.held_out,
        stop=stop,
        caches=open_caches(config, teachers, sources.given) if stand_in is None else None,
    )
    identity = run_identity(config, student.facts) if stand_in is None else {}
    run = Run(config, run_dir, student_dir, student, trainer, engine, pusher, stack)
    if sources.problems and stand_in is None:
        alone = collector(None, replace(settings, max_staleness=0), None, grader, pusher)
        run.evaluator = _evaluator(config, sources, alone, ends)
    folders, keep = (run_dir, Path(student_dir)), config.checkpoint.keep
    run.checkpoints = RunCheckpoints(*folders, student, trainer, identity, keep, run.say)
    return run


def _evaluator(
    config: Config, sources: Sources, collector: RolloutCollector, ends: tuple[int, ...]
) -> Evaluator:
    problems = {task: found.prompts for task, found in sources.problems.items()}
    last = config.train.steps
    return Evaluator(config.evaluation, problems, collector, ends, config.run.seed, last)


def _refused(key: str, got: str, expected: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(key, got, expected, remedy)])


def _models(config: Config, device: str, student_dir: str) -> tuple[Student, dict[str, Teacher]]:
    """The student, then the teachers in the order of the configuration, on every rank."""
    cuts = layouts(config, dist.get_world_size())
    spec: LayerSpec = in_step(lambda: resolved_layer_spec(config, device))
    _announce(config, f"student: loading {config.student.path} ({cuts['student']})")
    groups = student_groups(cuts["student"], config.run.seed)
    options = ModelOptions(
        _DTYPES[config.student.dtype],
        device,
        spec,
        config.parallel.sequence_parallel,
        config.student.recompute,
    )

    def load() -> Student:
        return load_student(student_dir, groups, options, config.optimizer, config.train.steps)

    student = in_step(lambda: _loaded("student", student_dir, load))
    teachers: dict[str, Teacher] = {}
    if config.scores_with_teacher:
        for key, section in config.named_teachers.items():
            _announce(config, f"{key}: loading {section.path} ({cuts[key]})")
            own = independent_groups(cuts[key])
            teachers[key] = _teacher(key, section, own, student)
    return student, teachers


def _teacher(key: str, section: TeacherSection, groups: Groups, student: Student) -> Teacher:
    folder = in_step(lambda: local_model_folder(section.path, f"{key}.path"))
    options = ModelOptions(
        _DTYPES[section.dtype], student.options.device, student.options.layer_spec, trained=False
    )

    def load() -> Teacher:
        return Teacher(folder, groups, student.facts, student.groups, options, section.offload)

    return in_step(lambda: _loaded(key, folder, load))


def _loaded(key: str, folder: str, load: Callable[[], Model]) -> Model:
    """The model; what is wrong with its folder is told by the setting that names it."""
    try:
        return load()
    except ModelError as error:
        expected = "a model folder with all its weights"
        raise _refused(f"{key}.path", shown(folder), expected, str(error)) from None


def _sources(
    config: Config, tokenizer: PromptTokenizer, ends: tuple[int, ...], student_dir: str
) -> Sources:
    sources = in_step(lambda: load_sources(config, tokenizer, ends, student_dir))
    for line in sources.summary:
        _announce(config, line)
    return sources


def _grader(tokenizer: PromptTokenizer, stack: ExitStack) -> GradeRollout:
    grader = stack.enter_context(Grader())

    def grade(rollout: Rollout) -> float:
        return grader.grade(rollout.prompt, tokenizer.decoded(rollout.response_ids))

    return grade


def _writer(
    config: Config, run_dir: Path, stack: ExitStack, last_step: int
) -> MetricsWriter | None:
    if dist.get_rank() != 0:
        return None
    log = config.logging
    writer = MetricsWriter(
        run_dir, log.tensorboard, log.wandb, log.console, config.train.steps, last_step
    )
    return stack.enter_context(writer)
