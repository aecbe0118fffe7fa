"""One training step in one process, with transformers and plain autograd: what must come out.

Written from method.md, not from the package: of megatron_vopd only the data types of a rollout
are used. No packing, no microbatches, no shards; the optimizer's first step is written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_vopd.types import Rollout

CAP = 2.0
REVERSE_WEIGHT = 0.3
GATE = 3.5


@dataclass(frozen=True)
class Adam:
    """Numbers of the update. eps is large: with 1e-8 a gradient that is nothing but rounding moves
    its weight by a whole step, in a direction that depends on the order of a sum."""

    learning_rate: float = 1e-3
    eps: float = 1e-5
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass(frozen=True)
class Reference:
    """Token-mean loss, its gradient before clipping, and the weights after one update, by HF name.

    `statistics`: sums over tokens of the numbers that metrics report.
    """

    loss: float
    num_tokens: int
    gradients: dict[str, Tensor]
    grad_norm: float
    updated: dict[str, Tensor]
    initial: dict[str, Tensor]
    statistics: dict[str, float]


def load(model_dir: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def response_logits(model: torch.nn.Module, rollout: Rollout) -> Tensor:
    """Compute the logits [T, V] that predict the response, from the unpadded sequence alone."""
    ids = [*rollout.prompt.ids, *rollout.response_ids]
    logits = model(torch.tensor([ids])).logits[0]
    first = len(rollout.prompt.ids) - 1
    return logits[first : first + len(rollout.response_ids)]


def token_losses(
    kind: str,
    student_TV: Tensor,
    teacher_TV: Tensor | None,
    labels_T: Tensor,
    rollout_logprob_T: Tensor | None,
    topk: int = 0,
    task_advantage: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the loss of every token [T], and sums of statistics.

    Args:
        kind: opd, vopd_full, vopd_topk, vopd_topk_tail, vopd_optimal (sampled); reverse, forward,
            mixed (or mixed:WEIGHT, of the reverse KL), topk_reverse, hard; gated (vopd_full, and
            forward KL above GATE).
    """
    log_p = student_TV.log_softmax(-1)
    chosen = log_p.gather(-1, labels_T[:, None])[:, 0]
    if kind == "hard":
        return -chosen, {}
    assert teacher_TV is not None
    log_q = teacher_TV.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    reverse = (p * (log_p - log_q)).sum(-1)
    forward = (q * (log_q - log_p)).sum(-1)
    sums = {"reverse": reverse.sum().item(), "forward": forward.sum().item()}
    if kind == "reverse":
        return reverse, sums
    if kind == "forward":
        return forward, sums
    if kind.startswith("mixed"):
        weight = float(kind.partition(":")[2] or REVERSE_WEIGHT)
        return weight * reverse + (1 - weight) * forward, sums
    if kind == "topk_reverse":
        return _renormalised(student_TV, teacher_TV, topk), sums
    with torch.no_grad():
        reward = log_q.gather(-1, labels_T[:, None])[:, 0] - chosen
        value = _value(kind, log_p, log_q, student_TV, teacher_TV, topk)
        advantage = reward - value + task_advantage
        sums |= {"advantage": float(advantage.sum()), "reward": float(reward.sum())}
        weight = torch.ones_like(advantage)
        if rollout_logprob_T is not None:
            weight = (chosen - rollout_logprob_T).exp().clamp(max=CAP)
    losses = -weight * advantage * chosen
    if kind == "gated":
        gate = -(q * log_q).sum(-1) > GATE
        sums["gated"] = float(gate.sum())
        losses = losses + torch.where(gate, forward, 0.0)
    return losses, sums


