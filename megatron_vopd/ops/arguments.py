"""Checks of the arguments on one rank, and of the ranks' arguments against each other; no exchange.

A mistake on one rank must raise on all of them: `RefusedError` carries the argument's number, which
`vocab_parallel` exchanges with the other facts, and `compare` checks them alike on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vopd.ops import native

MODES = ("grad_in_forward", "recompute")
HIDDEN_GRADIENTS = ("all_reduce", "partial", "reduce_scatter")
# Arguments by the number under which ranks report them to each other; 0 is "none is wrong".
ARGUMENTS = (
    "",
    "student_logits_TV",
    "teacher_logits_TV",
    "labels_T",
    "temperature",
    "topk",
    "impl",
    "hidden_TD",
    "weight_VD",
    "teacher_hidden_TD",
    "teacher_weight_VD",
    "chunk",
    "mode",
    "hidden_gradient",
)


class RefusedError(ValueError):
    """A wrong argument on this rank, not yet known to the others."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(f"{argument}: {message}")
        self.number = ARGUMENTS.index(argument)


def require(condition: bool, argument: str, message: str) -> None:
    """Raise RefusedError about `argument` unless the condition holds."""
    if not condition:
        raise RefusedError(argument, message)


def check_labels(labels_T: Tensor, num_tokens: int, device: torch.device) -> None:
    """Check for int64 [num_tokens] on the device; the range of labels needs the other ranks."""
    right = labels_T.dtype == torch.int64 and tuple(labels_T.shape) == (num_tokens,)
    require(
        right and labels_T.device == device,
        "labels_T",
        f"expected int64 [{num_tokens}] on {device}, got {labels_T.dtype} "
        f"{list(labels_T.shape)} on {labels_T.device}",
    )


def check_matrix(tensor: Tensor, argument: str, rows: int | None, columns: int | None) -> None:
    """Check for a floating matrix of `rows` (None: any number) and at least `columns` columns."""
    right = (
        tensor.dim() == 2
        and tensor.is_floating_point()
        and (rows is None or tensor.shape[0] == rows)
        and (columns is None or tensor.shape[1] >= columns)
    )
    wanted = f"[{'T' if rows is None else rows}, {'D' if columns is None else f'>= {columns}'}]"
    require(
        right,
        argument,
        f"expected a floating-point matrix {wanted}, got {tensor.dtype} {list(tensor.shape)}",
    )


def check_scalars(temperature: float, topk: int) -> None:
    """Check the ranges that need no other rank; `compare` checks that topk <= V."""
    require(temperature > 0, "temperature", f"expected > 0, got {temperature}")
    require(topk >= 0, "topk", f"expected 1 <= topk <= V, or 0 for none, got {topk}")


def compare(facts: list[list[int]]) -> None:
    """Raise where the ranks' facts do not fit together; the same error on every rank.

    Args:
        facts: per rank, in rank order, the 9 numbers that `vocab_parallel` exchanges.

    Raises:
        ValueError: naming the argument.
    """
    for rank, (number, *_) in enumerate(facts):
        if number:
            raise ValueError(f"{ARGUMENTS[number]}: refused on rank {rank}, see its message")
    for at, argument, what in (
        (1, "labels_T", "number of tokens"),
        (2, "topk", "value"),
        (8, "chunk", "value"),
    ):
        values = [fact[at] for fact in facts]
        if len(set(values)) > 1:
            raise ValueError(f"{argument}: the {what} must be the same on every rank, got {values}")
    bounds = [(fact[3], fact[4]) for fact in facts]
    stops = [0, *(stop for _, stop in bounds)]
    if [start for start, _ in bounds] != stops[:-1]:
        raise ValueError(f"shard: expected contiguous shards from 0 in rank order, got {bounds}")
    vocab_size = stops[-1]
    low, high = min(fact[5] for fact in facts), max(fact[6] for fact in facts)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"labels_T: expected 0 <= label < {vocab_size}, got {low} to {high}")
    if len({tuple(fact[5:8]) for fact in facts}) > 1:
        raise ValueError("labels_T: the labels must be the same on every rank")
    if facts[0][2] > vocab_size:
        raise ValueError(f"topk: expected 1 <= topk <= {vocab_size}, got {facts[0][2]}")


def check_impl(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the implementation exists here."""
    try:
        native.resolve(impl, device, dtype)
    except ValueError as error:
        raise RefusedError("impl", str(error).removeprefix("impl: ")) from None


def check_linear(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    num_valid: int,
    chunk: int,
    mode: str,
    hidden_gradient: str,
) -> None:
    """Check hidden states [T, D], heads [>= num_valid, D] of both models, and the options."""
    hidden_TD, weight_VD, teacher_hidden_TD, teacher_weight_VD = tensors
    check_matrix(hidden_TD, "hidden_TD", None, None)
    check_matrix(teacher_hidden_TD, "teacher_hidden_TD", len(hidden_TD), None)
    for hidden, weight, name in (
        (hidden_TD, weight_VD, "weight_VD"),
        (teacher_hidden_TD, teacher_weight_VD, "teacher_weight_VD"),
    ):
        check_matrix(weight, name, None, hidden.shape[1])
        require(
            len(weight) >= num_valid and weight.shape[1] == hidden.shape[1],
            name,
            f"expected [>= {num_valid}, {hidden.shape[1]}], got {list(weight.shape)}",
        )
    require(chunk >= 1, "chunk", f"expected >= 1, got {chunk}")
    require(mode in MODES, "mode", f"expected one of {', '.join(MODES)}, got {mode!r}")
    require(
        hidden_gradient in HIDDEN_GRADIENTS,
        "hidden_gradient",
        f"expected one of {', '.join(HIDDEN_GRADIENTS)}, got {hidden_gradient!r}",
    )
