"""A run from its configuration: every part built in the order in which the ranks need it.

Every rank calls `assemble` with the same configuration. Whatever is wrong on one rank is raised on
all of them as one UserError; process groups and models are made in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_vopd.collectives import StopFlag, all_ranks, from_all_ranks, rank_0
from megatron_vopd.config import Config
from megatron_vopd.config.method import CurriculumSection, ObjectiveSection
from megatron_vopd.config.schema import EvaluationSection, TeacherSection
from megatron_vopd.config.world import layouts
from megatron_vopd.curriculum import Curriculum, EntropyGatedLength, FixedLength, LinearLength
from megatron_vopd.data.grading import Grader
from megatron_vopd.data.prompts import PromptTokenizer
from megatron_vopd.data.sources import Sources, load_sources
from megatron_vopd.data.stop_ids import stop_ids
from megatron_vopd.errors import ConfigError, refusal, shown
from megatron_vopd.files.teacher_states import StateCache
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.hf.facts import ModelError
from megatron_vopd.hf.folder import fingerprint
from megatron_vopd.hf.hub import local_model_folder
from megatron_vopd.hf.mapping import LayerSpec
from megatron_vopd.megatron.groups import Groups, independent_groups, student_groups
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.megatron.student import Student, load_student
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.objectives import Objective, ObjectiveSettings
from megatron_vopd.preflight.checks import preflight
from megatron_vopd.rollout.engine import Engine, Sampling, step_seed
from megatron_vopd.run.checkpoints import RunCheckpoints
from megatron_vopd.run.engines import Pusher, make_run_engine, run_probe
from megatron_vopd.run.folder import step_dir
from megatron_vopd.run.log import MetricsWriter
from megatron_vopd.run.run import MetricsSink, Run, announce
from megatron_vopd.run.start import (
    Resume,
    begin,
    record_config,
    resolved_layer_spec,
    run_identity,
)
from megatron_vopd.trainer import evaluation
from megatron_vopd.trainer.collector import Grader as GradeRollout
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.evaluation import Evaluator
from megatron_vopd.trainer.settings import StepSettings
from megatron_vopd.trainer.teacher_cache import text_digest, text_name
from megatron_vopd.trainer.trainer import Trainer
from megatron_vopd.types import Prompt, Rollout

Model = TypeVar("Model")


def require_sound(config: Config) -> None:
    """Everything that `vopd check` would refuse, on this world; raises ConfigError."""
    findings = preflight(config, dist.get_world_size())
    if findings.problems:
        raise ConfigError(findings.problems)
    for notice in findings.notices:
        announce(config, f"note: {notice}")


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
    all_ranks(require_sound, config)
    run_dir = Path(config.run.dir) / config.run.name
    with ExitStack() as stack:
        resume = begin(run_dir, config, stack) if engine is None else Resume(None, 0, ())
        run = _assembled(config, device, engine, run_dir, stack, stop)
        if engine is None:
            _resume(run, resume)
        run.resources = stack.pop_all()
        return run


def _resume(run: Run, resume: Resume) -> None:
    """Load the checkpoint, then record: metrics of steps that will be repeated are cut off."""
    for remark in resume.remarks:
        run.say(f"note: {remark}")
    if resume.folder is not None:
        run.extra = run.checkpoints.load(resume.folder)
        run.say(f"resumed: step {resume.step}, from {resume.folder}")
        resume_evaluation(run)
    record_config(run.run_dir, run.config)
    last_step = -1 if resume.folder is None else resume.step
    writer = all_ranks(_writer, run.config, run.run_dir, run.resources, last_step)
    if writer is not None:
        # Engines that only evaluate have nothing to say of a step.
        sources = (run.engine, run.pusher) if run.config.has_rollouts else (None, None)
        run.writer, run.trainer.sink = writer, MetricsSink(writer, *sources)


def resume_evaluation(run: Run) -> None:
    """Take the best evaluation from the checkpoint, where it can be compared with later ones."""
    evaluator, saved = run.evaluator, run.extra.get(evaluation.KEY)
    if evaluator is None or saved is None:
        return
    best = evaluation.best_of(run.extra)
    # The best is only worth something with its weights, which are the start's before any step.
    has_weights = rank_0(
        lambda: best is not None and (not best.step or step_dir(run.run_dir, best.step).is_dir())
    )
    remark = evaluator.load_state_dict(saved, has_weights)
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
    student_dir = all_ranks(local_model_folder, config.student.path, "student.path")
    ends = all_ranks(stop_ids, config)
    settings = step_settings(config, ends, run_dir / "skipped" if stand_in is None else None)
    tokenizer = all_ranks(PromptTokenizer.of, config.student)
    # Before the models, which take longer: a mistake in the data is told soon.
    sources = _sources(config, tokenizer, ends, student_dir)
    student, teachers = _models(config, device, student_dir)
    vocab_size = min(model.facts.vocab_size for model in (student, *teachers.values()))
    engine, pusher = stand_in, None
    if (settings.num_asked or config.evaluates) and stand_in is None:
        engine = all_ranks(make_run_engine, config, student, student_dir, run_dir, device)
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
        problems = {task: found.prompts for task, found in sources.problems.items()}
        seed, last = config.run.seed, config.train.steps
        run.evaluator = evaluator_of(config.evaluation, problems, alone, ends, seed, last)
    folders, keep = (run_dir, Path(student_dir)), config.checkpoint.keep
    run.checkpoints = RunCheckpoints(*folders, student, trainer, identity, keep, run.say)
    return run


def evaluator_of(
    section: EvaluationSection,
    problems: Mapping[str, Sequence[Prompt]],
    collector: RolloutCollector,
    stop_ids: tuple[int, ...],
    seed: int,
    num_steps: int,
) -> Evaluator:
    """Make the evaluator that a configuration asks for.

    Args:
        problems: task -> its problems.
        collector: with a grader.
        stop_ids: ids that end a response.
        seed: of the run.
        num_steps: of the run.
    """
    sampling = Sampling(
        max_tokens=section.max_tokens,
        samples=section.samples,
        temperature=section.temperature,
        top_p=section.top_p,
        seed=step_seed(seed, "evaluation"),
        stop_ids=stop_ids,
    )
    return Evaluator(problems, collector, sampling, section.interval, section.k, num_steps)


def _models(config: Config, device: str, student_dir: str) -> tuple[Student, dict[str, Teacher]]:
    """The student, then the teachers in the order of the configuration, on every rank."""
    cuts = layouts(config, dist.get_world_size())
    spec: LayerSpec = all_ranks(resolved_layer_spec, config, device)
    announce(config, f"student: loading {config.student.path} ({cuts['student']})")
    groups = student_groups(cuts["student"], config.run.seed)
    options = ModelOptions(
        CONFIG_DTYPES[config.student.dtype].torch_dtype,
        device,
        spec,
        config.parallel.sequence_parallel,
        config.student.recompute,
    )

    def load() -> Student:
        return load_student(student_dir, groups, options, config.optimizer, config.train.steps)

    student = all_ranks(_loaded, "student", student_dir, load)
    teachers: dict[str, Teacher] = {}
    if config.scores_with_teacher:
        for key, section in config.named_teachers.items():
            announce(config, f"{key}: loading {section.path} ({cuts[key]})")
            own = independent_groups(cuts[key])
            teachers[key] = _teacher(key, section, own, student)
    return student, teachers


def _teacher(key: str, section: TeacherSection, groups: Groups, student: Student) -> Teacher:
    folder = all_ranks(local_model_folder, section.path, f"{key}.path")
    options = ModelOptions(
        CONFIG_DTYPES[section.dtype].torch_dtype,
        student.options.device,
        student.options.layer_spec,
        trained=False,
    )

    def load() -> Teacher:
        return Teacher(folder, groups, student.facts, student.groups, options, section.offload)

    return all_ranks(_loaded, key, folder, load)


def _loaded(key: str, folder: str, load: Callable[[], Model]) -> Model:
    """The model; what is wrong with its folder is told by the setting that names it."""
    try:
        return load()
    except ModelError as error:
        expected = "a model folder with all its weights"
        raise refusal(f"{key}.path", shown(folder), expected, str(error)) from None


def _sources(
    config: Config, tokenizer: PromptTokenizer, ends: tuple[int, ...], student_dir: str
) -> Sources:
    sources = all_ranks(load_sources, config, tokenizer, ends, student_dir)
    for line in sources.summary:
        announce(config, line)
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


def open_caches(
    config: Config, teachers: Mapping[str, Teacher], given: Sequence[Rollout]
) -> dict[str, StateCache]:
    """Caches by key of the teacher. Every rank of the world calls it.

    Args:
        given: all ready responses of the run, unshortened.

    Raises:
        UserError: on every rank, a folder of another teacher or of texts that changed, or torn.
    """
    found = {}
    for key in sorted(teachers):
        section = config.named_teachers[key]
        texts = {text_name(r): text_digest(r) for r in given if r.prompt.teacher == key}
        if section.cache_dir is None or not texts:
            continue
        folder, teacher = Path(section.cache_dir), teachers[key]
        path = all_ranks(lambda s=section, k=key: local_model_folder(s.path, f"{k}.path"))
        identity = from_all_ranks(
            lambda p=path: fingerprint(Path(p)) if dist.get_rank() == 0 else None
        )[0]
        states = teacher.received(0)
        cache = StateCache(
            folder, {"teacher": str(identity)}, teacher.facts.hidden_size, states.dtype
        )
        all_ranks(lambda c=cache, t=texts: c.prepare(t) if dist.get_rank() == 0 else None)
        all_ranks(cache.scan)
        found[key] = cache
    return found


def build_curriculum(section: CurriculumSection) -> Curriculum:
    """The curriculum that the configuration asks for."""
    if section.kind == "fixed":
        return FixedLength(section.ladder)
    if section.kind == "linear":
        return LinearLength(section.ladder, section.interval)
    return EntropyGatedLength(
        section.ladder,
        section.min_entropy,
        section.min_entropy_fraction,
        section.interval,
        section.ema,
    )


# (estimator, direction) -> key of objectives.OBJECTIVES. Other pairs are refused by config.rules.
_OBJECTIVE_NAMES = {
    ("sampled", "reverse"): "sampled",
    ("exact", "reverse"): "reverse",
    ("exact", "forward"): "forward",
    ("exact", "mixed"): "mixed",
    ("topk", "reverse"): "topk_reverse",
    ("hard", "reverse"): "hard",
}


def objective_of(section: ObjectiveSection, temperature: float = 1.0) -> Objective:
    """The objective that a configuration asks for.

    Args:
        temperature: of the rollouts, at which both models are compared.
    """
    settings = ObjectiveSettings(
        baseline=section.baseline,
        reverse_weight=section.reverse_weight,
        importance=section.importance,
        importance_cap=section.importance_cap,
        entropy_gate=section.entropy_gate,
        reward_floor=section.reward_floor,
    )
    name = _OBJECTIVE_NAMES[section.estimator, section.direction]
    return Objective(name, settings, section.topk, temperature)


def step_settings(
    config: Config, stop_ids: tuple[int, ...] = (), replay_dir: Path | None = None
) -> StepSettings:
    """Settings of a step from a whole configuration.

    Args:
        stop_ids: ids that end a response, from the models and `data.eos_contract`.
    """
    rollout, train = config.rollout, config.train
    return StepSettings(
        objective=objective_of(config.objective, rollout.temperature),
        num_prompts=rollout.num_prompts,
        samples_per_prompt=rollout.samples_per_prompt,
        prefix_fractions=config.objective.prefix_fractions,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        stop_ids=stop_ids,
        max_tokens_per_microbatch=train.max_tokens_per_microbatch,
        max_staleness=rollout.max_staleness,
        task_reward_weight=config.objective.task_reward_weight,
        spike_factor=train.spike_factor,
        max_consecutive_skips=train.max_consecutive_skips,
        deadline_seconds=rollout.deadline_seconds,
        seed=config.run.seed,
        replay_dir=replay_dir,
    )
