"""The student's own log-probs and entropies of given tokens, in its layout, without gradients.

Used by the probe after a weight push (the engine's log-probs against the trainer's) and for the
entropy on held-out prompts that gates the length curriculum.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from megatron_vopd.collectives import sum_over_world
from megatron_vopd.megatron.forward import forward_hidden
from megatron_vopd.megatron.microbatch import cp_shard, cp_tokens
from megatron_vopd.megatron.student import Student
from megatron_vopd.megatron.teacher import student_shard
from megatron_vopd.trainer.packing import pack
from megatron_vopd.types import Prompt, Rollout
from megatron_vopd.vocab_parallel import linear_distill_stats


def student_statistics(
    student: Student, rollouts: Sequence[Rollout], max_tokens: int, temperature: float = 1.0
) -> list[torch.Tensor]:
    """Compute log p(a) and the entropy of every response token, in nats.

    A collective of the whole world: a forward pass, the statistics of `vocab_parallel` over tp, and
    an all-reduce of two fp64 numbers per response token.

    Args:
        rollouts: the same on every rank.
        max_tokens: longest packed row.
        temperature: temperature of the student's distribution.

    Returns:
        One [2, length] fp64 tensor on the CPU per rollout, the same on every rank.
    """
    groups, at = student.groups, student.groups.coordinates
    starts = [0]
    for rollout in rollouts:
        starts.append(starts[-1] + len(rollout.response_ids))
    flat = torch.zeros(2, starts[-1], dtype=torch.float64, device=student.options.device)
    whole = [row.microbatch for row in pack(rollouts, student.packing(max_tokens))[at.dp]]
    rows = [cp_shard(row, at.cp, groups.layout.cp) for row in whole]
    hidden = forward_hidden(student.model, groups, rows, student.options.device)
    shard = student_shard(student.facts, groups)
    for row, own, hidden_TD in zip(whole, rows, hidden, strict=False):
        labels_T = own.labels_T.to(hidden_TD.device)
        one_TD = hidden_TD.new_zeros(len(hidden_TD), 1)
        no_teacher_VD = hidden_TD.new_zeros(shard.num_valid, 1)
        head_VD = student.head_VD
        stats = linear_distill_stats(
            hidden_TD, head_VD, one_TD, no_teacher_VD, labels_T, shard, temperature=temperature
        )
        if student.counts_tokens:
            spans = [torch.arange(starts[i], starts[i + 1]) for i in row.rollouts]
            places = torch.cat([*spans, torch.zeros(0, dtype=torch.int64)])
            places = places[cp_tokens(row, at.cp, groups.layout.cp)].to(flat.device)
            flat[:, places] = torch.stack([stats.student_logprob_T, stats.entropy_T]).to(flat)
    flat = sum_over_world(flat).cpu()
    return [flat[:, low:high] for low, high in pairwise(starts)]


def sequence_logprobs(
    student: Student, sequences: Sequence[Sequence[int]], max_tokens: int
) -> list[list[float]]:
    """Return log p(ids[i] | ids[:i]), nats, for i >= 1 of each sequence, on every rank.

    The counterpart of `Engine.probe_logprobs`. A collective of the whole world.

    Args:
        max_tokens: longest packed row.
    """
    rollouts = [
        Rollout(Prompt(str(i), tuple(ids[:1])), 0, tuple(ids[1:]), None, "length", -1)
        for i, ids in enumerate(sequences)
    ]
    return [values[0].tolist() for values in student_statistics(student, rollouts, max_tokens)]


def mean_entropy(
    student: Student, rollouts: Sequence[Rollout], max_tokens: int, temperature: float = 1.0
) -> float:
    """Return the mean entropy per response token, exact over the vocabulary, in nats.

    A collective of the whole world; arguments as `student_statistics`, result equal on every rank.

    Raises:
        ValueError: no rollout has a token.
    """
    parts = student_statistics(student, rollouts, max_tokens, temperature)
    entropies = torch.cat([values[1] for values in parts]) if parts else torch.zeros(0)
    if not len(entropies):
        raise ValueError(
            "entropy: expected responses with tokens, got none; see curriculum.held_out_prompts"
        )
    return float(entropies.mean())
