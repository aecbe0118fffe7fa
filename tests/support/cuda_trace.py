"""A step's loss on fake CUDA tensors: run with a CUDA build of torch and of the extension, no GPU.

Nothing is computed. Shapes and dtypes go through packing, the loss operator forward and backward,
and the metrics, on one rank of a made-up world of two; a dispatch mode notes every operation that
would make the host wait for the device, and every collective with a tensor that is not on it.
Prints one JSON object.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vopd.megatron.microbatch import PackingSettings
from megatron_vopd.objectives import Objective, coefficients
from megatron_vopd.ops import native
from megatron_vopd.ops.fields import Coefficients, DistillStats
from megatron_vopd.ops.linear import LinearDistillFunction
from megatron_vopd.trainer import metrics
from megatron_vopd.trainer.packing import pack
from megatron_vopd.types import Prompt, Rollout
from megatron_vopd.vocab_parallel import VocabShard, linear_distill_loss
from tests.support.pretend_cuda import Context
from tests.support.settings import objective_named

VOCAB_SIZE, HIDDEN_SIZE, CHUNK = 1003, 64, 8
CUDA = torch.device("cuda:0")
# They read values on the host, or have a shape that depends on values.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")


def tensors_of(arguments: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists and tuples."""
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    if isinstance(arguments, (list, tuple)):
        return [tensor for argument in arguments for tensor in tensors_of(argument)]
    return []


class Watch(TorchDispatchMode):
    """Notes what waits for the device, what a collective takes from the host, and GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.off_device: list[str] = []
        self.collectives: list[str] = []
        self.products: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one operation and run it."""
        kwargs = kwargs or {}
        library, _, name = func._schema.name.partition("::")
        given = tensors_of([*args, *kwargs.values()])
        result = func(*args, **kwargs)
        if library in ("c10d", "_c10d_functional"):
            self.collectives.append(name)
            self.off_device += [name for tensor in given if tensor.device.type != "cuda"]
        on_device = any(tensor.device.type == "cuda" for tensor in given)
        by_mask = name == "index" and any(t.dtype == torch.bool for t in given[1:])
        to_host = any(t.device.type == "cpu" for t in tensors_of(result)) and name in (
            "_to_copy",
            "copy_",
        )
        if on_device and (name in WAITING or by_mask or to_host):
            self.waits.append(name)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.products.append(f"{name}.{func._overloadname}")
        return result


def registered() -> dict[str, list[str]]:
    """Return the dispatch keys under which each operator has a kernel."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        operator: [key for key in ("CPU", "CUDA") if has(f"megatron_vopd::{operator}", key)]
        for operator in native.OPERATORS
    }


def rollouts() -> list[Rollout]:
    """Return three responses of different lengths, one of them from a data set."""
    made = []
    for sample, length in enumerate((5, 11, 3)):
        prompt = Prompt(f"p{sample}", tuple(range(1, 4 + sample)))
        logprobs = None if sample == 2 else (-0.5,) * length
        made.append(Rollout(prompt, sample, tuple(range(length)), logprobs, "stop", 0))
    return made


def traced(objective: Objective, group: dist.ProcessGroup) -> dict[str, Any]:
    """Run one packed row through loss and metrics; return what was seen in each."""
    ((planned,),) = pack(rollouts(), PackingSettings(num_replicas=1, max_tokens=64))
    row = planned.microbatch
    operator, sums, reduction = Watch(), Watch(), Watch()
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        new = torch.empty
        context = Context()
        LinearDistillFunction.apply = partial(LinearDistillFunction.forward, context)
        shard = VocabShard(0, VOCAB_SIZE // 2, group)
        dtype = torch.bfloat16
        hidden = new(len(row.labels_T), HIDDEN_SIZE, dtype=dtype, device=CUDA)
        head = new(shard.num_valid, HIDDEN_SIZE, dtype=dtype, device=CUDA)
        labels, logprobs = row.labels_T.to(CUDA), row.rollout_logprob_T
        assert logprobs is not None
        logprobs = logprobs.to(CUDA)

        def weights(stats: DistillStats) -> Coefficients:
            given = torch.where(
                logprobs[stats.tokens].isnan(), stats.student_logprob_T, logprobs[stats.tokens]
            )
            return coefficients(objective.name, stats, objective.settings, given)

        with operator:
            loss, stats = linear_distill_loss(
                hidden,
                head,
                torch.empty_like(hidden),
                torch.empty_like(head),
                labels,
                shard,
                weights,
                topk=objective.topk,
                chunk=CHUNK,
                mode=objective.mode,
                check_ranks=False,
            )
            one = torch.ones((), device=CUDA)
            dhidden, dhead = LinearDistillFunction.backward(context, one)[:2]
        for gradient, like in ((dhidden, hidden), (dhead, head)):
            assert gradient is not None
            assert (gradient.shape, gradient.dtype, gradient.device) == (
                like.shape,
                like.dtype,
                like.device,
            )
        with sums:
            found = metrics.token_sums(objective, stats, logprobs)
            total: dict[str, torch.Tensor] = {}
            metrics.add_sums(total, found)
            metrics.add_sums(total, {"loss/mean": loss.detach().double()})
        with reduction:
            reduce_until_sent(total)
    return {
        "operator": vars_of(operator),
        "metrics": vars_of(sums),
        "reduction": vars_of(reduction),
    }


class SentError(Exception):
    """The reduction has reached its all-reduce, whose numbers do not exist."""


def reduce_until_sent(total: dict[str, torch.Tensor]) -> None:
    """Run `reduce_sums` as on NCCL, up to its collective."""
    backend, reduce = dist.get_backend, dist.all_reduce

    def send(tensor: torch.Tensor, *arguments: Any, **options: Any) -> None:
        reduce(tensor, *arguments, **options)
        raise SentError

    dist.get_backend, dist.all_reduce = lambda *_: "nccl", send
    try:
        metrics.reduce_sums(total, contributes=True)
    except SentError:
        pass
    finally:
        dist.get_backend, dist.all_reduce = backend, reduce


def vars_of(watch: Watch) -> dict[str, list[str]]:
    """Return the lists of a watch."""
    return {
        "waits": watch.waits,
        "off_device": watch.off_device,
        "collectives": watch.collectives,
        "products": watch.products,
    }


def main() -> None:
    """Print what was found."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    kernels = native.resolve("auto", CUDA, torch.float32)
    cases = {}
    for mode in ("grad_in_forward", "recompute"):
        for topk in (0, 100):
            named = objective_named("sampled", topk, baseline="topk" if topk else "full")
            objective = Objective(named.name, named.settings, topk, 1.0, CHUNK, mode)
            cases[f"{mode}, top-{topk}"] = traced(objective, group)
    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "build_info": native.build_info(),
        "kernels": kernels.name,
        "registered": registered(),
        "cases": cases,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
