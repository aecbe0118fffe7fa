"""The linear form on one rank: Megatron's gradient hooks, memory, and modes that agree in bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from megatron_vopd import objectives
from megatron_vopd.vocab_parallel import VocabShard, linear_distill_loss
from tests.support.settings import objective_settings

V, D, T = 61, 8, 10


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    store = FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield VocabShard(0, V, group)
    dist.destroy_process_group()


def mixed(stats):
    return objectives.coefficients("mixed", stats, objective_settings())


class Stage:
    """One pipeline stage's embedding and head with the hooks that Megatron's DDP installs.

    The hook is the protocol under test: it asserts a gradient when the reduction overlaps, adds it
    to main_grad unless the operator has done so itself, and drops it.
    """

    def __init__(self, tied: bool, stages: int, overlap: bool) -> None:
        generator = torch.Generator().manual_seed(2)
        table = torch.randn(V, D, generator=generator)
        self.embedding = torch.nn.Parameter(table.clone())
        one_parameter = tied and stages == 1
        self.head = self.embedding if one_parameter else torch.nn.Parameter(table.clone())
        self.overlap, self.tied, self.stages = overlap, tied, stages
        if one_parameter:
            # Megatron marks a weight shared by two layers of one stage.
            self.head.zero_out_wgrad = True  # pyright: ignore[reportAttributeAccessIssue]
        for parameter in {id(p): p for p in (self.embedding, self.head)}.values():
            parameter.main_grad = torch.zeros_like(parameter)  # pyright: ignore
            parameter.grad_added_to_main_grad = False  # pyright: ignore
            self.head_hook = parameter.register_post_accumulate_grad_hook(self.hook)

    def leave_head_alone(self) -> None:
        """Let the head accumulate in .grad, as without fused accumulation."""
        if self.head is not self.embedding:
            self.head_hook.remove()
            del self.head.main_grad  # pyright: ignore

    def hook(self, parameter) -> None:
        if self.overlap:
            assert parameter.grad is not None
        wanted = not parameter.grad_added_to_main_grad or getattr(
            parameter, "zero_out_wgrad", False
        )
        if parameter.grad is not None and wanted:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
        parameter.grad_added_to_main_grad = False

    def gradients(self) -> list[Any]:
        embedding = self.embedding.main_grad  # pyright: ignore
        head = getattr(self.head, "main_grad", self.head.grad)
        if self.tied and self.stages == 2:
            # The reduction between the first and the last stage, which share the weight.
            return [embedding + head]
        return [embedding] if self.tied else [embedding, head]


def microbatches():
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        ids, labels = torch.randint(0, V, (2, T), generator=generator)
        yield ids, labels, torch.randn(T, D, generator=generator)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("mode", ["grad_in_forward", "recompute"])
def test_main_grad_holds_the_whole_gradient_of_three_microbatches(
    shard, tied, stages, fusion, overlap, mode
):
    teacher = torch.randn(V, D, generator=torch.Generator().manual_seed(4))
    stage = Stage(tied, stages, overlap)
    if not fusion:
        # An untied head outside of DDP has no main_grad: dW is returned, and autograd keeps it.
        stage.leave_head_alone()
    plain = [stage.embedding.detach().clone().requires_grad_() for _ in range(2)]
    for ids, labels, teacher_hidden in microbatches():
        hidden = stage.embedding[ids].tanh()
        arguments = (hidden, stage.head, teacher_hidden, teacher, labels, shard, mixed)
        loss, _ = linear_distill_loss(*arguments, chunk=4, mode=mode)
        loss.backward()
        x = plain[0][ids].tanh() @ plain[1].T
        log_p, log_q = x.log_softmax(-1), (teacher_hidden @ teacher.T).log_softmax(-1)
        reverse = (log_p.exp() * (log_p - log_q)).sum()
        forward = (log_q.exp() * (log_q - log_p)).sum()
        (0.2 * reverse + 0.8 * forward).backward()
    assert plain[0].grad is not None and plain[1].grad is not None
    expected = [plain[0].grad + plain[1].grad] if tied else [plain[0].grad, plain[1].grad]
    for actual, wanted in zip(stage.gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_agree_and_frozen_parts_get_no_gradient(shard, dtype):
    generator = torch.Generator().manual_seed(6)
    x, w, y, u = (torch.randn(n, D, generator=generator).to(dtype) for n in (T, V, T, V))
    labels = torch.arange(T)
    results = []
    for mode in ("grad_in_forward", "recompute"):
        hidden, head = (z.clone().requires_grad_() for z in (x, w))
        loss, stats = linear_distill_loss(
            hidden, head, y, u, labels, shard, mixed, chunk=3, mode=mode
        )
        assert not stats.reverse_kl_T.requires_grad
        loss.backward(retain_graph=True)
        if mode == "grad_in_forward":
            with pytest.raises(RuntimeError, match="recompute"):
                loss.backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    hidden = x.clone().requires_grad_()
    loss, _ = linear_distill_loss(hidden, w, y, u, labels, shard, mixed, chunk=3)
    loss.backward()
    torch.testing.assert_close(hidden.grad, results[0][1], rtol=0, atol=0)
    empty, _ = linear_distill_loss(x[:0].requires_grad_(), w, y[:0], u, labels[:0], shard, mixed)
    assert empty == 0 and empty.requires_grad


PEAK = """
import sys, tempfile, torch, torch.distributed as dist
from megatron_vopd import objectives
from megatron_vopd.config.method import ObjectiveSection
from megatron_vopd.run.settings import objective_of
from megatron_vopd.vocab_parallel import VocabShard, distill_stats, linear_distill_loss
form, T, V, D = sys.argv[1], int(sys.argv[2]), 16001, 32
dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
shard = VocabShard(0, V, dist.group.WORLD)
x, y = torch.randn(T, D).requires_grad_(), torch.randn(T, D)
w, u = torch.randn(V, D).requires_grad_(), torch.randn(V, D)
labels = torch.randint(0, V, (T,))
torch.set_num_threads(1)
settings = objective_of(ObjectiveSection(reverse_weight=0.2), 1.0).settings
fn = lambda s: objectives.coefficients("mixed", s, settings)
def status(key):
    return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports
before = status("VmRSS")
if form == "materialised":
    stats = distill_stats(x @ w.T, y @ u.T, labels, shard)
    loss = (0.2 * stats.reverse_kl_T + 0.8 * stats.forward_kl_T).sum()
else:
    loss, _ = linear_distill_loss(x, w, y, u, labels, shard, fn, chunk=512, mode=form)
loss.backward()
print(status("VmHWM") - before)
"""


def peak_mib(form: str, num_tokens: int) -> float:
    """Measure the resident peak's growth by one forward and backward, in a process of its own."""
    command = [sys.executable, "-c", PEAK, form, str(num_tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["grad_in_forward", "recompute"])
def test_peak_memory_is_flat_in_tokens(mode):
    peaks = {num_tokens: peak_mib(mode, num_tokens) for num_tokens in (1024, 2048, 4096, 8192)}
    logits_mib = 16001 * 512 * 4 / 2**20
    # Two chunks of logits and their like; what grows with T are [T, D] gradients and [T] columns.
    assert 2 * logits_mib < peaks[1024] < peaks[8192] < peaks[1024] + 0.5 * logits_mib, peaks
    materialised = peak_mib("materialised", 8192)
    print(f"peak MiB beside the inputs, {mode}: {peaks}; materialised at 8192: {materialised:.0f}")
    assert materialised > 8 * peaks[8192]
