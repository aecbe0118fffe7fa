"""The TransformerEngine layers against the project's table and its own layers, without a GPU.

TransformerEngine's Python is real, its kernels are torch (tests/support/te). So this proves names,
shapes, marks and places in checkpoints, at any rank of any layout; it proves no kernel. Training
steps are in distributed/trainer/test_te_step.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.checkpoint.sharded import entries, shards
from megatron_vopd.config import load_config
from megatron_vopd.config.world import layouts
from megatron_vopd.hf.facts import frozen_sequence_parallel, kv_repeat
from megatron_vopd.hf.mapping import LayerSpec, shard_parameters
from megatron_vopd.hf.tensors import read_config
from megatron_vopd.megatron.groups import Groups, independent_groups, student_groups
from megatron_vopd.megatron.model import ModelOptions, build_model
from megatron_vopd.megatron.weights import load_weights
from megatron_vopd.types import Layout
from tests.support import ROOT
from tests.support.layouts import DENSE_CASES, MOE_CASES, Case, destroy_groups, enter
from tests.support.te.worlds import NEWEST, VERSIONS, spawn
from tests.support.tiny_models import ARCHITECTURES, DENSE, TinyModel

MODELS = ROOT / "tests" / "fixtures" / "models"
SPECS: tuple[tuple[LayerSpec, str], ...] = (("local", "cpu"), ("te", "cuda"))


def _built(
    config: Any, facts: Any, groups: Groups, spec: Any, device: str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Return one stage of the model, and the table's plans for its parameters."""
    known = ModelOptions(torch.bfloat16, device, spec, **options)
    repeat = kv_repeat(facts, groups.layout.tp, known.trained)
    plans = shard_parameters(facts, groups.layout, groups.coordinates, spec, repeat)
    return build_model(config, facts, groups, known), plans


def _unlike_the_table(model: Any, plans: dict[str, Any]) -> list[Any]:
    found = {(name, tuple(p.shape)) for name, p in model.named_parameters()}
    return sorted(found ^ {(name, plan.shape) for name, plan in plans.items()})


# -- the examples, at their own layouts

# Ranks of the world that `vopd check` is called with: all of eight; of 64 the corners of the
# teacher's tp 4 x pp 2 x ep 32, and one within each stage.
EXAMPLES = {
    "math_qwen3_1.7b": (1, [0]),
    "math_qwen3_4b": (8, list(range(8))),
    "qwen3_8b_from_32b": (8, list(range(8))),
    "qwen3_4b_from_235b": (64, [0, 13, 31, 32, 50, 63]),
}


@dataclass(frozen=True)
class Whole:
    """A model of an example on one rank, of its real size on the meta device."""

    what: str
    unlike_the_table: list[Any]
    num_parameters: int
    num_saved: int
    first_layer: int


def _example(name: str, ranks: list[int], world_size: int) -> list[Whole]:
    """On a rank: build the student and the teachers as ranks of the example's own world."""
    from tests.support.te import gpu
    from tests.support.te.fake_world import fake_world

    config = load_config(ROOT / "examples" / name / "config.yaml", [])
    cuts = layouts(config, world_size)
    paths = {"student": config.student.path}
    paths |= {key: teacher.path for key, teacher in config.named_teachers.items()}
    found = []
    for rank in ranks:
        with fake_world(rank, world_size), gpu.built_on("meta"):
            own = {"student": student_groups(cuts["student"])}
            own |= {key: independent_groups(cuts[key]) for key in config.named_teachers}
            for key, path in paths.items():
                trained = key == "student"
                known = read_config(MODELS / path.split("/")[1])
                cut = config.parallel.sequence_parallel
                cut = cut if trained else frozen_sequence_parallel(known[1], cuts[key])
                options: dict[str, Any] = {"trained": trained, "sequence_parallel": cut}
                model, plans = _built(*known, own[key], "te", "cuda", **options)
                found.append(
                    Whole(
                        f"{key} {cuts[key]} rank {rank}",
                        _unlike_the_table(model, plans),
                        len(plans),
                        len(entries(model.sharded_state_dict())),
                        model.decoder.layers[0].layer_number,
                    )
                )
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_built(name: str) -> None:
    world_size, ranks = EXAMPLES[name]
    models = spawn(NEWEST, _example, 1, name, ranks, world_size)[0]
    assert len(models) == 2 * len(ranks)
    for model in models:
        assert not model.unlike_the_table, model.what
        assert model.num_saved == model.num_parameters > 200, model.what
    stages = {model.first_layer for model in models}
    assert stages == ({1, 48} if "235b" in name else {1})


# -- both layer specs, at ranks of fake worlds

FROZEN_LAYOUTS = {
    False: (Layout(4, tp=4), Layout(4, tp=2, pp=2)),
    True: (Layout(8, tp=4, pp=2, ep=4),),
}
# What megatron-core reads of a parameter while it reduces, clips and counts gradients.
MARKS = ("sequence_parallel", "allreduce", "tensor_model_parallel", "partition_dim")
MARKS += ("partition_stride", "requires_grad", "dtype")


@dataclass(frozen=True)
class Compared:
    """One rank's model under both layer specs; `differences` by parameter of TransformerEngine."""

    what: str
    num_parameters: int
    num_saved: int
    differences: dict[str, Any]


