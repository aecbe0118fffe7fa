"""HuggingFace folders in, HuggingFace tensors out, for a model that is spread over ranks.

Loading: each rank reads from safetensors only the slices that fill its own parameters. Export: HF
tensors are put together one after another in HF's order and handed to every rank in lockstep;
besides its own shards no rank holds more than one projection, one expert or the embedding at a
time. The same iterator feeds checkpoints in HF format and the weight push to the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from megatron_vopd.collectives import broadcast_from_position
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import (
    LayerSpec,
    ShardPlan,
    Slices,
    Unit,
    hf_shape,
    model_units,
    shard_parameters,
)
from megatron_vopd.hf.tensors import SafetensorsFolder
from megatron_vopd.megatron.groups import Groups

# Puts the HF tensors of units of one layer together, on every rank of the world in lockstep.
Gather = Callable[
    [Sequence[Unit], Mapping[str, Tensor], ModelFacts, Groups, LayerSpec],
    Iterator[tuple[str, Tensor]],
]


@torch.no_grad()
def load_weights(
    model: torch.nn.Module,
    facts: ModelFacts,
    groups: Groups,
    model_dir: str | Path,
    layer_spec: LayerSpec = "local",
    kv_repeat: int = 1,
) -> None:
    """Fill this rank's parameters from a model folder, reading only the slices it holds.

    Values are converted to the parameters' dtype; rows that pad the vocabulary become zero.

    Args:
        model: from `build_model`, not wrapped.
        kv_repeat: from `model.kv_repeat`, for a frozen model with fewer KV heads than tp.

    Raises:
        ModelError: the folder does not hold exactly the tensors that its config describes.
    """
    plans = shard_parameters(facts, groups.layout, groups.coordinates, layer_spec, kv_repeat)
    parameters = dict(model.named_parameters())
    assert plans.keys() == parameters.keys(), sorted(plans.keys() ^ parameters.keys())
    with SafetensorsFolder(model_dir) as folder:
        folder.require(facts)
        for name, parameter in parameters.items():
            plan = plans[name]
            assert plan.shape == tuple(parameter.shape), (name, plan.shape, parameter.shape)
            fill_parameter(parameter, plan, folder)


@torch.no_grad()
def fill_parameter(parameter: Tensor, plan: ShardPlan, folder: SafetensorsFolder) -> None:
    """Fill one local parameter from the slices that its plan names."""
    if sum(_numel(piece.target, plan.shape) for piece in plan.pieces) < parameter.numel():
        parameter.zero_()
    for piece in plan.pieces:
        parameter[piece.target].copy_(folder.slices(piece.name)[piece.source])


def _numel(rectangle: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    sizes = [part.stop - part.start for part in rectangle] + list(shape[len(rectangle) :])
    return int(torch.Size(sizes).numel())


def export_weights(
    model: torch.nn.Module,
    facts: ModelFacts,
    groups: Groups,
    layer_spec: LayerSpec = "local",
    with_tied_head: bool = False,
    gather: Gather | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield HF tensors of a spread-out model, in HF's order and the parameters' dtype.

    Every rank of the world iterates to the end, in lockstep, and receives every tensor.

    Args:
        model: as given to `load_weights`, without repeated KV heads.
        with_tied_head: also yield the head of a tied model, as `lm_head.weight`; engines that pack
            their weights keep a stale head otherwise.
        gather: puts the tensors of some units together; None: by collectives.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return export_tensors(parameters, facts, groups, layer_spec, with_tied_head, gather)


@torch.no_grad()
def export_tensors(
    shards: Mapping[str, Tensor],
    facts: ModelFacts,
    groups: Groups,
    layer_spec: LayerSpec = "local",
    with_tied_head: bool = False,
    gather: Gather | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Export whatever is shaped like the parameters, as `export_weights`: gradients, moments.

    A tensor is put together over tp on the ranks that hold it, then sent along pp (experts: along
    ep first). A shard that varies over data-parallel replicas is the caller's business.
    """
    gather = gather or _gather_units
    units = list(model_units(facts))
    for _, layer in groupby(
        units, key=lambda unit: unit.rules if unit.layer is None else unit.layer
    ):
        yield from gather(list(layer), shards, facts, groups, layer_spec)
    if with_tied_head and facts.tied:
        for _, head in gather(units[:1], shards, facts, groups, layer_spec):
            yield "lm_head.weight", head


def own_pieces(
    unit: Unit,
    shards: Mapping[str, Tensor],
    facts: ModelFacts,
    groups: Groups,
    layer_spec: LayerSpec,
) -> Iterator[tuple[str, Slices, Tensor]]:
    """Yield what this rank brings to a unit's HF tensors: name, rectangle, values.

    Over all ranks of the world every element comes once: from the first replica of those that hold
    it.
    """
    layout, at = groups.layout, groups.coordinates
    expert_rank = unit.expert_rank(facts, layout)
    if at.pp != unit.stage(facts, layout):
        return
    if expert_rank is None:
        is_mine = at.dp == at.cp == 0
    else:
        is_mine = at.ep == expert_rank and groups.process_groups.expt_dp.rank() == 0
    for rule in unit.rules:
        if is_mine and (expert_rank is not None or rule.cut != "replicated" or at.tp == 0):
            own = shards[unit.megatron_name(rule, layer_spec, facts, layout)]
            for piece in unit.plan(rule, facts, at.tp, layout.tp).pieces:
                yield piece.name, piece.source, own[piece.target]


def _gather_units(
    units: Sequence[Unit],
    shards: Mapping[str, Tensor],
    facts: ModelFacts,
    groups: Groups,
    layer_spec: LayerSpec,
) -> Iterator[tuple[str, Tensor]]:
    for unit in units:
        yield from _gather_unit(unit, shards, facts, groups, layer_spec)


def _gather_unit(
    unit: Unit,
    shards: Mapping[str, Tensor],
    facts: ModelFacts,
    groups: Groups,
    layer_spec: LayerSpec,
) -> Iterator[tuple[str, Tensor]]:
    layout, at = groups.layout, groups.coordinates
    stage, expert_rank = unit.stage(facts, layout), unit.expert_rank(facts, layout)
    any_shard = next(iter(shards.values()))
    tensors = {name: any_shard.new_empty(hf_shape(name, facts)) for name in unit.hf_names()}

    def assemble() -> None:
        """Join the shards of the tp ranks one by one, so that only one of them exists at a time."""
        for rule in unit.rules:
            own = shards[unit.megatron_name(rule, layer_spec, facts, layout)].detach().contiguous()
            size = layout.tp if expert_rank is None and rule.cut != "replicated" else 1
            for rank in range(size):
                is_own = size == 1 or rank == at.tp
                part = own if is_own else torch.empty_like(own)
                if size > 1:
                    broadcast_from_position(part, rank, groups.tp)
                for piece in unit.plan(rule, facts, rank, size).pieces:
                    tensors[piece.name][piece.source] = part[piece.target]
                if not is_own:
                    # gloo's threads hold the last tensor that they moved.
                    part.untyped_storage().resize_(0)

    if at.pp == stage and expert_rank in (None, at.ep):
        assemble()
    for name, tensor in tensors.items():
        if at.pp == stage and expert_rank is not None:
            broadcast_from_position(tensor, expert_rank, groups.ep)
        yield name, broadcast_from_position(tensor, stage, groups.pp)
