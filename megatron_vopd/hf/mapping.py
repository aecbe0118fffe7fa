"""One table between HuggingFace tensors and megatron-core parameters, read in both directions.

Each `Rule` names one megatron-core parameter, for the local and for the TransformerEngine layer
spec, the HF tensors it is made of, and how it is cut over tensor-parallel ranks. From it
`shard_parameters` derives, for one rank, every parameter's shape and the `Piece`s that fill it.
Loading copies pieces from HF tensors into the shard; export copies the same pieces back. There is
no second description, so the two directions cannot disagree.

The cuts (n = size of the cut dimension, r = rank, tp = ranks)::

    replicated   the whole tensor on every rank
    columns      columns [r n/tp, (r+1) n/tp)
    vocab        rows of the vocabulary padded to equal shards; surplus rows belong to no HF row
    gate_up      the rank's rows of gate above its rows of up
    qkv          the rank's rows of the interleaved matrix  [q.. k v | q.. k v | ...], one block per
                 group of query heads that share a KV head

With fewer KV heads than tp the interleaved matrix is simply cut into equal row ranges, also through
the middle of a head, which is what megatron-core expects. A frozen model instead has its KV heads
repeated (`kv_repeat`): the interleaved matrix then has `tp` groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.types import Coordinates, Layout

Cut = Literal["replicated", "columns", "vocab", "gate_up", "qkv"]
LayerSpec = Literal["local", "te"]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A rectangle of one HF tensor, and where it lies in this rank's shard of a parameter."""

    name: str
    source: Slices
    target: Slices


@dataclass(frozen=True)
class ShardPlan:
    """One parameter of one rank: local shape, and the pieces that fill it.

    Rows that no piece fills are zero. `partition_dim` is the dimension cut over tp, or None.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    partition_dim: int | None = None


@dataclass(frozen=True)
class Rule:
    """One parameter: its names in megatron-core and in HF, and its cut over tp ranks.

    In names `{i}` stands for the layer and `{e}` for the expert: numbered from the rank's first one
    in megatron-core, globally in HF.

    Attributes:
        local: name under megatron-core's local layer spec.
        te: name under the TransformerEngine layer spec.
        hf: HF tensors that the parameter is made of.
        when: the models that have it, as in `applies`.
    """

    local: str
    te: str
    hf: tuple[str, ...]
    cut: Cut
    when: str = "always"

    def megatron(self, spec: LayerSpec) -> str:
        """Return megatron-core's name under `spec`, with its placeholders."""
        return self.te if spec == "te" else self.local


_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_QKV, _EXPERT = _LAYER + "self_attention.linear_qkv.", _LAYER + "mlp.experts."
_HF_ATTN, _HF_EXPERT = _HF + "self_attn.", _HF + "mlp.experts.{e}."


def _same(name: str, hf: tuple[str, ...], cut: Cut, when: str = "always") -> Rule:
    """Make a rule whose parameter has the same name under both layer specs."""
    return Rule(name, name, hf, cut, when)


def _qkv(suffix: str, when: str = "always") -> Rule:
    hf = tuple(f"{_HF_ATTN}{letter}_proj.{suffix}" for letter in "qkv")
    return _same(_QKV + suffix, hf, "qkv", when)


