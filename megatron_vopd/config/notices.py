"""Notices: settings changed from their default without effect here, and doubtful combinations."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vopd.config.method import estimators_with
from megatron_vopd.config.schema import Config
from megatron_vopd.errors import Notice


def _unused(config: Config) -> Iterator[tuple[str, bool, str]]:
    """Yield (key, True if this configuration ignores it, what would make it used)."""
    objective, curriculum, parallel = config.objective, config.curriculum, config.parallel
    sampled = objective.traits.has_advantage
    user = f"objective.estimator={estimators_with('has_advantage')}"
    gated = curriculum.kind == "entropy_gated"
    corrected = sampled and objective.importance != "none"
    rollouts = "student" in objective.prefix_fractions
    for key in ("baseline", "importance", "allow_biased_sampling"):
        yield f"objective.{key}", not sampled, user
    yield "objective.importance_cap", not corrected, "importance truncate or mask of sampled tokens"
    for key in ("topk", "entropy_gate"):
        yield f"objective.{key}", not config.scores_with_teacher, "a teacher that scores"
    for key in ("ema", "min_entropy", "held_out_prompts"):
        yield f"curriculum.{key}", not gated, "curriculum.kind=entropy_gated"
    yield "curriculum.interval", curriculum.kind == "fixed", "a curriculum that moves"
    if config.teacher is not None:
        given = set(objective.prefix_fractions) - {"student"}
        yield "teacher.cache_dir", not given, "given responses (objective.prefix)"
    yield "parallel.sequence_parallel", parallel.tp == 1, "parallel.tp > 1"
    yield "data.teacher_field", len(config.teachers) < 2, "several teachers"
    yield "data.responses", set(objective.prefix_fractions) == {"student"}, "another prefix"
    yield "rollout.samples_per_prompt", not rollouts, "rollouts of the student"
    yield "optimizer.min_learning_rate", config.optimizer.schedule == "constant", "a decay"
    yield "data.evaluation", config.evaluation.interval == 0, "evaluation.interval > 0"
    yield "evaluation.samples", config.data.evaluation is None, "data.evaluation"
    yield "teacher", not config.scores_with_teacher, f"another estimator than {objective.estimator}"


def notices(config: Config) -> list[Notice]:
    """Return a notice for each changed setting that is ignored and each doubtful combination."""
    found: list[Notice] = []
    for key, ignored, user in _unused(config):
        value, default = config, None
        for part in key.split("."):
            default = type(value).model_fields[part].default
            value = getattr(value, part)
        if ignored and value != default:
            found.append(Notice(key, f"has no effect here; it is used with {user}"))
    objective = config.objective
    given = set(objective.prefix_fractions) - {"student"}
    if objective.traits.has_advantage and given:
        what = f"estimator={objective.estimator} biased; exact is not"
        text = f"tokens that the student did not sample make {what}"
        found.append(Notice("objective.prefix", text))
    if config.evaluation.temperature == 0 and config.evaluation.samples > 1:
        text = "greedy decoding gives the same response every time; 1 sample is enough"
        found.append(Notice("evaluation.samples", text))
    return found
