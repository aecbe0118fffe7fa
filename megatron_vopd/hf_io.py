"""HuggingFace folders in, HuggingFace tensors out, for a model that is spread over ranks.

Loading: each rank reads from safetensors only the slices that fill its own parameters. Export: HF
tensors are put together one after another in HF's order and handed to every rank in lockstep;
besides its own shards no rank holds more than one projection, one expert or the embedding at a
time. The same iterator feeds checkpoints in HF format and the weight push to the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vopd.hf_folder import read_facts
from megatron_vopd.hf_mapping import (
    LayerSpec,
    ShardPlan,
    Slices,
    Unit,
    hf_shape,
    hf_tensors,
    model_units,
    shard_parameters,
)
from megatron_vopd.model_facts import ModelError, ModelFacts, facts_from_config
from megatron_vopd.model_files import is_plain_name, model_file, read_json
from megatron_vopd.parallel import Groups, broadcast_from_position
from megatron_vopd.problems import shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Puts the HF tensors of units of one layer together, on every rank of the world in lockstep.
Gather = Callable[
    [Sequence[Unit], Mapping[str, Tensor], ModelFacts, Groups, LayerSpec],
    Iterator[tuple[str, Tensor]],
]


def read_config(model_dir: str | Path) -> tuple[Any, ModelFacts]:
    """The transformers config of a model folder, and its facts. Code in the folder is never run.

    Raises:
        ModelError: no readable config, or an unsupported model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: not found; expected a HuggingFace model folder with config.json")
    read_facts(str(path))  # names what is wrong with a config that transformers would stumble over
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ModelError(f"{path}: refused by transformers: {reason}") from error
    return config, facts_from_config(config.to_dict(), str(path))


class SafetensorsFolder:
    """The tensors of a model folder by name, read slice by slice. A context manager."""

    def __init__(self, model_dir: str | Path) -> None:
        self._dir = Path(model_dir)
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self.file_of = self._read_index()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name, from the index or from the only file."""
        index_path = self._dir / INDEX_NAME
        if index_path.is_file():
            names = read_json(model_file(self._dir, INDEX_NAME)).get("weight_map")
            if not isinstance(names, dict):
                raise ModelError(f"{index_path}: no readable weight_map; copy the file again")
            for tensor_name, file_name in names.items():
                if not is_plain_name(file_name):
                    raise ModelError(
                        f"{index_path}: {shown(tensor_name)} points to {shown(file_name)}; "
                        "expected the name of a file in the same folder"
                    )
            return names
        if not (self._dir / SINGLE_NAME).is_file():
            raise ModelError(
                f"{self._dir}: no {SINGLE_NAME} and no {INDEX_NAME}; expected safetensors weights "
                "(pickled .bin weights are not read)"
            )
        return dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)

    def _open(self, file_name: str) -> Any:
        if file_name not in self._files:
            path = model_file(self._dir, file_name)
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
            self._files[file_name] = self._stack.enter_context(opened)
        return self._files[file_name]

    def slices(self, name: str) -> Any:
        """A lazily read tensor: index it with slices, ask `get_shape()`."""
        file_name = self.file_of[name]
        try:
            return self._open(file_name).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self._dir / file_name}: {name} is missing ({error})") from error

    def require(self, facts: ModelFacts) -> None:
        """Check names and shapes against the config, without reading any weight.

        Raises:
            ModelError: a missing, an unexpected, or a wrongly shaped tensor, by name and file.
        """
        expected = hf_tensors(facts)
        # Some tools write the head of a tied model again, and rotary tables; both are derived.
        derived = {"lm_head.weight"} if facts.tied else set()
        for name, expected_shape in expected.items():
            if name not in self.file_of:
                raise ModelError(f"{self._dir}: tensor {name} is missing; config.json asks for it")
            shape = tuple(self.slices(name).get_shape())
            if shape != expected_shape:
                raise ModelError(
                    f"{self._dir / self.file_of[name]}: {name} has shape {shape}; "
                    f"config.json asks for {expected_shape}"
                )
        for name in sorted(self.file_of.keys() - expected.keys() - derived):
            if not name.endswith("rotary_emb.inv_freq"):
                raise ModelError(
                    f"{self._dir / self.file_of[name]}: unexpected tensor {shown(name)}; "
                    "config.json describes no such weight"
                )
        for file_name in sorted(set(self.file_of.values())):
            for name in self._open(file_name).keys():  # noqa: SIM118 (not a dict)
                if self.file_of.get(name) != file_name:
                    raise ModelError(
                        f"{self._dir / file_name}: {shown(name)} is in this file too, which "
                        f"{INDEX_NAME} does not say; one of the two is stale"
                    )

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""
        return self._dir / self.file_of[name]

    def dtype_of(self, name: str) -> str:
        """A tensor's type as safetensors writes it: F32, BF16, ..."""
        return self.slices(name).get_dtype()


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
    """HF tensors of a spread-out model, one after another in HF's order, in the parameters' dtype.

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
    """`export_weights` for anything shaped like the parameters: gradients, optimizer moments.

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
    """What this rank brings to a unit's HF tensors: name, rectangle, values.

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
        is_mine = at.ep == expert_rank and groups.collection.expt_dp.rank() == 0
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
        """Shards of the tp ranks one after another, so that only one of them exists at a time."""
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
