"""Frozen data shared by every layer, and the legend of the shape suffixes.

Shape suffixes (used in names: ``logits_TV``, ``labels_T``)::

    T  tokens (a packed row of one or several sequences)   V  vocabulary (or this rank's shard)
    D  hidden size                                         K  top-k entries
    P  prompts                                             G  samples per prompt
    B  batch rows                                          S  sequence positions

Sizes: ``tp pp cp ep dp`` are the tensor-, pipeline-, context-, expert- and data-parallel sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_vopd.errors import LayoutError

# Response tokens for which the logits of both models exist at a time.
LOSS_CHUNK = 4096


def sequence_multiple(cp: int) -> int:
    """Return the tokens to whose multiple a sequence is filled up: two chunks per cp rank."""
    return 2 * cp if cp > 1 else 1


def divisors(number: int) -> list[int]:
    """Return all positive divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class Coordinates:
    """Place of one rank in a layout: its index on every axis."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int

    @property
    def is_leader(self) -> bool:
        """True for the rank that leads its data-parallel replica, which may have an engine."""
        return self.tp == self.cp == self.pp == 0


@dataclass(frozen=True)
class Layout:
    """A division of `world_size` ranks: tp fastest, then cp, dp, pp slowest (as in megatron-core).

    Experts are never cut inside (expert tensor size 1): within a pipeline stage they are spread
    over `ep` consecutive ranks; the other `world_size / (pp * ep)` are their data parallelism.

    Raises:
        LayoutError: a size below 1, or sizes that do not divide the world.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("world_size", "tp", "pp", "cp", "ep"):
            size = getattr(self, name)
            if size < 1:
                raise LayoutError(f"{name}={size} is not a parallel size; use an integer >= 1")
        if self.world_size % (self.tp * self.pp * self.cp):
            raise LayoutError(
                f"tp={self.tp} x pp={self.pp} x cp={self.cp} = {self.tp * self.pp * self.cp} does "
                f"not divide the world of {self.world_size} ranks; the product must be one of "
                f"{divisors(self.world_size)}"
            )
        if self.world_size % (self.pp * self.ep):
            raise LayoutError(
                f"ep={self.ep} does not divide the {self.world_size // self.pp} ranks of a "
                f"pipeline stage (world {self.world_size} / pp={self.pp}); ep must be one of "
                f"{divisors(self.world_size // self.pp)}"
            )

    @property
    def dp(self) -> int:
        """Number of data-parallel replicas of the model."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        """Number of replicas of each expert."""
        return self.world_size // (self.pp * self.ep)

    def coordinates(self, rank: int) -> Coordinates:
        """Return the position of global `rank` (0 <= rank < world_size) on every axis."""
        stage_size = self.world_size // self.pp
        return Coordinates(
            tp=rank % self.tp,
            cp=rank // self.tp % self.cp,
            dp=rank // (self.tp * self.cp) % self.dp,
            pp=rank // stage_size,
            ep=rank % stage_size % self.ep,
        )

    def rank_at(self, tp: int, cp: int, dp: int, pp: int) -> int:
        """Return the global rank at a place: the inverse of `coordinates`."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "ep": self.ep}
        cut = " x ".join(
            f"{name} {size}" for name, size in sizes.items() if size > 1 or name in "tp pp"
        )
        return f"{cut} x dp {self.dp}"


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of the data, tokenized.

    Attributes:
        prompt_id: stable over the run: source and position of its record.
        ids: token ids, chat template applied.
        answer: reference answer of the record; None: it has none.
        teacher: key of the teacher that scores it (`teacher`, or `teachers.<name>`).
    """

    prompt_id: str
    ids: tuple[int, ...]
    answer: str | None = None
    teacher: str = "teacher"


@dataclass(frozen=True)
class Rollout:
    """One sampled (or given) response to a prompt.

    Attributes:
        sample: index among the samples of its prompt, from 0.
        response_ids: without the prompt; a final end-of-sequence id is part of it, and trained.
        rollout_logprobs: log mu of each response id under the distribution actually sampled
            (temperature and nucleus applied), nats; None: not sampled by an engine.
        finish_reason: stop (an end-of-sequence id was sampled) or length.
        policy_version: version of the weights that it was sampled from; -1: not the student's.
    """

    prompt: Prompt
    sample: int
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    policy_version: int


def is_local_path(text: str) -> bool:
    """Return True if `text` begins like a path (otherwise it is a hub id, or a mistake)."""
    return text.startswith(("/", "./", "../", "~"))
