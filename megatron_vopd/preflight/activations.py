"""Bytes that one layer keeps for its backward pass, and needs while it runs, per token.

Counted from the operations that really run, in three cases. With h = hidden size, and of one tensor
rank q = query width, k = width of the keys (values alike), f = width of the MLP, e = bytes a value:

    norms, twice     cpu    input and normalised input in fp32, weighted output: 8 h + e h
                     cuda   input and output: 2 e h
    attention        the q-k-v product e (q + 2k), rotated queries and keys, the mixed values, and
                     what q- and k-norms keep; the CPU copies the mixed values once more, the CUDA
                     kernel of the local layers needs keys and values repeated to the queries' width
    the same, cp > 1 the local layers keep (2 cp + 1) / 2 times the keys and values, not the rotated
                     keys; while a layer runs backward, also the gradients of those and of the row's
    MLP              local  five of f: gate and up together, silu(gate), up, product: 5 e f
                     te     gate and up together, product: 3 e f

A mixture of experts keeps its tokens once more before and after the experts, times experts per
token; tokens are assumed to be spread evenly. Sequence parallelism cuts the h terms by tp. Not
counted: reciprocal norms, log-sum-exps and rotary tables, all narrower than a head, and on the CPU
with cp > 1 one mask per row, [T / 2 cp, T] for T tokens of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_vopd.hf.facts import ModelFacts, kv_repeat
from megatron_vopd.types import Layout

Kind = Literal["cpu", "local", "te"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class LayerMemory:
    """The memory of one layer on one rank, in bytes per token of its part of a packed row.

    Attributes:
        kept: kept for the backward pass when nothing is recomputed.
        kept_selective: kept when attention is recomputed.
        kept_full: kept when the whole layer is recomputed: its input.
        backward: gradients that exist during the backward pass, beside what is kept.
        forward: needed while the layer runs without a backward pass.
    """

    kept: float
    kept_selective: float
    kept_full: float
    backward: float
    forward: float

    def kept_by(self, recompute: Recompute) -> float:
        """Return the bytes per token that are kept under a setting of `student.recompute`."""
        kept = {"none": self.kept, "selective": self.kept_selective, "full": self.kept_full}
        return kept[recompute]


def layer_memory(
    facts: ModelFacts,
    layout: Layout,
    kind: Kind,
    item_size: int,
    trained: bool,
    sequence_parallel: bool = False,
) -> LayerMemory:
    """Compute the memory of one layer of the model in this layout.

    Args:
        kind: cpu, or on a GPU the layer specification: local or te.
        item_size: bytes of one activation.
        trained: the student (True) or a frozen model, whose KV heads may be repeated.
        sequence_parallel: the h terms are cut by tp.
    """
    e, cut = item_size, layout.tp if sequence_parallel else 1
    hidden = facts.hidden_size / cut
    q = facts.num_heads * facts.head_dim / layout.tp
    heads_kv = facts.num_kv_heads * kv_repeat(facts, layout.tp, trained)
    k = heads_kv * facts.head_dim / layout.tp
    norms = 2 * (8 * hidden + e * hidden if kind == "cpu" else 2 * e * hidden)
    attention, again, gradients = _attention(kind, e, q, k, facts.qk_norm, layout.cp)
    mlp, widest = _mlp(facts, layout, kind, e, hidden)
    kept = norms + attention + mlp
    return LayerMemory(
        kept=kept,
        kept_selective=kept - again,
        kept_full=e * hidden,
        backward=max(2 * e * widest, gradients) + 2 * e * facts.hidden_size,
        forward=e * 2 * facts.hidden_size + max(mlp, attention),
    )


def _attention(
    kind: Kind, e: int, q: float, k: float, qk_norm: bool, cp: int
) -> tuple[float, float, float]:
    """Return bytes per token: kept; of them saved by selective recomputation; gathered gradients.

    The last are those of keys and values in the backward pass of the local layers under cp.

    Args:
        e: bytes of one value.
        q, k: widths of queries and of keys on this rank.
    """
    product = e * (q + 2 * k)
    # Of keys and values alike: the prefixes that a rank attends to, over its own.
    prefixes = (2 * cp + 1) / 2 if cp > 1 else 1
    gradients = 2 * e * k * (prefixes + cp) if cp > 1 else 0.0
    if kind == "cpu":
        copied_keys = 0 if e == 4 else 4 * k
        norms = 8 * q + 4 * k + copied_keys if qk_norm else 0
        keys = e * k if cp == 1 else 2 * e * k * prefixes
        return product + norms + keys + 3 * e * q, e * q + keys - e * k, gradients
    norms = e * q if qk_norm else 0
    if kind == "local":
        repeated = 2 * e * q * prefixes
        gradients += repeated if cp > 1 else 0.0
        return product + norms + 2 * e * q + repeated, repeated, gradients
    return product + norms + e * (2 * q + k), 0.0, 0.0


def _mlp(
    facts: ModelFacts, layout: Layout, kind: Kind, e: int, hidden: float
) -> tuple[float, float]:
    """Return (bytes kept per token, width of one intermediate in values).

    Args:
        e: bytes of one value.
        hidden: hidden size on this rank, cut by tp under sequence parallelism.
    """
    widths = 3 if kind == "te" else 5
    if not facts.is_moe:
        width = facts.ffn_size / layout.tp
        return e * widths * width, width
    # Under sequence parallelism a rank sends only its own tokens to the experts.
    copies = facts.experts_per_token * hidden / facts.hidden_size
    width = copies * facts.expert_ffn_size
    return e * (2 * copies * facts.hidden_size + widths * width), width
