"""Process groups of the student and, beside it in the same world, of any second model.

The student lives in megatron-core's `parallel_state`, because leaf functions of megatron-core fall
back to those global groups. A second model (the teacher) has groups of its own over the same ranks,
cut from its `Layout` and handed to every constructor and schedule by name.

Both come as one frozen `Groups`. No group in it is None: a rank that is alone on an axis has a
group of size one. That matters because torch reads `group=None` as the whole world.

Groups are made by partitions of the world: lists of ranks of which every rank is in exactly one.
Each partition is made once, whichever model and axis asks for it, and megatron-core's global state
is given these groups too; the group of all ranks is the world itself. A rank calls `new_group` for
its own list only (`use_local_synchronization`). torch names such a group after its members and the
number of groups that the rank has made, so every rank has to make one group in every partition, in
the same order: also a rank that is alone in it and has such a group already.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from megatron_vopd.errors import LayoutError
from megatron_vopd.megatron import cpu_runtime
from megatron_vopd.types import Coordinates, Layout

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


# Every group that megatron-core's models, schedules, gradient reduction and checkpoints ask for,
# with the axes along which its members differ. `edp` is the data parallelism of the experts.
_DECODER_GROUPS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "pp": ("pp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "mp": ("tp", "pp"),
    "dp_cp": ("dp", "cp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
    "intra_dp_cp": ("dp", "cp"),
    "intra_dist_opt": ("tp", "dp", "cp", "pp"),
}
_EXPERT_GROUPS: dict[str, tuple[str, ...]] = {
    "ep": ("ep",),
    "expt_tp": (),
    "tp_ep": ("ep",),
    "tp_ep_pp": ("ep", "pp"),
    "expt_dp": ("edp",),
    "intra_expt_dp": ("edp",),
}


@dataclass(frozen=True)
class Groups:
    """One model's layout, this rank's place in it, and its process groups.

    Attributes:
        layout: how the world is cut for this model.
        coordinates: this rank's place.
        process_groups: megatron-core's ProcessGroupCollection; every group it holds is set.
    """

    layout: Layout
    coordinates: Coordinates
    process_groups: ProcessGroupCollection

    @property
    def tp(self) -> dist.ProcessGroup:
        """Ranks that share every layer of this stage, in order of vocabulary and heads."""
        return self.process_groups.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        """Ranks that hold the other stages of this replica, first stage first."""
        return self.process_groups.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks that hold the same shard in the other replicas."""
        return self.process_groups.dp

    @property
    def ep(self) -> dist.ProcessGroup:
        """Ranks that together hold all experts of this stage."""
        return self.process_groups.ep

    @property
    def is_leader(self) -> bool:
        """True on the rank that leads its data-parallel replica, which may have an engine."""
        return self.coordinates.is_leader

    @property
    def is_first_stage(self) -> bool:
        """True on the pipeline stage that has the embedding."""
        return self.coordinates.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the pipeline stage that has the vocabulary head."""
        return self.coordinates.pp == self.layout.pp - 1


def init_world(device: str, timeout_seconds: float = 600.0) -> None:
    """Join torchrun's world: gloo on `cpu`, nccl on `cuda`.

    Args:
        device: "cpu" or "cuda"; "cpu" also activates the CPU runtime.
        timeout_seconds: longest wait of any collective, of any group made later too, before it is
            an error.
    """
    if device == "cpu":
        cpu_runtime.activate()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))


def init_single_process() -> None:
    """Make a world of this one process on the CPU, unless there is a world already."""
    cpu_runtime.activate()
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def member_ranks(layout: Layout, axes: Iterable[str], expert: bool = False) -> list[list[int]]:
    """Return all groups of ranks that differ along `axes` only, members and groups ascending.

    Args:
        axes: of "tp", "cp", "dp", "pp", or with `expert` of "ep", "edp", "pp".
    """
    free = set(axes)
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        place = _expert_place(layout, rank) if expert else _decoder_place(layout, rank)
        groups.setdefault(tuple(v for k, v in place.items() if k not in free), []).append(rank)
    return list(groups.values())


def _decoder_place(layout: Layout, rank: int) -> dict[str, int]:
    at = layout.coordinates(rank)
    return {"tp": at.tp, "cp": at.cp, "dp": at.dp, "pp": at.pp}


def _expert_place(layout: Layout, rank: int) -> dict[str, int]:
    at = layout.coordinates(rank)
    stage_size = layout.world_size // layout.pp
    return {"ep": at.ep, "edp": rank % stage_size // layout.ep, "pp": at.pp}


def student_groups(layout: Layout, seed: int = 0) -> Groups:
    """Initialise megatron-core's parallel state with `layout` and return its groups.

    Called once a process by every rank of the world, in the same order as other group creation.

    Args:
        seed: of megatron-core's random states, which recomputation and sequence parallelism fork.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    groups = independent_groups(layout)
    _own_group(member_ranks(layout, ("tp", "dp")))  # which megatron-core alone asks for
    original = parallel_state.create_group
    parallel_state.create_group = partial(_known_or_new, original, _by_members())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=cast(int, _world_timeout() / datetime.timedelta(minutes=1)),
            create_gloo_process_groups=False,
        )
    finally:
        parallel_state.create_group = original
    model_parallel_cuda_manual_seed(seed)
    return groups