# In the order of HF's state dict.
EMBEDDING_RULES = (
    _same("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
)
LAYER_RULES = (
    _qkv("weight"),
    _qkv("bias", "qkv_bias"),
    _same(_LAYER + "self_attention.linear_proj.weight", (_HF_ATTN + "o_proj.weight",), "columns"),
    _same(
        _LAYER + "self_attention.q_layernorm.weight",
        (_HF_ATTN + "q_norm.weight",),
        "replicated",
        "qk_norm",
    ),
    _same(
        _LAYER + "self_attention.k_layernorm.weight",
        (_HF_ATTN + "k_norm.weight",),
        "replicated",
        "qk_norm",
    ),
    _same(_LAYER + "mlp.router.weight", (_HF + "mlp.gate.weight",), "replicated", "is_moe"),
    Rule(
        _EXPERT + "local_experts.{e}.linear_fc1.weight",
        _EXPERT + "linear_fc1.weight{e}",
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
        "gate_up",
        "is_moe",
    ),
    Rule(
        _EXPERT + "local_experts.{e}.linear_fc2.weight",
        _EXPERT + "linear_fc2.weight{e}",
        (_HF_EXPERT + "down_proj.weight",),
        "columns",
        "is_moe",
    ),
    _same(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        "gate_up",
        "is_dense",
    ),
    _same(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), "columns", "is_dense"),
    Rule(
        _LAYER + "input_layernorm.weight",
        _QKV + "layer_norm_weight",
        (_HF + "input_layernorm.weight",),
        "replicated",
    ),
    Rule(
        _LAYER + "pre_mlp_layernorm.weight",
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        (_HF + "post_attention_layernorm.weight",),
        "replicated",
        "is_dense",
    ),
    _same(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF + "post_attention_layernorm.weight",),
        "replicated",
        "is_moe",
    ),
)
FINAL_RULES = (
    _same("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    _same("output_layer.weight", ("lm_head.weight",), "vocab", "untied"),
)
# The copy of a tied embedding that the last of several pipeline stages holds.
TIED_HEAD_RULE = _same("output_layer.weight", ("model.embed_tokens.weight",), "vocab", "tied")


def applies(rule: Rule, facts: ModelFacts) -> bool:
    """Return True if this model has the parameter."""
    return {
        "always": True,
        "qkv_bias": facts.qkv_bias,
        "qk_norm": facts.qk_norm,
        "is_moe": facts.is_moe,
        "is_dense": not facts.is_moe,
        "tied": facts.tied,
        "untied": not facts.tied,
    }[rule.when]


def hf_shape(name: str, facts: ModelFacts) -> tuple[int, ...]:
    """Return the global shape of an HF tensor, which its last two name parts decide."""
    hidden, heads, kv = facts.hidden_size, facts.num_heads, facts.num_kv_heads
    ffn = facts.expert_ffn_size if ".experts." in name else facts.ffn_size
    owner, kind = name.split(".")[-2:]
    rows_columns = {
        "embed_tokens": (facts.vocab_size, hidden),
        "lm_head": (facts.vocab_size, hidden),
        "q_proj": (heads * facts.head_dim, hidden),
        "k_proj": (kv * facts.head_dim, hidden),
        "v_proj": (kv * facts.head_dim, hidden),
        "o_proj": (hidden, heads * facts.head_dim),
        "gate": (facts.num_experts, hidden),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "q_norm": (facts.head_dim,),
        "k_norm": (facts.head_dim,),
    }
    shape = rows_columns.get(owner, (hidden,))
    return shape[:1] if kind == "bias" else shape


@dataclass(frozen=True)
class Unit:
    """Rules whose HF tensors are exported together, with the layer and expert they belong to."""

    rules: tuple[Rule, ...]
    layer: int | None = None
    expert: int | None = None

    def hf_names(self) -> list[str]:
        """Return the HF names in HF's order: weight and bias of a projection stay together."""
        columns = [rule.hf for rule in self.rules]
        names = [name for together in zip(*columns, strict=True) for name in together]
        return [name.format(i=self.layer, e=self.expert) for name in names]

    def stage(self, facts: ModelFacts, layout: Layout) -> int:
        """Return the pipeline stage that holds the unit."""
        if self.layer is not None:
            return self.layer // (facts.num_layers // layout.pp)
        return 0 if self.rules == EMBEDDING_RULES else layout.pp - 1

    def expert_rank(self, facts: ModelFacts, layout: Layout) -> int | None:
        """Return the expert-parallel rank that holds it; None: every rank of the stage does."""
        return None if self.expert is None else self.expert // (facts.num_experts // layout.ep)

    def megatron_name(self, rule: Rule, spec: LayerSpec, facts: ModelFacts, layout: Layout) -> str:
        """Return the parameter's name on its rank, which counts layers and experts from 0."""
        layer, expert = self.layer or 0, self.expert or 0
        local_layer = layer % (facts.num_layers // layout.pp)
        local_expert = expert % max(1, facts.num_experts // layout.ep)
        return rule.megatron(spec).format(i=local_layer, e=local_expert)

    def plan(
        self, rule: Rule, facts: ModelFacts, rank: int, tp: int, kv_repeat: int = 1
    ) -> ShardPlan:
        """Plan one of the unit's parameters on tensor-parallel rank `rank`; experts are not cut.

        Args:
            kv_repeat: times each KV head is repeated (`facts.kv_repeat`).
        """
        names = tuple(name.format(i=self.layer, e=self.expert) for name in rule.hf)
        if self.expert is not None:
            rank, tp = 0, 1
        return shard_plan(rule.cut, names, facts, rank, tp, kv_repeat)


def layer_units(facts: ModelFacts, layer: int) -> Iterator[Unit]:
    """Yield the units of one layer in HF's order; experts one by one, each with all its tensors."""
    present = [rule for rule in LAYER_RULES if applies(rule, facts)]
    for is_expert, rules in groupby(present, key=lambda rule: "{e}" in rule.local):
        if is_expert:
            together = list(rules)
            for expert in range(facts.num_experts):
                yield from (Unit((rule,), layer, expert) for rule in together)
            continue
        for _, pair in groupby(rules, key=lambda rule: rule.cut == "qkv" or rule.local):
            yield Unit(tuple(pair), layer)


def model_units(facts: ModelFacts) -> Iterator[Unit]:
    """Yield all units of the model in HF's order."""
    yield Unit(EMBEDDING_RULES)
    for layer in range(facts.num_layers):
        yield from layer_units(facts, layer)
    yield from (Unit((rule,)) for rule in FINAL_RULES if applies(rule, facts))


def hf_tensors(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Return name -> global shape of every tensor of the HF checkpoint, in HF's order."""
    return {name: hf_shape(name, facts) for unit in model_units(facts) for name in unit.hf_names()}


def _blocks(cut: Cut, names: tuple[str, ...], facts: ModelFacts, kv_repeat: int) -> list[tuple]:
    """Describe the uncut parameter as row blocks: (HF name, first HF row, number of rows)."""
    if cut != "qkv":
        return [(name, 0, hf_shape(name, facts)[0]) for name in names]
    q_name, k_name, v_name = names
    groups = facts.num_kv_heads * kv_repeat
    q_rows = facts.num_heads // groups * facts.head_dim
    blocks = []
    for group in range(groups):
        kv_row = group // kv_repeat * facts.head_dim
        blocks.append((q_name, group * q_rows, q_rows))
        blocks.append((k_name, kv_row, facts.head_dim))
        blocks.append((v_name, kv_row, facts.head_dim))
    return blocks


def _row_ranges(cut: Cut, blocks: list[tuple], rank: int, tp: int) -> list[tuple[int, int]]:
    """Return this rank's row ranges [start, stop) of the stacked blocks."""
    total = sum(rows for _, _, rows in blocks)
    if cut == "qkv":
        return [(rank * total // tp, (rank + 1) * total // tp)]
    if cut == "gate_up":
        half = total // 2
        width = half // tp
        return [(at + rank * width, at + (rank + 1) * width) for at in (0, half)]
    return [(0, total)]


def shard_plan(
    cut: Cut, names: tuple[str, ...], facts: ModelFacts, rank: int, tp: int, kv_repeat: int = 1
) -> ShardPlan:
    """Plan shape and pieces of one parameter on tensor-parallel rank `rank` of `tp`.

    Args:
        names: the HF tensors, with the numbers of layer and expert filled in.
        kv_repeat: times each KV head is repeated (frozen models with fewer KV heads than tp).
    """
    shape = hf_shape(names[0], facts)
    if cut == "columns":
        width = shape[1] // tp
        columns = slice(rank * width, (rank + 1) * width)
        source, target = (slice(0, shape[0]), columns), (slice(0, shape[0]), slice(0, width))
        return ShardPlan((shape[0], width), (Piece(names[0], source, target),), 1)
    if cut == "vocab":
        shard_rows = facts.padded_vocab_size(tp) // tp
        start = min(rank * shard_rows, facts.vocab_size)
        stop = min(start + shard_rows, facts.vocab_size)
        piece = Piece(names[0], (slice(start, stop),), (slice(0, stop - start),))
        return ShardPlan((shard_rows, *shape[1:]), (piece,) if stop > start else (), 0)
    blocks = _blocks(cut, names, facts, kv_repeat)
    pieces, filled = [], 0
    for start, stop in _row_ranges(cut, blocks, rank, tp):
        at = 0
        for name, first, rows in blocks:
            low, high = max(start, at), min(stop, at + rows)
            if low < high:
                source = slice(first + low - at, first + high - at)
                pieces.append(Piece(name, (source,), (slice(filled, filled + high - low),)))
                filled += high - low
            at += rows
    return ShardPlan((filled, *shape[1:]), tuple(pieces), None if cut == "replicated" else 0)


def shard_parameters(
    facts: ModelFacts, layout: Layout, at: Coordinates, spec: LayerSpec, kv_repeat: int = 1
) -> dict[str, ShardPlan]:
    """Plan every parameter that the rank at `at` holds; keys are its names in megatron-core.

    Args:
        spec: layer spec of the model, which decides the names.
        kv_repeat: times each KV head is repeated (`facts.kv_repeat`).
    """
    plans = {}
    for unit in model_units(facts):
        if unit.stage(facts, layout) != at.pp:
            continue
        if unit.expert_rank(facts, layout) not in (None, at.ep):
            continue
        for rule in unit.rules:
            name = unit.megatron_name(rule, spec, facts, layout)
            plans[name] = unit.plan(rule, facts, at.tp, layout.tp, kv_repeat)
    if facts.tied and layout.pp > 1 and at.pp == layout.pp - 1:
        head = Unit((TIED_HEAD_RULE,))
        plans[TIED_HEAD_RULE.local] = head.plan(TIED_HEAD_RULE, facts, at.tp, layout.tp)
    return plans