def _compared(folder: str, groups: Groups, trained: bool, sequence_parallel: bool) -> Compared:
    """Build a model with both layer specs; compare names, shapes, marks, places in checkpoints."""
    config, facts = read_config(folder)
    options: dict[str, Any] = {"trained": trained, "sequence_parallel": sequence_parallel}
    held, differences = [], dict[str, Any]()
    for spec, device in SPECS:
        model, plans = _built(config, facts, groups, spec, device, **options)
        unlike = _unlike_the_table(model, plans)
        if unlike:
            differences[f"names and shapes of {spec}"] = unlike
        saved = entries(model.sharded_state_dict())
        parameters = dict(model.named_parameters())
        held.append([(parameters.get(name), saved.get(name), name) for name in plans])
    for (local, local_entry, _), (own, own_entry, name) in zip(*held, strict=True):
        for mark in MARKS:
            pair = [getattr(parameter, mark, None) for parameter in (local, own)]
            if pair[0] != pair[1]:
                differences[f"{name}: {mark}"] = pair
        places = [_places(entry) for entry in (local_entry, own_entry)]
        if places[0] != places[1]:
            differences[f"{name}: place in checkpoints"] = places
    what = f"{facts.model_type} {'student' if trained else 'teacher'} {groups.layout}"
    what = f"{what} {groups.coordinates}"
    return Compared(
        what, len(held[1]), sum(entry is not None for _, entry, _ in held[1]), differences
    )


def _places(entry: Any) -> list[Any]:
    return [
        (one.key, one.global_shape, one.global_offset, one.local_shape, one.replica_id)
        for one in (shards(entry) if entry is not None else ())
    ]


def _compare_all(folders: list[tuple[str, bool]]) -> list[Compared]:
    """On a rank: compare every model at the first and the last rank of every layout."""
    from tests.support.te.fake_world import fake_world

    found = []
    for folder, is_moe in folders:
        for case in MOE_CASES if is_moe else DENSE_CASES:
            for rank in {0, case.layout.world_size - 1}:
                with fake_world(rank, case.layout.world_size):
                    groups = student_groups(case.layout)
                    found.append(_compared(folder, groups, True, case.sequence_parallel))
        for layout in FROZEN_LAYOUTS[is_moe]:
            with fake_world(layout.world_size - 1, layout.world_size):
                student_groups(Layout(layout.world_size))
                # As teachers are: those with experts are sequence parallel.
                found.append(_compared(folder, independent_groups(layout), False, is_moe))
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_both_layer_specs_are_the_same_model(version: str, tmp_path: Path) -> None:
    """Names, shapes, marks and places in checkpoints, of every architecture, tied and untied."""
    models = [TinyModel(kind, tied, 157) for kind in ARCHITECTURES for tied in (False, True)]
    folders = [(str(model.save(tmp_path)), model.model_type not in DENSE) for model in models]
    compared = spawn(version, _compare_all, 1, folders)[0]
    assert len(compared) > 100
    for one in compared:
        assert not one.differences, one.what
        assert one.num_saved == one.num_parameters, one.what


# -- the head, without apex


def _heads(folder: str) -> dict[str, Any]:
    """On a rank: build and run every kind of last stage; what was fused, and the outputs' error."""
    from megatron.core.tensor_parallel import layers

    from megatron_vopd.megatron.attention import packed_params
    from tests.support.te import gpu

    groups = enter(Case("tp1", Layout(1)))
    config, facts = read_config(folder)
    ids = torch.arange(1, 20)[None]
    found: dict[str, Any] = {"apex": layers._grad_accum_fusion_available}
    for trained in (True, False):
        for output in ("hidden", "logits"):
            results, fused = [], set[bool]()
            for spec, device in SPECS:
                options: dict[str, Any] = {"trained": trained, "output": output}
                model, _ = _built(config, facts, groups, spec, device, **options)
                load_weights(model, facts, groups, folder, spec)
                with torch.no_grad(), gpu.seen_as_cuda() if spec == "te" else torch.no_grad():
                    bounds = packed_params([12, 7], "cpu")
                    positions = torch.arange(19)[None]
                    results.append(model(ids, positions, None, packed_seq_params=bounds).float())
                modules = list(model.modules())
                fused |= {m.fuse_wgrad_accumulation for m in modules if hasattr(m, "ub_name")}
            error = float((results[1] - results[0]).norm() / results[0].norm())
            asks = model.output_layer.gradient_accumulation_fusion
            found[f"{trained} {output}"] = fused, asks, tuple(results[1].shape), error
    destroy_groups()
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_the_head_needs_no_apex(version: str, tmp_path: Path) -> None:
    """megatron-core's own output layer is refused with the fusion that its layers have."""
    folder = TinyModel("qwen3", False, 160, "bfloat16").save(tmp_path)
    found = spawn(version, _heads, 1, str(folder))[0]
    assert not found.pop("apex"), "apex is here: this proves nothing"
    for key, (fused, asks_for_apex, shape, error) in found.items():
        trained, output = key.split()
        assert fused == {trained == "True"} and not asks_for_apex, key
        assert shape == (1, 19, {"hidden": 64, "logits": 160}[output]), key
        assert error <= 0.03, key
