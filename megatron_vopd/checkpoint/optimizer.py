"""Adam's state in terms of the model's parameters, whatever optimizer holds it.

megatron-core keeps main values and moments of a parameter in one of three ways: whole, beside the
parameter (fp32); whole, with an fp32 copy of it (bf16); or as a flat slice on each data-parallel
rank (the distributed optimizer). A checkpoint has one form for all three, that of megatron-core's
`fully_reshardable` type: `optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.KEY`, in the shape of
parameter KEY; `fp32_param` where the parameter itself is not fp32. So any layout and either
optimizer may continue from it.

Slices are joined, and cut again, one parameter at a time: megatron-core's own functions would hold
the whole state of a model shard on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_vopd.checkpoint.sharded import (
    CheckpointReader,
    Entry,
    entries,
    is_saved_here,
    renamed,
    shards,
    with_values,
)
from megatron_vopd.collectives import join_slices
from megatron_vopd.megatron.student import Student

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
_PREFIX = "optimizer.state"


@dataclass(frozen=True)
class Slot:
    """Where this rank keeps the main values and moments of one parameter.

    Attributes:
        inner: the torch optimizer.
        main: fp32; the parameter itself, a copy, or a flat slice; None: no part of it is here.
        start: of the slice in the flattened parameter.
        group: the ranks that hold the slices; None: whole on every rank.
    """

    inner: Any
    main: Tensor | None
    start: int = 0
    group: dist.ProcessGroup | None = None

    def tensor(self, kind: str) -> Tensor | None:
        """Return this rank's part of a moment or of the main values."""
        if self.main is None or kind == MAIN:
            return self.main
        return self.inner.state[self.main][kind]


def _members(student: Student) -> list[Any]:
    optimizer = student.optimizer
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member for member in members if not getattr(member, "is_stub_optimizer", False)]


def _slots(student: Student) -> dict[str, Slot]:
    """Return the slots by parameter name, in the order of the model."""
    owners: dict[int, Any] = {}
    for member in _members(student):
        is_cut = hasattr(member, "model_param_gbuf_map")
        for buffer in member.buffers if is_cut else ():
            owners |= {id(parameter): member for parameter in buffer.params}
        for parameter in () if is_cut else member.get_parameters():
            owners[id(parameter)] = member
    found = {}
    for name, parameter in student.bare.named_parameters():
        whole = getattr(parameter, "main_param", None)
        member = owners.get(id(parameter)) or owners.get(id(whole))
        assert member is not None, f"{name} has no optimizer"
        if hasattr(member, "model_param_gbuf_map"):
            found[name] = _cut_slot(member, parameter)
        else:
            found[name] = Slot(member.optimizer, parameter if whole is None else whole)
    return found


def _cut_slot(member: Any, parameter: Tensor) -> Slot:
    """Make the slot of a parameter whose state the distributed optimizer splits."""
    if parameter not in member.model_param_gbuf_map:
        return Slot(member.optimizer, None, 0, member.data_parallel_group)
    group, order = member.model_param_group_index_map[parameter]
    main = member.optimizer.param_groups[group]["params"][order]
    start = member._get_model_param_range_map(parameter)["param"].start
    return Slot(member.optimizer, main, start, member.data_parallel_group)


def _require_moments(slots: dict[str, Slot]) -> None:
    """Make moments of zero before the first update, as the optimizer would then."""
    for slot in slots.values():
        if slot.main is None or "exp_avg" in slot.inner.state[slot.main]:
            continue
        state = slot.inner.state[slot.main]
        if isinstance(slot.inner, torch.optim.Adam):
            on_device = slot.inner.defaults.get("capturable") or slot.inner.defaults.get("fused")
            device = slot.main.device if on_device else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(slot.main, dtype=torch.float32)


def num_updates(student: Student) -> int:
    """Return the updates that Adam's bias correction counts; one number for all parameters."""
    slots = _slots(student)
    _require_moments(slots)
    for slot in slots.values():
        if slot.main is not None:
            state = slot.inner.state[slot.main]
            return int(state["step"]) if "step" in state else _group_step(slot.inner)
    return 0


def _group_step(inner: Any) -> int:
    """Return the count of a group: fused optimizers have one, from the first update on."""
    return int(inner.param_groups[0].get("step", 0))


def set_num_updates(student: Student, number: int) -> None:
    """Make the count `number`; torch's Adam has a counter per parameter."""
    slots = _slots(student)
    _require_moments(slots)
    for slot in slots.values():
        if slot.main is None:
            continue
        state = slot.inner.state[slot.main]
        if "step" in state:
            state["step"].fill_(number)
            continue
        for group in slot.inner.param_groups:
            group["step"] = number


def _kinds(parameter: Tensor) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MAIN)


def _places(student: Student) -> Iterator[tuple[str, Tensor, str, Entry]]:
    """Yield parameter name, parameter, kind and place; in the same order on replicas.

    A second copy of a tied head has the name of the first.
    """
    model_entries = entries(student.bare.sharded_state_dict())
    for name, parameter in student.bare.named_parameters():
        entry = model_entries[name]
        for kind in _kinds(parameter):
            yield name, parameter, kind, renamed(entry, f"{_PREFIX}.{kind}", torch.float32)


@torch.no_grad()
def optimizer_values(student: Student) -> Iterator[ShardedTensor]:
    """Yield what this rank saves, one parameter's tensor at a time.

    A collective of the data-parallel groups for the distributed optimizer: every rank goes through
    it to the end, whatever happens to what it gets.
    """
    for _, _, entry, whole in whole_tensors(student):
        if is_saved_here(entry):
            yield from with_values(entry, whole)


def _joined(slot: Slot, kind: str, parameter: Tensor) -> Tensor:
    own = slot.tensor(kind)
    if slot.group is None:
        assert own is not None
        return own.detach()
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if own is not None:
        whole[slot.start : slot.start + own.numel()] = own.detach().view(-1)
    return join_slices(whole, slot.group).view(parameter.shape)


@torch.no_grad()
def whole_tensors(student: Student) -> Iterator[tuple[str, str, Entry, Tensor]]:
    """Yield parameter name, kind, place and the whole tensor, one at a time on every rank.

    A collective like `optimizer_values`; the order is the same on replicas.
    """
    slots = _slots(student)
    _require_moments(slots)
    for name, parameter, kind, entry in _places(student):
        yield name, kind, entry, _joined(slots[name], kind, parameter)


def optimizer_shards(student: Student) -> list[ShardedTensor]:
    """List what this rank needs of a checkpoint, without values."""
    return [shard for *_, entry in _places(student) for shard in shards(entry)]


@torch.no_grad()
def fill_optimizer(student: Student, reader: CheckpointReader) -> None:
    """Read main values and moments; `reader` was asked for `optimizer_shards` before."""
    slots = _slots(student)
    _require_moments(slots)
    for name, parameter, kind, entry in _places(student):
        slot = slots[name]
        own = slot.tensor(kind)
        if own is None:
            continue
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        for shard in with_values(entry, whole):
            reader.fill(shard)
        part = whole.view(-1)[slot.start : slot.start + own.numel()]
        own.copy_(part.view(own.shape))