def independent_groups(layout: Layout) -> Groups:
    """Create a second model's groups over the same world, apart from megatron-core's own state.

    Called by every rank of the world, in the same order. Nothing crosses the wire on nccl; gloo
    connects the members of each group.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    _require_world(layout)
    wanted = {name: member_ranks(layout, axes) for name, axes in _DECODER_GROUPS.items()}
    wanted |= {name: member_ranks(layout, axes, True) for name, axes in _EXPERT_GROUPS.items()}
    stages = member_ranks(layout, ["pp"])
    ends = [sorted({ranks[0], ranks[-1]}) for ranks in stages]
    middle = [[rank] for ranks in stages for rank in ranks[1:-1]]
    wanted["pos_embd"] = [[rank] for ranks in stages for rank in ranks]
    wanted["embd"] = ends + middle
    process_groups = ProcessGroupCollection(
        **{name: _own_group(members) for name, members in wanted.items()}
    )
    return _frozen(layout, process_groups)


Partition = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Made:
    """The groups that this rank is in, by the partition of the world in which they were made."""

    world: dist.ProcessGroup
    groups: dict[Partition, dist.ProcessGroup]


_made: _Made | None = None


def _made_groups() -> dict[Partition, dist.ProcessGroup]:
    """Return the groups made in the present world; those of an earlier world are forgotten."""
    global _made
    world = dist.group.WORLD
    assert world is not None, "groups are made in a world"
    if _made is None or _made.world is not world:
        everyone = (tuple(range(dist.get_world_size())),)
        _made = _Made(world, {everyone: world})
    return _made.groups


def _own_group(members: list[list[int]]) -> dist.ProcessGroup:
    """Return this rank's group of a partition of the world, made unless there is one.

    Args:
        members: every rank in exactly one list; every rank calls with the same lists.
    """
    made, rank = _made_groups(), dist.get_rank()
    partition = tuple(sorted(tuple(sorted(ranks)) for ranks in members))
    if partition not in made:
        own = next(ranks for ranks in partition if rank in ranks)
        group = dist.new_group(list(own), timeout=_world_timeout(), use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup), f"rank {rank} is in no group of {own}"
        made[partition] = group
    return made[partition]


def _by_members() -> dict[tuple[int, ...], dist.ProcessGroup | None]:
    """Return the group of each list of all partitions made so far; None: this rank is not in it."""
    found: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    for partition, group in _made_groups().items():
        for ranks in partition:
            found.setdefault(ranks, group if dist.get_rank() in ranks else None)
    return found


def _known_or_new(
    original: Any,
    known: dict[tuple[int, ...], dist.ProcessGroup | None],
    ranks: list[int],
    **settings: Any,
) -> dist.ProcessGroup | None:
    """Return the group of `ranks`, for megatron-core; None on a rank that is no member.

    A list that is in no partition goes to megatron-core's own function, which all ranks call.
    """
    wanted = tuple(sorted(ranks))
    if wanted not in known:
        known[wanted] = original(ranks, **settings)
    return known[wanted]


def _world_timeout() -> datetime.timedelta:
    """Return the timeout of the world's collectives; torch gives a new group half an hour."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    world = cast(Any, dist.group.WORLD)
    return world._get_backend(device).options._timeout


def _frozen(layout: Layout, process_groups: ProcessGroupCollection) -> Groups:
    missing = [name for name, group in vars(process_groups).items() if group is None]
    assert not missing, f"process groups without members: {missing}"
    return Groups(layout, layout.coordinates(dist.get_rank()), process_groups)


def _require_world(layout: Layout) -> None:
    if layout.world_size != dist.get_world_size():
        raise LayoutError(
            f"the layout is for {layout.world_size} ranks, but {dist.get_world_size()} started; "
            f"start torchrun with --nproc-per-node x --nnodes = {layout.world_size}"
        )
