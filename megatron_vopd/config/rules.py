"""Conditions between settings: `problems(config)` returns every violation.

A rule is one small generator in the tuple at the end. Conditions on the number of ranks are in
`world`, conditions on files in `paths`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from urllib.parse import urlsplit

from megatron_vopd.config.method import (
    ESTIMATORS,
    TOPK_BASELINES,
    WEIGHTS,
    ObjectiveSection,
    estimators_with,
)
from megatron_vopd.config.paths import path_problems
from megatron_vopd.config.schema import Config
from megatron_vopd.errors import Problem, shown
from megatron_vopd.types import sequence_multiple


def _sampling(config: Config) -> Iterator[Problem]:
    objective, rollout = config.objective, config.rollout
    on_policy = "student" in objective.prefix_fractions
    if not objective.traits.has_advantage or not on_policy or objective.allow_biased_sampling:
        return
    for name in ("temperature", "top_p"):
        value = getattr(rollout, name)
        if value != 1:
            yield Problem(
                f"rollout.{name}",
                f"{value:g}",
                f"1, because objective.estimator={objective.estimator} is biased otherwise",
                f"set rollout.{name}=1, or accept it by objective.allow_biased_sampling=true",
                ("objective.estimator", "objective.prefix", "objective.allow_biased_sampling"),
            )


def _topk(config: Config) -> Iterator[Problem]:
    objective = config.objective
    has_baseline = objective.traits.has_advantage
    if has_baseline and objective.baseline in TOPK_BASELINES and objective.topk == 0:
        yield Problem(
            "objective.topk",
            "0",
            f"1 to 1024 for objective.baseline={objective.baseline}",
            "set objective.topk=100, the paper's value",
            ("objective.baseline", "objective.estimator"),
        )
    if objective.traits.needs_topk and objective.topk < 2:
        yield Problem(
            "objective.topk",
            str(objective.topk),
            f"2 to 1024 for objective.estimator={objective.estimator} "
            "(one renormalised entry has no gradient)",
            "set objective.topk=100",
            ("objective.estimator",),
        )


def _direction(config: Config) -> Iterator[Problem]:
    objective = config.objective
    involves = ("objective.estimator", "objective.direction")
    known, direction = list(objective.traits.objectives), objective.direction
    if direction not in known:
        other = next(name for name, row in ESTIMATORS.items() if direction in row.objectives)
        yield Problem(
            "objective.direction",
            direction,
            f"{' or '.join(known)} for objective.estimator={objective.estimator}",
            f"set objective.estimator={other}, or objective.direction={known[0]}",
            involves,
        )
    for key, reader in WEIGHTS.items():
        weight, default = getattr(objective, key), ObjectiveSection.model_fields[key].default
        if weight != default and (objective.estimator, objective.direction) != reader:
            yield Problem(
                f"objective.{key}",
                f"{weight:g}",
                f"no weight unless objective.estimator={reader[0]} and "
                f"objective.direction={reader[1]}",
                f"set both, or remove objective.{key}",
                involves,
            )


def _reward(config: Config) -> Iterator[Problem]:
    objective, sampled = config.objective, estimators_with("has_advantage")
    plain_opd = objective.traits.has_advantage and objective.baseline == "none"
    if objective.reward_floor is not None and not plain_opd:
        yield Problem(
            "objective.reward_floor",
            f"{objective.reward_floor:g}",
            f"null unless objective.estimator={sampled} and objective.baseline=none (plain OPD)",
            "set objective.baseline=none, or remove objective.reward_floor",
            ("objective.estimator", "objective.baseline"),
        )
    if objective.task_reward_weight == 0:
        return
    involves = ("objective.estimator", "objective.prefix", "rollout.samples_per_prompt")
    got = f"{objective.task_reward_weight:g}"
    if not objective.traits.has_advantage or "student" not in objective.prefix_fractions:
        yield Problem(
            "objective.task_reward_weight",
            got,
            f"0 unless objective.estimator={sampled} with rollouts of the student",
            "set objective.task_reward_weight=0",
            involves,
        )
    elif config.rollout.samples_per_prompt < 2:
        yield Problem(
            "objective.task_reward_weight",
            got,
            "0 with one response per prompt (a group of one has no relative reward)",
            "set rollout.samples_per_prompt=2 or more",
            involves,
        )


def _prefix(config: Config) -> Iterator[Problem]:
    objective, data = config.objective, config.data
    sources = objective.prefix_fractions
    if not objective.traits.needs_teacher and "student" in sources:
        yield Problem(
            "objective.prefix",
            shown(objective.prefix),
            f"teacher or dataset for objective.estimator={objective.estimator}, which learns given "
            "responses",
            "set objective.prefix=dataset and data.responses",
            ("objective.estimator",),
        )
    ready = [source for source in sources if source != "student"]
    if ready and data.responses is None:
        yield Problem(
            "data.responses",
            "nothing",
            f"responses for objective.prefix={ready[0]}",
            "set data.responses to the path of the responses, or objective.prefix=student",
            ("objective.prefix",),
        )
    if "student" in sources and data.train is None:
        yield Problem(
            "data.train",
            "nothing",
            "prompts for rollouts of the student",
            "set data.train to a path or hub id",
            ("objective.prefix",),
        )


def _teachers(config: Config) -> Iterator[Problem]:
    both = config.teacher is not None and bool(config.teachers)
    involves = ("teachers", "objective.estimator")
    if both:
        yield Problem(
            "teacher",
            "a teacher and teachers",
            "exactly one of the two sections",
            "move the single teacher into teachers, or remove one section",
            involves,
        )
    elif config.scores_with_teacher and not config.named_teachers:
        yield Problem(
            "teacher.path",
            "no teacher",
            "teacher or teachers",
            "set teacher.path to a local folder or hub id",
            involves,
        )
    for name in config.teachers:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            yield Problem(
                "teachers",
                f"the name {shown(name)}",
                "letters, digits, '_' and '-'",
                "rename it, here and in the data",
            )
    if (
        len(config.teachers) > 1
        and config.scores_with_teacher
        and config.data.teacher_field is None
    ):
        yield Problem(
            "data.teacher_field",
            "nothing",
            f"the field that names one of {', '.join(sorted(config.teachers))}",
            "set data.teacher_field",
            involves,
        )


def _curriculum(config: Config) -> Iterator[Problem]:
    curriculum = config.curriculum
    ladder = curriculum.ladder
    if any(low >= high for low, high in pairwise(ladder)):
        yield Problem(
            "curriculum.ladder",
            str(list(ladder[:20])),
            "lengths in ascending order, none twice",
            f"write {sorted(set(ladder))[:20]}",
        )
    if curriculum.min_entropy is not None and curriculum.min_entropy_fraction is not None:
        yield Problem(
            "curriculum.min_entropy",
            f"{curriculum.min_entropy:g} beside min_entropy_fraction",
            "one of the two",
            "remove curriculum.min_entropy or curriculum.min_entropy_fraction",
            ("curriculum.min_entropy_fraction",),
        )
    if curriculum.kind == "entropy_gated" and "student" not in config.objective.prefix_fractions:
        yield Problem(
            "curriculum.kind",
            "entropy_gated",
            "fixed or linear without rollouts: the entropy is that of the student's own responses",
            "set curriculum.kind=fixed, or give objective.prefix a share of student",
            ("objective.prefix",),
        )
    longest = config.data.max_prompt_tokens + max(ladder)
    if longest > config.max_sequence_tokens:
        multiple = sequence_multiple(config.parallel.cp)
        needed = longest + -longest % multiple
        filled = f", a multiple of {multiple} for parallel.cp" if multiple > 1 else ""
        yield Problem(
            "train.max_tokens_per_microbatch",
            str(config.train.max_tokens_per_microbatch),
            f">= {needed} (data.max_prompt_tokens {config.data.max_prompt_tokens} + longest "
            f"response {max(ladder)}{filled}), since a sequence is never split between rows",
            f"set train.max_tokens_per_microbatch={needed}, or shorten prompts or the ladder",
            ("curriculum.ladder", "data.max_prompt_tokens", "parallel.cp"),
        )


def _rollout(config: Config) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.engine == "server" and not rollout.urls:
        yield Problem(
            "rollout.urls",
            "no URLs",
            "at least one for rollout.engine=server",
            "set rollout.urls=[http://127.0.0.1:8000]",
            ("rollout.engine",),
        )
    if rollout.engine == "local" and rollout.urls:
        yield Problem(
            "rollout.urls",
            shown(list(rollout.urls)),
            "no URLs for rollout.engine=local",
            "remove rollout.urls, or set rollout.engine=server",
            ("rollout.engine",),
        )
    if twice := [url for i, url in enumerate(rollout.urls) if url in rollout.urls[:i]]:
        expected, remedy = "each server once", "correct the port, or remove one of them"
        yield Problem("rollout.urls", f"{shown(twice[0])} twice", expected, remedy)
    for url in rollout.urls:
        if not _is_server_url(url):
            yield Problem(
                "rollout.urls",
                shown(url),
                "http://host:port or https://host:port",
                "write for example http://127.0.0.1:8000",
            )
        elif rollout.engine == "server" and not (rollout.allow_remote or _is_loopback(url)):
            yield Problem(
                "rollout.urls",
                shown(url),
                "a server on this host: whoever reaches its port can replace the model",
                "close that network to everybody else, then set rollout.allow_remote=true",
                ("rollout.allow_remote",),
            )
    shares_gpus = rollout.engine == "local" and config.parallel.device != "cpu"
    if shares_gpus and rollout.tp > 1:
        yield Problem(
            "rollout.tp",
            str(rollout.tp),
            "1 when an engine shares the GPU of its trainer",
            "set rollout.tp=1, or use rollout.engine=server (or parallel.device=cpu)",
            ("rollout.engine", "parallel.device"),
        )
    if shares_gpus and rollout.max_staleness:
        yield Problem(
            "rollout.max_staleness",
            str(rollout.max_staleness),
            "0 when the engine shares the GPUs of the trainer",
            "set rollout.max_staleness=0, or use rollout.engine=server (or parallel.device=cpu)",
            ("rollout.engine", "parallel.device"),
        )


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _is_server_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        return False
    plain = not parts.query and not parts.fragment and parts.path in ("", "/")
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port_ok and plain


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.warmup_steps > steps:
        yield Problem(
            "optimizer.warmup_steps",
            str(optimizer.warmup_steps),
            f"at most train.steps={steps}",
            "lower optimizer.warmup_steps or raise train.steps",
            ("train.steps",),
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield Problem(
            "optimizer.min_learning_rate",
            f"{optimizer.min_learning_rate:g}",
            f"at most optimizer.learning_rate={optimizer.learning_rate:g}",
            "lower optimizer.min_learning_rate",
            ("optimizer.learning_rate",),
        )
    if config.evaluation.k > config.evaluation.samples:
        yield Problem(
            "evaluation.k",
            str(config.evaluation.k),
            f"at most evaluation.samples={config.evaluation.samples}",
            "lower evaluation.k or raise evaluation.samples",
            ("evaluation.samples",),
        )


def _device(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.backend == "te" and parallel.device == "cpu":
        yield Problem(
            "parallel.backend",
            "te",
            "local or auto on parallel.device=cpu (TransformerEngine needs a GPU)",
            "set parallel.backend=auto",
            ("parallel.device", "parallel.backend"),
        )


RULES = (
    _sampling,
    _topk,
    _direction,
    _reward,
    _prefix,
    _teachers,
    _curriculum,
    _rollout,
    _optimizer,
    _device,
    path_problems,
)


def problems(config: Config) -> list[Problem]:
    """Return a problem for each condition between settings that `config` violates."""
    return [problem for rule in RULES for problem in rule(config)]
