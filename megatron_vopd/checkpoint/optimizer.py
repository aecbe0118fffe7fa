"""Adam's state in terms of the model's parameters, whatever optimizer holds it.

megatron-core keeps main values and moments of a parameter in one of three ways: whole, beside the
parameter (fp32); whole, with an fp32 copy of it (bf16); or as a flat slice on each data-parallel
rank (the distributed optimizer). A checkpoint has one form for all three, that of megatron-core's
`fully_reshardable` type: `optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.KEY`, in the shape of
parameter KEY; `fp32_param` where the parameter itself is not fp32. So any layout and either
optimizer may continue from it.

Each rank writes its own slice, and reads it again, one parameter at a time (`shares`): nothing is
sent between ranks. Where replicas hold the state whole, each writes an equal share of it.
megatron-core's own functions would hold the whole state of a model shard on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_vopd.checkpoint.sharded import (
    CheckpointReader,
    Entry,
    entries,
    renamed,
    shards,
)
from megatron_vopd.checkpoint.shares import Span, slice_shards
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
        start: of the slice in the flattened parameter; None: whole on every replica.
    """

    inner: Any
    main: Tensor | None
    start: int | None = None

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
        return Slot(member.optimizer, None)
    group, order = member.model_param_group_index_map[parameter]
    main = member.optimizer.param_groups[group]["params"][order]
    start = member._get_model_param_range_map(parameter)["param"].start
    return Slot(member.optimizer, main, start)


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


def _places(student: Student) -> Iterator[tuple[str, str, Entry]]:
    """Yield parameter name, kind and place; in the same order on replicas.

    A second copy of a tied head has the name of the first.
    """
    model_entries = entries(student.bare.sharded_state_dict())
    for name, parameter in student.bare.named_parameters():
        entry = model_entries[name]
        for kind in _kinds(parameter):
            yield name, kind, renamed(entry, f"{_PREFIX}.{kind}", torch.float32)


@torch.no_grad()
def optimizer_values(student: Student, spans: Mapping[str, Span]) -> Iterator[ShardedTensor]:
    """Yield what this rank saves, as views of what it holds, one parameter's tensor at a time.

    Args:
        spans: result of `shares.saved_spans`.
    """
    slots = _slots(student)
    _require_moments(slots)
    for name, kind, entry in _places(student):
        slot = slots[name]
        own = slot.tensor(kind)
        if own is None or name not in spans:
            continue
        values = own.detach().view(-1)
        if slot.start is None:
            start, stop = spans[name]
            yield from slice_shards(entry, (start, stop), values[start:stop])
        else:
            yield from slice_shards(entry, (slot.start, slot.start + len(values)), values)


def optimizer_shards(student: Student) -> list[ShardedTensor]:
    """List the tensors of which this rank needs a part in a checkpoint, whole, without values."""
    return [shard for *_, entry in _places(student) for shard in shards(entry)]


@torch.no_grad()
def fill_optimizer(student: Student, reader: CheckpointReader) -> None:
    """Read this rank's part of main values and moments, and nothing else.

    `reader` was asked for `optimizer_shards` before.
    """
    slots = _slots(student)
    _require_moments(slots)
    for name, kind, entry in _places(student):
        own, start = slots[name].tensor(kind), slots[name].start or 0
        if own is None:
            continue
        for shard in slice_shards(entry, (start, start + own.numel()), own.view(-1)):
            reader.fill(shard)
