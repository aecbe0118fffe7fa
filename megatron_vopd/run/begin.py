"""The beginning of a run: its parts built, its folder entered, an earlier start's state loaded.

Configuration and metrics of an earlier start are not changed before its checkpoint was loaded: a
start that is refused loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_vopd.collectives import StopFlag, all_ranks, rank_0
from megatron_vopd.config.schema import Config, LoggingSection, TeacherSection
from megatron_vopd.config.table import resolved_yaml
from megatron_vopd.files.teacher_states import StateCache
from megatron_vopd.hf.folder import fingerprint
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.run.build import Parts, build, sound_models
from megatron_vopd.run.checkpoints import RunCheckpoints
from megatron_vopd.run.engines import engines_of
from megatron_vopd.run.folder import step_dir
from megatron_vopd.run.identity import identity
from megatron_vopd.run.log import MetricsWriter
from megatron_vopd.run.run import MetricsSink, Run
from megatron_vopd.run.settings import evaluator_of
from megatron_vopd.run.start import Resume, enter_folder, record_config
from megatron_vopd.trainer import evaluation
from megatron_vopd.trainer.teacher_cache import text_digest, text_name
from megatron_vopd.types import Rollout


def begin(config: Config, device: str, stop: StopFlag | None = None) -> Run:
    """Make a run ready to train; no engine is started before the first push.

    Every rank of the world calls it with the same configuration.

    Args:
        device: "cpu" or "cuda", that of the world that `megatron.groups.init_world` joined.
        stop: a request to stop, which ends a step that is not finished.

    Raises:
        UserError: on every rank when one of them meets a mistake of the user.
    """
    models = sound_models(config, device)
    run_dir = Path(config.run.dir) / config.run.name
    with ExitStack() as stack:
        starts_engines = config.has_engines and config.rollout.engine == "local"
        engine_device = device if starts_engines else None
        known = (config.checkpoint.resume, engine_device, config.run.seed)
        resume = enter_folder(run_dir, *known, stack)
        student_dir = models["student"].path
        engines = engines_of(config, student_dir, run_dir, device)
        parts = build(config, models, device, engines, stack, stop, run_dir / "skipped")
        trainer, student = parts.trainer, parts.trainer.student
        teacher_dirs = {key: Path(models[key].path) for key in trainer.teachers}
        fingerprints = rank_0(
            lambda: {key: fingerprint(path) for key, path in teacher_dirs.items()}
        )
        given = parts.sources.given
        trainer.caches = open_caches(config.named_teachers, trainer.teachers, given, fingerprints)
        run = Run(config, run_dir, student_dir, student, trainer, parts.engine, parts.pusher, stack)
        same, keep = identity(config, student.facts, fingerprints), config.checkpoint.keep
        folders = (run_dir, Path(student_dir))
        run.checkpoints = RunCheckpoints(*folders, student, trainer, same, keep, run.say)
        _add_evaluator(run, parts)
        _load(run, resume)
        run.resources = stack.pop_all()
        return run


def _add_evaluator(run: Run, parts: Parts) -> None:
    """Set the run's evaluator, where it has problems to evaluate on."""
    if not parts.sources.problems:
        return
    config, settings = run.config, replace(run.trainer.settings, max_staleness=0)
    collector = parts.collector(settings, grader=parts.grader, push=parts.pusher)
    problems = {task: found.prompts for task, found in parts.sources.problems.items()}
    known = (settings.stop_ids, config.run.seed, config.train.steps)
    run.evaluator = evaluator_of(config.evaluation, problems, collector, *known)


def _load(run: Run, resume: Resume) -> None:
    """Load the checkpoint, if any, then record the configuration and open the metrics.

    Metrics of steps that will be repeated are cut off.
    """
    for remark in resume.remarks:
        run.say(f"note: {remark}")
    if resume.folder is not None:
        run.extra = run.checkpoints.load(resume.folder)
        run.say(f"resumed: step {resume.step}, from {resume.folder}")
        resume_evaluation(run)
    rank_0(record_config, run.run_dir, resolved_yaml(run.config))
    last_step = -1 if resume.folder is None else resume.step
    steps = run.config.train.steps
    writer = all_ranks(_writer, run.config.logging, run.run_dir, run.resources, steps, last_step)
    if writer is not None:
        # Engines that only evaluate have no metrics of a step.
        sources = (run.engine, run.pusher) if run.config.has_rollouts else (None, None)
        run.writer, run.trainer.sink = writer, MetricsSink(writer, *sources)


def resume_evaluation(run: Run) -> None:
    """Take the best evaluation from the checkpoint, where it can be compared with later ones."""
    evaluator, saved = run.evaluator, run.extra.get(evaluation.KEY)
    if evaluator is None or saved is None:
        return
    best = evaluation.best_of(run.extra)
    # The best needs its weights: those of its checkpoint, or at step 0 the student's as given.
    has_weights = rank_0(
        lambda: best is not None and (not best.step or step_dir(run.run_dir, best.step).is_dir())
    )
    remark = evaluator.load_state_dict(saved, has_weights)
    if remark:
        run.say(f"note: {remark}")
    run.extra[evaluation.KEY] = evaluator.state_dict()


def _writer(
    log: LoggingSection, run_dir: Path, stack: ExitStack, num_steps: int, last_step: int
) -> MetricsWriter | None:
    if dist.get_rank() != 0:
        return None
    known = (log.tensorboard, log.wandb, log.console, num_steps, last_step)
    return stack.enter_context(MetricsWriter(run_dir, *known))


def open_caches(
    sections: Mapping[str, TeacherSection],
    teachers: Mapping[str, Teacher],
    given: Sequence[Rollout],
    fingerprints: Mapping[str, str],
) -> dict[str, StateCache]:
    """Open the caches of teachers' hidden states that are configured (`teacher.cache_dir`).

    Every rank of the world calls it.

    Args:
        sections: configuration of each teacher, by its key.
        teachers: the loaded teachers, by key.
        given: all ready responses of the run, unshortened.
        fingerprints: hashes of the teachers' model folders, by key.

    Returns:
        Caches by key of the teacher.

    Raises:
        UserError: on every rank: a cache of another teacher or of changed texts, or a torn one.
    """
    found = {}
    for key, teacher in sorted(teachers.items()):
        texts = {text_name(r): text_digest(r) for r in given if r.prompt.teacher == key}
        folder = sections[key].cache_dir
        if folder is None or not texts:
            continue
        identity, dtype = {"teacher": fingerprints[key]}, teacher.received(0).dtype
        cache = StateCache(Path(folder), identity, teacher.facts.hidden_size, dtype)
        rank_0(cache.prepare, texts)
        all_ranks(cache.scan)
        found[key] = cache
    return found