def _value(
    kind: str, log_p: Tensor, log_q: Tensor, student_TV: Tensor, teacher_TV: Tensor, topk: int
) -> Tensor:
    """Return V(c_t) of the sampled estimators."""
    p = log_p.exp()
    reverse = (p * (log_p - log_q)).sum(-1)
    if kind == "opd":
        return torch.zeros_like(reverse)
    if kind == "vopd_topk":
        return -_renormalised(student_TV, teacher_TV, topk)
    if kind == "vopd_topk_tail":
        chosen = student_TV.topk(topk).indices
        log_ps, log_qs = log_p.gather(-1, chosen), log_q.gather(-1, chosen)
        tail_p = (1 - log_ps.exp().sum(-1)).clamp(min=1e-7)
        tail_q = (1 - log_qs.exp().sum(-1)).clamp(min=1e-7)
        return -((log_ps.exp() * (log_ps - log_qs)).sum(-1) + tail_p * (tail_p / tail_q).log())
    if kind == "vopd_optimal":
        square = (p**2).sum(-1)
        cross = (p**2 * (log_p - log_q)).sum(-1)
        return ((1 + square) * -reverse + 2 * cross) / (1 - square)
    return -reverse


def _renormalised(student_TV: Tensor, teacher_TV: Tensor, topk: int) -> Tensor:
    chosen = student_TV.topk(topk).indices
    log_p = student_TV.gather(-1, chosen).log_softmax(-1)
    log_q = teacher_TV.gather(-1, chosen).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reference_step(
    student_dir: str | Path,
    teacher_dirs: Mapping[str, str | Path],
    rollouts: Sequence[Rollout],
    kind: str,
    topk: int = 0,
    task_advantages: Sequence[float] | None = None,
    adam: Adam | None = None,
) -> Reference:
    """Take one training step in this process; `kind` as in `token_losses`."""
    adam = adam or Adam()
    student = load(student_dir)
    teachers = {key: load(path) for key, path in teacher_dirs.items()}
    total, num_tokens, statistics = torch.zeros(()), 0, dict[str, float]()
    for index, rollout in enumerate(rollouts):
        if not rollout.response_ids:
            continue
        teacher_TV = None
        if kind != "hard":
            with torch.no_grad():
                teacher_TV = response_logits(teachers[rollout.prompt.teacher], rollout)
        logprobs = rollout.rollout_logprobs
        student_TV = response_logits(student, rollout)
        width = student_TV.shape[1] if teacher_TV is None else teacher_TV.shape[1]
        losses, sums = token_losses(
            kind,
            student_TV[:, :width],
            None if teacher_TV is None else teacher_TV[:, : student_TV.shape[1]],
            torch.tensor(rollout.response_ids),
            None if logprobs is None else torch.tensor(logprobs),
            topk,
            0.0 if task_advantages is None else task_advantages[index],
        )
        total = total + losses.sum()
        num_tokens += len(losses)
        statistics = {key: statistics.get(key, 0.0) + value for key, value in sums.items()}
    loss = total / num_tokens
    loss.backward()
    return _updated(student, loss.item(), num_tokens, statistics, adam)


def _updated(
    student: torch.nn.Module, loss: float, num_tokens: int, statistics: dict, adam: Adam
) -> Reference:
    parameters = dict(student.named_parameters())
    nothing = {name: torch.zeros_like(p) for name, p in parameters.items()}
    gradients = {
        name: nothing[name] if p.grad is None else p.grad.clone() for name, p in parameters.items()
    }
    norm = float(torch.stack([g.double().norm() for g in gradients.values()]).norm())
    scale = min(1.0, adam.clip_grad / (norm + 1e-6)) if adam.clip_grad else 1.0
    updated = {}
    for name, parameter in parameters.items():
        gradient = gradients[name] * scale
        # First step of Adam: both moments, corrected for their start at zero, are g and g^2.
        direction = gradient / (gradient.abs() + adam.eps)
        decay = adam.weight_decay if parameter.dim() > 1 else 0.0
        start = parameter.detach()
        updated[name] = start * (1 - adam.learning_rate * decay) - adam.learning_rate * direction
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    named = (_as_on_disk(tensors) for tensors in (gradients, updated, initial))
    gradients, updated, initial = named
    return Reference(loss, num_tokens, gradients, norm, updated, initial, statistics)


def _as_on_disk(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate experts, as checkpoints hold them; transformers stacks them in memory."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        stem, kind = name.rsplit(".", 1)
        for expert, weight in enumerate(tensor):
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part_name, part in zip(names, weight.chunk(len(names)), strict=True):
                found[f"{stem}.{expert}.{part_name}.weight"] = part
    return found
