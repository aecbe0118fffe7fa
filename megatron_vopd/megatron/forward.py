"""Packed rows through a model in any layout, by megatron's schedules: forward, or with backward.

Used to score with teachers, to compare log-probs with an engine's after a weight push, and to
measure entropy on held-out prompts. The trainer runs its rows through `run_row` and
`response_hidden` too, so that there is one place that says how a packed row enters a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_vopd.megatron.attention import packed_params
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.microbatch import Microbatch


def run_row(model: Any, row: Microbatch, device: torch.device | str) -> Tensor:
    """Run a packed row through one stage; the last one returns hidden states [1, S (/ tp), D]."""
    ids_BS = row.ids_S[None].to(device)
    positions_BS = torch.arange(ids_BS.shape[1], device=device)[None]
    bounds = packed_params(row.lengths, device)
    return model(ids_BS, positions_BS, None, packed_seq_params=bounds)


def response_hidden(output: Tensor, row: Microbatch, model: Any, groups: Groups) -> Tensor:
    """Pick the hidden states [T, D] that predict the row's response from the last stage's output.

    Under sequence parallelism the row is gathered first, and the backward of that gather adds up
    the tp ranks' gradients: the loss then hands over this rank's part only.
    """
    if get_model_config(model).sequence_parallel:
        # [1, S / tp, D] -> [S, 1, D]: the gather cuts and joins the first dimension.
        output = gather_from_sequence_parallel_region(output.transpose(0, 1), group=groups.tp)
        return output[:, 0][row.rows_T.to(output.device)]
    return output[0][row.rows_T.to(output.device)]


def forward_backward(
    model: Any,
    step: Callable[[Iterator[Any], Any], Any],
    inputs: Iterator[Any],
    num_rows: int,
    row_tokens: int,
) -> None:
    """Run rows forward and backward through the student, in megatron-core's global layout.

    Args:
        model: wrapped in DDP.
        step: megatron-core's forward step: (inputs, model) -> output and a function of the output
            that returns the loss sum, the token count and the metrics.
        inputs: one element for each row, the same number on every rank of the replica.
        row_tokens: S of the rows on this rank.
    """
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=inputs,
        model=[model],
        num_microbatches=num_rows,
        seq_length=row_tokens,
        micro_batch_size=1,
        forward_only=False,
    )


@torch.no_grad()
def forward_hidden(
    model: Any, groups: Groups, rows: Sequence[Microbatch], device: torch.device | str
) -> list[Tensor]:
    """Return final hidden states [T, D] of each row's response on the last stage; elsewhere [].

    Every rank of the model's replica calls it with the same rows; with experts spread over
    replicas, all replicas call it with equally many.

    Args:
        model: bare or wrapped in DDP, in the layout of `groups` (cp: this rank's shards as rows).
    """
    if not rows:
        return []
    collected: list[Tensor] = []

    def step(iterator: Iterator[Microbatch], stage: Any) -> Any:
        row = next(iterator)

        def collect(output: Tensor, non_loss_data: bool = True) -> None:
            collected.append(response_hidden(output, row, stage, groups))

        return run_row(stage, row, device), collect

    schedule: Any = forward_backward_no_pipelining
    between_stages: dict[str, Any] = {}
    if groups.layout.pp > 1:
        schedule = forward_backward_pipelining_without_interleaving
        communicator = P2PCommunicator(groups.pp, get_model_config(model))
        between_stages["p2p_communicator"] = communicator
    schedule(
        forward_step_func=step,
        data_iterator=iter(rows),
        model=[model],
        num_microbatches=len(rows),
        seq_length=len(rows[0].ids_S),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
        pg_collection=groups.process_groups,
        **between_stages,
    )
    return collected
