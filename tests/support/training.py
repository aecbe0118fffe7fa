"""The smallest real training step on megatron-core: schedule, DDP, cross-entropy, finalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch.nn.functional import cross_entropy, linear, pad

from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.megatron.attention import packed_params
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.microbatch import cp_chunks
from megatron_vopd.megatron.model import head_weight

ROW_LENGTH = 24


@dataclass(frozen=True)
class Microbatch:
    """Sequences with next-token labels, as padded rows [B, 24] or as one packed row [1, T]."""

    sequences: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    packed: bool

    def rows(self) -> torch.Tensor:
        """Return token ids as the model takes them; a packed row is filled to a multiple of 4."""
        if not self.packed:
            return torch.stack([pad(ids, (0, ROW_LENGTH - len(ids))) for ids in self.sequences])
        row = torch.cat(self.sequences)
        return pad(row, (0, -len(row) % 4))[None]

    def lengths(self) -> list[int]:
        """Return the lengths of a packed row's sequences; the filling is one of its own."""
        lengths = [len(ids) for ids in self.sequences]
        filling = self.rows().numel() - sum(lengths)
        return [*lengths, filling] if filling else lengths

    def cut(self, segment: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Return ids [T], labels [T] and lengths of one packed row for context parallelism.

        Sequences are filled up to a multiple of `segment`, the row to one of `multiple`; where
        nothing is to be predicted the label is -100.
        """
        lengths = [len(ids) + -len(ids) % segment for ids in self.sequences]
        pairs = list(zip(self.sequences, lengths, strict=True))
        ids = torch.cat([pad(ids, (0, length - len(ids))) for ids, length in pairs])
        pairs = list(zip(self.labels, lengths, strict=True))
        labels = torch.cat([pad(y, (0, length - len(y)), value=-100) for y, length in pairs])
        filling = -len(ids) % multiple
        ids, labels = pad(ids, (0, filling)), pad(labels, (0, filling), value=-100)
        return ids, labels, [*lengths, filling] if filling else lengths

    def split(self, outputs: torch.Tensor) -> list[torch.Tensor]:
        """Split outputs [B, S, ...] of `rows()` into sequences, without padding."""
        if self.packed:
            return list(outputs[0].split(self.lengths()))[: len(self.sequences)]
        return [row[: len(ids)] for row, ids in zip(outputs, self.sequences, strict=True)]


def make_microbatches(vocab_size: int, seed: int = 1) -> list[Microbatch]:
    """Make one padded and one packed microbatch; the last id occurs in each row."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for packed, lengths in ((False, (24, 13)), (True, (9, 1, 17, 12))):
        sequences, labels = [], []
        for length in lengths:
            ids = torch.randint(0, vocab_size, (length + 1,), generator=generator)
            ids[-1] = vocab_size - 1
            sequences.append(ids[:-1])
            labels.append(ids[1:])
        batches.append(Microbatch(tuple(sequences), tuple(labels), packed))
    return batches


def wrap(model: Any, groups: Groups, **settings: Any) -> DistributedDataParallel:
    """Wrap in megatron-core's DDP, gradients summed over tokens and divided by their number."""
    model.config.finalize_model_grads_func = finalize_model_grads
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **settings)
    return DistributedDataParallel(model.config, config, model)


