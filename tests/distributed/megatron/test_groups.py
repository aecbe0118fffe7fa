"""Process groups are made once, on the members alone, and never twice with gloo beside nccl."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron_vopd.megatron.groups import independent_groups, student_groups
from megatron_vopd.types import Layout
from tests.support.forked import run_forked
from tests.support.harness import spawn
from tests.support.layouts import Case, destroy_groups, enter
from tests.support.life_cases import HARDER, MODELS, example
from tests.support.recorded_world import join

# (example, ranks) -> the most calls of `new_group` by a rank, of student and teacher together. At
# 256 ranks the teacher's 32 expert ranks are no longer a whole stage: three more groups.
COUNTS = {
    ("math_qwen3_4b", 8): 1,
    ("math_qwen3_4b", 64): 1,
    ("math_qwen3_4b", 256): 1,
    ("qwen3_8b_from_32b", 8): 3,
    ("qwen3_8b_from_32b", 64): 5,
    ("qwen3_8b_from_32b", 256): 5,
    ("qwen3_4b_from_235b", 64): 6,
    ("qwen3_4b_from_235b", 256): 9,
}


def _groups(rank: int, student: Layout, teacher: Layout) -> tuple[list[dict], list[Any]]:
    """As one rank of a recorded world: what was asked of torch, and the names that groups got."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    recorder = join(rank, student.world_size)
    own = student_groups(student).process_groups
    independent_groups(teacher)
    # megatron-core's own state has the same groups: no second one of equal members.
    its = ProcessGroupCollection.use_mpu_process_groups(list(vars(own)))
    for name, group in vars(own).items():
        if name in ("embd", "pos_embd") and dist.get_world_size(group) == 1:
            continue  # on other ranks than the first and the last stage there is none
        assert getattr(its, name) is group, name
    return recorder.asked, recorder.events


@pytest.mark.parametrize(("name", "world_size"), COUNTS)
def test_calls_of_new_group(name: str, world_size: int) -> None:
    case = example(name, world_size)
    ranks = (0, 1, world_size // 2 + 1, world_size - 1)
    found = run_forked(_groups, [(rank, case.student, case.teacher) for rank in ranks])
    counts = [len(asked) for asked, _ in found]
    assert max(counts) == COUNTS[name, world_size]
    for rank, (asked, _) in zip(ranks, found, strict=True):
        members = [tuple(one["ranks"]) for one in asked]
        assert len(set(members)) == len(members), "equal members, two groups"
        assert all(rank in one for one in members), "a call for a group of others"


def test_no_group_asks_for_a_backend_of_its_own() -> None:
    """On nccl there is no gloo anywhere: no group is made with another backend than the world's."""
    cases = [example(name, 64) for name in MODELS] + list(HARDER)
    calls = [(rank, case.student, case.teacher) for case in cases for rank in (0, 5)]
    for asked, _ in run_forked(_groups, calls):
        assert asked and not any(one.get("backend") for one in asked)


@pytest.mark.parametrize("case", [example("qwen3_4b_from_235b", 64), *HARDER], ids=str)
def test_all_members_find_one_another_by_one_name(case: Any) -> None:
    """torch's name counts a rank's groups: a group more on one rank would leave members waiting."""
    size = case.student.world_size
    found = run_forked(_groups, [(rank, case.student, case.teacher) for rank in range(size)])
    names: dict[str, tuple[int, ...]] = {}
    for rank, (_, events) in enumerate(found):
        for _, name, members in events:
            assert names.setdefault(name, members) == members
            assert rank in members
    for name, members in names.items():
        for rank in members:
            assert any(name == one[1] for one in found[rank][1]), (members, rank)


def _again() -> list[int]:
    """On a real rank: groups of two layouts, made twice; sums over some of them."""
    import torch

    found = []
    for _ in range(2):
        student = enter(Case("student", Layout(4, tp=2, pp=2)))
        teacher = independent_groups(Layout(4, pp=4))
        third = independent_groups(Layout(4, tp=2, pp=2))
        assert third.tp is student.tp and third.pp is student.pp
        for group in (student.tp, student.pp, teacher.pp, teacher.process_groups.embd):
            one = torch.tensor([dist.get_rank()])
            dist.all_reduce(one, group=group)
            found.append(int(one))
        destroy_groups()
    return found


def test_groups_are_kept_over_layouts_of_one_world() -> None:
    results = spawn(_again, 4)
    for rank, found in enumerate(results):
        tp, pp = rank // 2 * 4 + 1, rank % 2 * 2 + 2
        ends = 3 if rank in (0, 3) else rank
        assert found == [tp, pp, 6, ends] * 2
