"""The TransformerEngine layers against the project's table and its own layers, without a GPU.

TransformerEngine's Python is real, its kernels are torch (tests/support/te). So this proves names,
shapes, marks, layouts, collectives and what the kernels are asked for; it proves no kernel.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megatron_vopd.checkpoint.sharded import entries
from megatron_vopd.config import load_config
from megatron_vopd.config.world import layouts
from megatron_vopd.hf.facts import kv_repeat
from megatron_vopd.hf.mapping import shard_parameters
from megatron_vopd.hf.tensors import read_config
from megatron_vopd.megatron.groups import Groups, independent_groups, student_groups
from megatron_vopd.megatron.model import ModelOptions, build_model
from megatron_vopd.types import Layout
from tests.support import ROOT
from tests.support.te.worlds import VERSIONS, spawn
from tests.support.tiny_models import ARCHITECTURES, TinyModel

MODELS = ROOT / "tests" / "fixtures" / "models"


@dataclass(frozen=True)
class Built:
    """One model of one rank: what differs from the table, and how much there is of it.

    Attributes:
        differences: names or shapes that only TransformerEngine or only the table has.
        entries: tensors in its sharded state dict, by local name.
    """

    model: str
    rank: int
    num_parameters: int
    differences: list[Any]
    entries: list[str]
    layers: list[int]


def _built(
    name: str, folder: str, groups: Groups, trained: bool, sequence_parallel: bool = False
) -> Built:
    config, facts = read_config(folder)
    options = ModelOptions(
        torch.bfloat16, "cuda", "te", sequence_parallel=sequence_parallel, trained=trained
    )
    model = build_model(config, facts, groups, options)
    repeat = kv_repeat(facts, groups.layout.tp, trained)
    table = shard_parameters(facts, groups.layout, groups.coordinates, "te", repeat)
    wanted = {(key, plan.shape) for key, plan in table.items()}
    found = {(key, tuple(p.shape)) for key, p in model.named_parameters()}
    return Built(
        name,
        groups.process_groups.tp.rank() if groups.layout.world_size == 1 else _rank(),
        len(found),
        sorted(found ^ wanted),
        sorted(entries(model.sharded_state_dict())),
        [layer.layer_number for layer in model.decoder.layers],
    )


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _example(name: str, ranks: list[int], world_size: int) -> list[Built]:
    """On a rank: build the student and the teachers of an example as ranks of its own world."""
    from tests.support.te import gpu
    from tests.support.te.fake_world import fake_world

    config = load_config(ROOT / "examples" / name / "config.yaml", [])
    cuts = layouts(config, world_size)
    paths = {"student": config.student.path}
    paths |= {key: teacher.path for key, teacher in config.named_teachers.items()}
    found = []
    for rank in ranks:
        begin = time.monotonic()
        with fake_world(rank, world_size), gpu.built_on("meta"):
            own = {"student": student_groups(cuts["student"])}
            own |= {key: independent_groups(cuts[key]) for key in config.named_teachers}
            print("groups", time.monotonic() - begin)
            for key, path in paths.items():
                folder, is_student = str(MODELS / path.split("/")[1]), key == "student"
                cut = is_student and config.parallel.sequence_parallel
                found.append(_built(key, folder, own[key], is_student, cut))
                print(name, rank, key, time.monotonic() - begin)
    return found


EXAMPLES = {
    "math_qwen3_1.7b": (1, [0]),
    "math_qwen3_4b": (8, [5]),
    "qwen3_8b_from_32b": (8, [0, 7]),
    "qwen3_4b_from_235b": (64, [0, 31, 32, 61]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    world_size, ranks = EXAMPLES[name]
    for built in spawn(VERSIONS[1], _example, 1, name, ranks, world_size)[0]:
        print(built.model, built.rank, built.num_parameters, len(built.entries), built.layers[:1])
        assert not built.differences
