"""The trainer's own log-probs of given sequences, forward only through its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.megatron.attention import packed_params
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.microbatch import cp_chunks
from tests.support.training import Microbatch, vocabulary_logits, whole_sequences


def score(
    model: Any,
    facts: ModelFacts,
    groups: Groups,
    sequences: Sequence[Sequence[int]],
    sequence_parallel: bool = False,
) -> list[list[float]]:
    """Return log p(ids[i] | ids[:i]) for i >= 1 of each sequence, on every rank; collective."""
    if not sequences:
        return []
    if groups.layout.cp > 1:
        return _score_cut(model, facts, groups, sequences, sequence_parallel)
    longest = max(map(len, sequences))
    length = longest + -longest % 4
    rows = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    scored: list[torch.Tensor] = []

    def step(iterator: Any, stage: Any) -> Any:
        next(iterator)
        hidden = stage(rows, torch.arange(length)[None], None)

        def collect(output: torch.Tensor, non_loss_data: bool = True) -> None:
            logits = vocabulary_logits(output, stage, facts, groups, sequence_parallel)
            logprobs = logits[:, :-1].float().log_softmax(-1)
            scored.append(logprobs.gather(-1, rows[:, 1:, None])[..., 0])

        return hidden, collect

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([None]),
            model=[model],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=len(sequences),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return _from_last_stage(scored, sequences, groups)


def _from_last_stage(
    scored: list[torch.Tensor], sequences: Sequence[Sequence[int]], groups: Groups
) -> list[list[float]]:
    """Return the log-probs [sequences, length - 1] of the last stage's ranks on every rank."""
    length = max(map(len, sequences)) + -max(map(len, sequences)) % 4
    result = scored[0] if scored else torch.zeros(len(sequences), length - 1)
    dist.broadcast(result, group=groups.pp, group_src=groups.layout.pp - 1)
    pairs = zip(result.tolist(), sequences, strict=True)
    return [row[: len(ids) - 1] for row, ids in pairs]


def _score_cut(
    model: Any,
    facts: ModelFacts,
    groups: Groups,
    sequences: Sequence[Sequence[int]],
    sequence_parallel: bool,
) -> list[list[float]]:
    """Score one packed row, cut over the context-parallel ranks."""
    cp, longest = groups.layout.cp, max(map(len, sequences))
    length = longest + -longest % 4
    ids = tuple(torch.tensor(sequence) for sequence in sequences)
    batch = Microbatch(ids, ids, packed=True)
    row, _, lengths = batch.cut(2 * cp, 2 * cp * groups.layout.tp)
    own = cp_chunks(lengths, groups.coordinates.cp, cp)
    scored: list[torch.Tensor] = []

    def step(iterator: Any, stage: Any) -> Any:
        next(iterator)
        packing = packed_params(lengths, "cpu")
        hidden = stage(row[own][None], own[None], None, packed_seq_params=packing)

        def collect(output: torch.Tensor, non_loss_data: bool = True) -> None:
            logits = vocabulary_logits(output, stage, facts, groups, sequence_parallel)[0]
            result = torch.zeros(len(sequences), length - 1)
            for at, rows in enumerate(whole_sequences(logits, batch, lengths, groups)):
                logprobs = rows[:-1].float().log_softmax(-1)
                result[at, : len(rows) - 1] = logprobs.gather(-1, ids[at][1:, None])[:, 0]
            scored.append(result)

        return hidden, collect

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([None]),
            model=[model],
            num_microbatches=1,
            seq_length=len(own),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return _from_last_stage(scored, sequences, groups)