def make_optimizer(ddp: Any, distributed: bool) -> Any:
    """Make megatron-core's Adam, whose epsilon is far above the rounding of a gradient."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.0,
        # With the usual 1e-8 a gradient of rounding size moves its weight by a full step, in a
        # direction that depends on the order of a sum.
        adam_eps=1e-5,
        clip_grad=1.0,
        params_dtype=torch.float32,
        use_distributed_optimizer=distributed,
    )
    return get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)


def vocabulary_logits(
    hidden: torch.Tensor, model: Any, facts: ModelFacts, groups: Groups, sequence_parallel: bool
) -> torch.Tensor:
    """Apply the sharded head to hidden states [B, S(/tp), D]; return whole logits [B, S, V]."""
    if sequence_parallel and groups.layout.tp > 1:
        hidden = hidden.transpose(0, 1)
        hidden = gather_from_sequence_parallel_region(hidden, group=groups.tp).transpose(0, 1)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=groups.tp)
    shard = linear(hidden, head_weight(model))
    return gather_from_tensor_model_parallel_region(shard, group=groups.tp)[..., : facts.vocab_size]


def whole_sequences(
    logits: torch.Tensor, batch: Microbatch, lengths: list[int], groups: Groups
) -> list[torch.Tensor]:
    """Join the cp ranks' logits [T / cp, V]; return those of every sequence, without filling."""
    cp = groups.layout.cp
    parts = [torch.empty_like(logits) for _ in range(cp)]
    dist.all_gather(parts, logits.contiguous(), group=groups.process_groups.cp)
    whole = logits.new_empty(sum(lengths), logits.shape[1])
    for rank, part in enumerate(parts):
        whole[cp_chunks(lengths, rank, cp)] = part
    sequences = whole.split(lengths)
    return [rows[: len(ids)] for rows, ids in zip(sequences, batch.sequences, strict=False)]


def forward_backward(
    ddp: DistributedDataParallel,
    facts: ModelFacts,
    groups: Groups,
    batches: list[Microbatch],
    sequence_parallel: bool,
    loss_sum: Callable[[torch.Tensor, Any, Microbatch], torch.Tensor] | None = None,
) -> list[list[torch.Tensor]]:
    """Add gradients of a token-mean loss to `main_grad`, over all data-parallel replicas.

    Under context parallelism all microbatches are packed, and each rank has its part of the tokens.

    Args:
        loss_sum: hidden states, model, microbatch -> the sum over its tokens (cross-entropy).

    Returns:
        On the last stage the logits of every sequence of every microbatch, elsewhere nothing; empty
        lists with a `loss_sum` of one's own.
    """
    seen: list[list[torch.Tensor]] = []

    def cross_entropy_sum(output: torch.Tensor, model: Any, batch: Microbatch) -> torch.Tensor:
        whole = vocabulary_logits(output, model, facts, groups, sequence_parallel)
        logits = batch.split(whole)
        seen.append([row.detach() for row in logits])
        return cross_entropy(torch.cat(logits), torch.cat(batch.labels), reduction="sum")

    def cut_step(batch: Microbatch, model: Any) -> Any:
        cp = groups.layout.cp
        ids, labels, lengths = batch.cut(2 * cp, 2 * cp * groups.layout.tp)
        own = cp_chunks(lengths, groups.coordinates.cp, cp)
        packing = packed_params(lengths, "cpu")
        hidden = model(ids[own][None], own[None], None, packed_seq_params=packing)

        def loss(output: torch.Tensor) -> Any:
            logits = vocabulary_logits(output, model.module, facts, groups, sequence_parallel)[0]
            seen.append(whole_sequences(logits.detach(), batch, lengths, groups))
            total = cross_entropy(logits, labels[own], reduction="sum")
            return total, (labels[own] >= 0).sum(dtype=torch.int), {"loss": total.detach()}

        return hidden, loss

    def step(batch_iterator: Any, model: Any) -> Any:
        batch = next(batch_iterator)
        if groups.layout.cp > 1:
            return cut_step(batch, model)
        rows = batch.rows()
        packing = packed_params(batch.lengths(), "cpu") if batch.packed else None
        hidden = model(rows, torch.arange(rows.shape[1])[None], None, packed_seq_params=packing)

        def loss(output: torch.Tensor) -> Any:
            total = (loss_sum or cross_entropy_sum)(output, model.module, batch)
            num_tokens = torch.tensor(sum(map(len, batch.labels)), dtype=torch.int)
            return total, num_tokens, {"loss": total.detach()}

        return hidden, loss

    ddp.zero_grad_buffer()
    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[ddp],
        num_microbatches=len(batches),
        seq_length=ROW_LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    assert len(losses) == (len(batches) if groups.is_last_stage else 0)
    return seen
