"""F13: bytes of a checkpoint that each data-parallel rank writes and reads.

Counted on gloo ranks: what lies in each rank's file, and what each rank copies out of the files.
The vocabulary is most of the model, so that a share by whole tensors would not do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_vopd.checkpoint.index import read_index
from megatron_vopd.checkpoint.sharded import CheckpointReader, entries, renamed
from megatron_vopd.megatron.groups import init_world
from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.layouts import Case
from tests.support.resumable import make, raw_state
from tests.support.steps import Setup
from tests.support.tiny_models import TinyModel

OVERRIDES = (("num_hidden_layers", 2),)
DENSE = TinyModel("qwen3", True, 3001, overrides=OVERRIDES)
MOE = TinyModel("qwen3_moe", False, 3001, overrides=(*OVERRIDES, ("moe_intermediate_size", 160)))
# Name -> layout, distributed optimizer, type.
CASES = {
    "dp2": (Layout(2), True, torch.float32),
    "dp2-bf16": (Layout(2), True, torch.bfloat16),
    "dp2-replicas": (Layout(2), False, torch.bfloat16),
    "moe-ep2": (Layout(2, ep=2), True, torch.bfloat16),
    "dp4": (Layout(4), True, torch.bfloat16),
    "dp4-replicas": (Layout(4), False, torch.float32),
    "tp2-dp2": (Layout(4, tp=2), True, torch.bfloat16),
    "moe-dp4-ep2": (Layout(4, ep=2), True, torch.bfloat16),
    "moe-dp4-ep2-replicas": (Layout(4, ep=2), False, torch.float32),
}


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Setup]:
    """Save a dense student and one with experts, by whether it has them."""
    root = tmp_path_factory.mktemp("models")
    teacher = {"teacher": str(DENSE.save(root / "teacher", 1))}
    return {
        has_experts: Setup(Case("", Layout(1)), str(model.save(root)), teacher)
        for has_experts, model in ((False, DENSE), (True, MOE))
    }


def _kind(key: str) -> str:
    owner = "experts" if ".experts." in key else "dense"
    return f"{'state' if key.startswith('optimizer.') else 'weights'} {owner}"


def _written(folder: Path) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Count the bytes of each kind in each file, and of each kind in all files."""
    by_file, total = Counter[tuple[str, str]](), Counter[str]()
    for key, tensor in read_index(folder).items():
        if key == "random_states":
            continue
        for chunk in tensor.chunks:
            size = prod(chunk.sizes) * getattr(torch, tensor.dtype).itemsize
            by_file[chunk.file, _kind(key)] += size
            total[_kind(key)] += size
    return by_file, total


def _one(setup: Setup, root: Path, name: str) -> dict[str, Any]:
    """Train a step, save, load into another run: the bytes that this rank wrote and read."""
    layout, distributed, dtype = CASES[name]
    own = replace(setup, case=Case("", layout), teacher_layout=Layout(layout.world_size))
    own = replace(own, distributed=distributed, dtype=dtype)
    first = make(own, root / name)
    first.trainer.train_step()
    expected, folder = raw_state(first), first.checkpoints.save()
    del first
    read, fill = Counter[str](), CheckpointReader.fill

    def counted(reader: CheckpointReader, shard: Any) -> None:
        read[_kind(shard.key)] += shard.data.nbytes
        fill(reader, shard)

    second = make(own, root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointReader, "fill", counted)
        second.checkpoints.load(folder)
    found = raw_state(second)
    by_file, total = _written(folder)
    file = f"__{dist.get_rank()}_0.distcp"
    return {
        "different": [key for key in expected if expected[key] != found.get(key)],
        "written": {kind: by_file[file, kind] / total[kind] for kind in total},
        "read": {kind: read[kind] / total[kind] for kind in total},
        "file": (folder / file).stat().st_size / sum(total.values()),
    }


def _all(setups: dict[bool, Setup], root: Path, world_size: int) -> dict[str, Any]:
    init_world("cpu")
    names = [name for name, (layout, *_) in CASES.items() if layout.world_size == world_size]
    return {name: _one(setups["moe" in name], root, name) for name in names}


@pytest.fixture(scope="module")
def counts(
    setups: dict[bool, Setup], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Return what each rank counted, by case."""
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size in (2, 4):
        ranks = spawn(_all, world_size, setups, tmp_path_factory.mktemp("runs"), world_size)
        found |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_rank_writes_its_share_and_reads_no_more(name: str, counts: dict[str, list]) -> None:
    """F13: at most 2 / dp of the state, written and read; and the state is what it was."""
    layout, distributed, _ = CASES[name]
    ranks = layout.world_size
    for rank, found in enumerate(counts[name]):
        print(f"\n{name}, rank {rank}: wrote {found['written']}, read {found['read']}")
        assert not found["different"]
        # Tensors that are not cut over tp or ep are written by one of those ranks, so the bound is
        # that of data parallelism; padding of buffers makes the first slices a little longer.
        assert all(share <= 1.05 / layout.dp for share in found["written"].values())
        # With names and headers of small chunks.
        assert found["file"] <= 1.3 / layout.dp
        if distributed:
            states = [share for kind, share in found["read"].items() if "state" in kind]
            assert states and all(share <= 1.05 / layout.dp for share in states)
    if "moe" in name:
        # Every rank has its own quarter (half) of the experts' state: ep x their own dp.
        shares = [found["written"]["state experts"] for found in counts[name]]
        assert max(shares) <= 1.05 / ranks


def _stock(setup: Setup, root: Path) -> dict[str, bool]:
    """Load the slices' checkpoint with megatron-core, into the shapes of whole replicas."""
    init_world("cpu")
    own = replace(setup, case=Case("", Layout(2)), teacher_layout=Layout(2))
    sliced = make(replace(own, distributed=True), root / "sliced")
    sliced.trainer.train_step()
    folder = sliced.checkpoints.save()
    whole = make(own, root / "whole")
    whole.trainer.train_step()
    inner = whole.student.optimizer.optimizer
    same = {}
    places = entries(whole.student.bare.sharded_state_dict())
    for kind in ("exp_avg", "exp_avg_sq"):
        wanted: dict[str, Any] = {
            name: renamed(place, f"optimizer.state.{kind}", torch.float32)
            for name, place in places.items()
        }
        for place in wanted.values():
            place.data = torch.full(place.data.shape, torch.nan)
        loaded: Any = dist_checkpointing.load(wanted, str(folder), strict="ignore_all")
        for name, parameter in whole.student.bare.named_parameters():
            same[f"{kind} {name}"] = torch.equal(loaded[name], inner.state[parameter][kind])
    return same


def test_megatron_core_reads_slices_as_whole_moments(
    setups: dict[bool, Setup], tmp_path: Path
) -> None:
    """Moments that two ranks wrote by slices are those of a run that keeps them whole."""
    for same in spawn(_stock, 2, setups[False], tmp_path):
        assert len(same) > 30
        assert not [name for name, equal in same.items() if not equal]
