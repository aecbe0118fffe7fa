"""megatron-core on the CPU: optimizer checkpoints across layouts, dispatch, random states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_vopd.megatron.weights import export_weights
from tests.support.harness import spawn
from tests.support.layouts import DENSE_CASES, MOE_CASES, Case, build, enter
from tests.support.tiny_models import TinyModel
from tests.support.training import forward_backward, make_microbatches, make_optimizer, wrap

# Adam's moments in a form that any layout can load; the other forms pickle, or cannot be resharded.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def _steps(case: Case, model_dir: str, folder: str, load: bool, steps: int) -> dict:
    """On a rank: load or begin, take steps with the distributed optimizer, save."""
    groups = enter(case)
    model, facts = build(model_dir, case, groups)
    ddp = wrap(model, groups, use_distributed_optimizer=True)
    optimizer = make_optimizer(ddp, distributed=True)

    def state(is_loading: bool) -> dict:
        weights = model.sharded_state_dict(metadata=METADATA)
        moments = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=METADATA)
        return {"model": weights, "optimizer": moments}

    if load:
        # torch's Adam has no state to load into before its first step; on zero gradients that step
        # moves nothing.
        ddp.zero_grad_buffer()
        optimizer.step()
        loaded: Any = dist_checkpointing.load(state(True), folder)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        batches = make_microbatches(157)[groups.coordinates.dp :: groups.layout.dp]
        forward_backward(ddp, facts, groups, batches, case.sequence_parallel)
        norms.append(float(optimizer.step()[1]))
    if not load:
        dist_checkpointing.save(state(False), folder)
    return {
        "norms": norms,
        "weights": {k: v.clone() for k, v in export_weights(model, facts, groups)},
    }


@pytest.mark.parametrize(
    ("model", "saved", "resumed"),
    [
        (TinyModel("qwen3", True, 157), DENSE_CASES[5], DENSE_CASES[4]),
        (TinyModel("qwen3_moe", False, 157), MOE_CASES[1], MOE_CASES[4]),
    ],
    ids=["tp2pp2-to-dp2", "ep2-to-tp2ep2"],
)
def test_optimizer_checkpoint_resumes_in_another_layout(
    model: TinyModel, saved: Case, resumed: Case, tmp_path: Path
) -> None:
    model_dir, folder = str(model.save(tmp_path)), tmp_path / "checkpoint"
    folder.mkdir()
    whole_dir = tmp_path / "whole"
    whole_dir.mkdir()
    size = saved.layout.world_size
    whole = spawn(_steps, size, saved, model_dir, str(whole_dir), False, 4)[0]
    spawn(_steps, size, saved, model_dir, str(folder), False, 2)
    rest = spawn(_steps, resumed.layout.world_size, resumed, model_dir, str(folder), True, 2)[0]
    assert rest["norms"] == pytest.approx(whole["norms"][2:], rel=1e-5)
    for name, tensor in whole["weights"].items():
        # Adam moves a weight by up to 1e-3 a step: lost moments would show a hundredfold.
        assert float((tensor - rest["weights"][name]).abs().max()) <= 1e-5, name


def _random_states() -> dict:
    enter(DENSE_CASES[2])
    torch.manual_seed(5)
    plain = torch.rand(4)
    tracker: Any = get_cuda_rng_tracker()
    torch.manual_seed(5)
    with tracker.fork():
        forked = torch.rand(4)
    after = torch.rand(4)
    with tracker.fork():
        again = torch.rand(4)
    return {"plain": plain, "forked": forked, "after": after, "again": again}


def test_random_states_fork_and_come_back() -> None:
    """A fork draws from tensor-parallel states of its own, apart on each rank, then steps back."""
    first, second = spawn(_random_states, 2)
    assert torch.equal(first["plain"], first["after"])
    assert not torch.equal(first["forked"], first["plain"])
    assert not torch.equal(first["forked"], first["again"])
    assert not torch.equal(first["forked"], second["forked"])


def _uneven_exchange() -> list[float]:
    """Send 1 and 2 elements from rank 0, 3 and 0 from rank 1; the splits are tensors."""
    enter(DENSE_CASES[4])
    rank = dist.get_rank()
    sent = torch.full((3,), float(rank))
    splits_in = torch.tensor([[1, 2], [3, 0]])
    received = torch.empty(int(splits_in[:, rank].sum()))
    dist.all_to_all_single(received, sent, splits_in[:, rank], splits_in[rank])
    return received.tolist()


def test_uneven_all_to_all_takes_tensors_as_splits() -> None:
    assert spawn(_uneven_exchange, 2) == [[0, 1, 1, 1], [0, 0]]


def _devices() -> list[str]:
    enter(DENSE_CASES[0])
    made = [
        torch.zeros(1, device="cuda"),
        torch.zeros(1, device=torch.device("cuda", 0)),
        torch.zeros(1, device=torch.cuda.current_device()),
        torch.zeros(1).cuda(),
        torch.zeros(1).to("cuda"),
        torch.zeros(1, pin_memory=True),
    ]
    return [str(tensor.device) for tensor in made]


def test_cuda_devices_become_the_cpu() -> None:
    assert spawn(_devices, 1)[0] == ["cpu"] * 6
