"""The layouts of student and teachers, and conditions that depend on the number of ranks."""

from __future__ import annotations

import math

from megatron_vopd.config.schema import Config, TeacherSection
from megatron_vopd.errors import LayoutError, Problem
from megatron_vopd.types import Layout

MAX_WORLD_SIZE = 2**20


def student_layout(config: Config, world_size: int) -> Layout:
    """Return the student's layout of the world; raises LayoutError."""
    parallel = config.parallel
    return Layout(world_size, parallel.tp, parallel.pp, parallel.cp, parallel.ep)


def teacher_layout(teacher: TeacherSection, world_size: int) -> Layout:
    """Return a teacher's layout of the same world (cp 1); raises LayoutError."""
    return Layout(world_size, teacher.tp, teacher.pp, 1, teacher.ep)


def layouts(config: Config, world_size: int) -> dict[str, Layout]:
    """Return `student`, then the key of each scoring teacher -> layout; raises LayoutError."""
    result = {"student": student_layout(config, world_size)}
    if config.scores_with_teacher:
        for key, teacher in config.named_teachers.items():
            result[key] = teacher_layout(teacher, world_size)
    return result


def smallest_world(config: Config) -> int:
    """Return the smallest world that every layout divides (may exceed MAX_WORLD_SIZE)."""
    parallel = config.parallel
    sizes = [parallel.tp * parallel.pp * parallel.cp, parallel.pp * parallel.ep]
    if config.scores_with_teacher:
        for teacher in config.named_teachers.values():
            sizes += [teacher.tp * teacher.pp, teacher.pp * teacher.ep]
    return math.lcm(*sizes)


def world_problems(config: Config, world_size: int) -> list[Problem]:
    """Return every reason why `config` cannot run on `world_size` ranks."""
    return cut_problems(config, world_size) or _batch_problems(config, world_size)


def cut_problems(config: Config, world_size: int) -> list[Problem]:
    """Return a problem for each layout that `world_size` ranks cannot be divided into."""
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        expected = f"1 to {MAX_WORLD_SIZE} ranks"
        remedy = "choose parallel and teacher sizes with a smaller common multiple, or --world-size"
        return [Problem("world size", str(world_size), expected, remedy)]
    parallel = config.parallel
    problems = _cut_problems(
        "parallel", world_size, parallel.tp, parallel.pp, parallel.cp, parallel.ep
    )
    if config.scores_with_teacher:
        for key, teacher in config.named_teachers.items():
            problems += _cut_problems(key, world_size, teacher.tp, teacher.pp, 1, teacher.ep)
    return problems


def _cut_problems(
    section: str, world_size: int, tp: int, pp: int, cp: int, ep: int
) -> list[Problem]:
    expected = f"sizes that divide the world of {world_size} ranks"
    for name, sizes in (("tp", (tp, pp, cp, 1)), ("ep", (1, pp, 1, ep))):
        try:
            Layout(world_size, *sizes)
        except LayoutError as error:
            got = f"tp={tp} pp={pp} cp={cp}" if name == "tp" else f"ep={ep} pp={pp}"
            return [Problem(f"{section}.{name}", got, expected, str(error))]
    return []


def _batch_problems(config: Config, world_size: int) -> list[Problem]:
    rollout, problems = config.rollout, []
    dp = student_layout(config, world_size).dp
    num_rollouts = rollout.num_prompts * rollout.samples_per_prompt
    if num_rollouts % dp:
        problems.append(
            Problem(
                "rollout.num_prompts",
                f"{rollout.num_prompts} x {rollout.samples_per_prompt} samples = {num_rollouts}",
                f"a multiple of the {dp} data-parallel replicas of the student",
                f"set rollout.num_prompts={math.ceil(rollout.num_prompts / dp) * dp}",
            )
        )
    return problems
