"""The parts of a run, built from its configuration in the order in which the ranks need them.

Every rank makes the same calls with the same configuration. Whatever is wrong on one rank is raised
on all of them as one UserError; process groups and models are made in the same order everywhere. No
run folder is made or touched here: a dry run builds the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_vopd.collectives import StopFlag, all_ranks
from megatron_vopd.config.schema import Config, TeacherSection
from megatron_vopd.config.world import layouts
from megatron_vopd.data.grading import Grader
from megatron_vopd.data.prompts import PromptTokenizer
from megatron_vopd.data.stop_ids import stop_ids as stop_ids_of
from megatron_vopd.errors import ConfigError, refusal, shown
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.hf.facts import ModelError
from megatron_vopd.hf.folder import ModelFolder
from megatron_vopd.hf.models import fetch_weights, read_models
from megatron_vopd.megatron.groups import Groups, independent_groups, student_groups
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.megatron.student import Student, load_student
from megatron_vopd.megatron.teacher import Teacher
from megatron_vopd.preflight.checks import preflight
from megatron_vopd.rollout.engine import Engine
from megatron_vopd.run.engines import EngineFactory, Pusher
from megatron_vopd.run.environment import machine_notices
from megatron_vopd.run.run import announce
from megatron_vopd.run.settings import build_curriculum, step_settings
from megatron_vopd.run.sources import Sources, load_sources
from megatron_vopd.run.start import resolved_layer_spec
from megatron_vopd.trainer.collector import Grader as GradeRollout
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.loss import require_kernels
from megatron_vopd.trainer.settings import StepSettings
from megatron_vopd.trainer.trainer import Trainer
from megatron_vopd.types import Rollout

Model = TypeVar("Model")


@dataclass(frozen=True)
class Parts:
    """Everything that a training step needs, before there is a run folder.

    Attributes:
        engine: the engine of this rank; None: it has none.
        pusher: gives the engines weights; None: the run has no engine.
        sources: where prompts and ready responses come from.
        grader: (rollout) -> its grade; called on the leaders.
        collector: (settings, prompts, responses, grader, push) -> a collector over the engines.
    """

    trainer: Trainer
    engine: Engine | None
    pusher: Pusher | None
    sources: Sources
    grader: GradeRollout
    collector: Callable[..., RolloutCollector]


def sound_models(config: Config, device: str) -> dict[str, ModelFolder]:
    """Read the run's models once, and check the configuration against them on this world.

    Every rank of the world calls it. A mistake that local folders show is refused before anything
    is downloaded from a hub.

    Args:
        device: "cpu" or "cuda", already resolved.

    Raises:
        ConfigError: on every rank, everything that `vopd check` would refuse.
    """

    def check() -> dict[str, ModelFolder]:
        world_size, paths = dist.get_world_size(), config.model_paths
        findings = preflight(config, world_size, device)
        if not findings.problems and findings.models.keys() != paths.keys():
            findings = preflight(config, world_size, device, read_models(paths, findings.models))
        if findings.problems:
            raise ConfigError(findings.problems)
        known = (device, config.parallel.tp, config.parallel.cp)
        for notice in [*findings.notices, *machine_notices(*known)]:
            announce(f"note: {notice}", config.logging.console)
        return findings.models

    return all_ranks(check)


def build(
    config: Config,
    models: Mapping[str, ModelFolder],
    device: str,
    engines: EngineFactory,
    stack: ExitStack,
    stop: StopFlag | None = None,
    replay_dir: Path | None = None,
) -> Parts:
    """Build everything that a training step needs. Every rank of the world calls it.

    Args:
        models: the run's models, as `sound_models` returns them.
        device: "cpu" or "cuda", already resolved.
        engines: makes this rank's engine (or a stand-in) and its pusher.
        stack: closes what was started.
        stop: a request to stop, which ends a step that is not finished.
        replay_dir: where batches of skipped steps are written; None: nowhere.

    Raises:
        UserError: on every rank when one of them meets a mistake of the user.
    """
    all_ranks(require_kernels, device)
    stop_ids = all_ranks(stop_ids_of, config.data.eos_contract, models)
    settings = step_settings(config, stop_ids, replay_dir)
    tokenizer = all_ranks(PromptTokenizer.of, models["student"].path, config.student)
    # Before the weights, which take longer: a mistake in the data is reported early.
    sources = all_ranks(load_sources, config, tokenizer, stop_ids, models)
    for line in sources.summary:
        announce(line, config.logging.console)
    all_ranks(fetch_weights, config.model_paths, models)
    student, teachers = _load_models(config, models, device)
    vocab_size = min(model.facts.vocab_size for model in (student, *teachers.values()))
    engine, pusher = all_ranks(engines, student, vocab_size)
    if engine is not None:
        stack.callback(engine.close)
    grader = _grader(tokenizer, stack)

    def collector(
        settings: StepSettings,
        prompts: Any = None,
        responses: Any = None,
        grader: GradeRollout | None = None,
        push: Pusher | None = None,
    ) -> RolloutCollector:
        known = (vocab_size, device, responses, grader, push, stop)
        return RolloutCollector(student.groups, engine, prompts, settings, *known)

    responses = collector(
        settings,
        sources.prompts.stream,
        sources.responses,
        grader if settings.task_reward_weight else None,
        pusher if config.has_rollouts else None,
    )
    curriculum, held_out = build_curriculum(config.curriculum), sources.prompts.held_out
    parts = (student, teachers, responses, curriculum, settings)
    trainer = Trainer(*parts, held_out=held_out, stop=stop)
    return Parts(trainer, engine, pusher, sources, grader, collector)


def _load_models(
    config: Config, models: Mapping[str, ModelFolder], device: str
) -> tuple[Student, dict[str, Teacher]]:
    """Load the student, then the teachers in the order of the configuration, on every rank."""
    cuts = layouts(config, dist.get_world_size())
    shown_paths, console = config.model_paths, config.logging.console
    spec = all_ranks(resolved_layer_spec, config.parallel.backend, device)
    options = ModelOptions(
        CONFIG_DTYPES[config.student.dtype].torch_dtype,
        device,
        spec,
        config.parallel.sequence_parallel,
        config.student.recompute,
    )
    announce(f"student: loading {shown_paths['student']} ({cuts['student']})", console)
    groups = student_groups(cuts["student"], config.run.seed)
    folder, steps = models["student"].path, config.train.steps
    load = (load_student, folder, groups, options, config.optimizer, steps)
    student = all_ranks(_loaded, "student", folder, *load)
    teachers: dict[str, Teacher] = {}
    for key, section in config.named_teachers.items():
        if key in models:
            announce(f"{key}: loading {shown_paths[key]} ({cuts[key]})", console)
            own = independent_groups(cuts[key])
            teachers[key] = _teacher(key, models[key].path, section, own, student)
    return student, teachers


def _teacher(
    key: str, folder: str, section: TeacherSection, groups: Groups, student: Student
) -> Teacher:
    known = student.options
    dtype = CONFIG_DTYPES[section.dtype].torch_dtype
    options = ModelOptions(dtype, known.device, known.layer_spec, trained=False)
    load = (folder, groups, student.facts, student.groups, options, section.offload)
    return all_ranks(_loaded, key, folder, Teacher, *load)


def _loaded(key: str, folder: str, load: Callable[..., Model], *args: Any) -> Model:
    """Load a model; refuse a broken folder by the setting that names it."""
    try:
        return load(*args)
    except ModelError as error:
        expected = "a model folder with all its weights"
        raise refusal(f"{key}.path", shown(folder), expected, str(error)) from None


def _grader(tokenizer: PromptTokenizer, stack: ExitStack) -> GradeRollout:
    """Return a function that grades a rollout; `stack` ends its process."""
    grader = stack.enter_context(Grader())

    def grade(rollout: Rollout) -> float:
        return grader.grade(rollout.prompt, tokenizer.decoded(rollout.response_ids))

    return grade
