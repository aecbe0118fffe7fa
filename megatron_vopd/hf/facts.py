"""The facts of a HuggingFace config that decide a model's shape, and the layouts that they allow.

Read once from the config and passed on as plain numbers: the model builder, the weight mapping and
the preflight all work from `ModelFacts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vopd.errors import UserError
from megatron_vopd.types import Layout, divisors

# model_type of the HF config -> (bias on q/k/v, RMSNorm on q and k, mixture of experts)
ARCHITECTURES: dict[str, tuple[bool, bool, bool]] = {
    "qwen3": (False, True, False),
    "qwen2": (True, False, False),
    "llama": (False, False, False),
    "qwen3_moe": (False, True, True),
}

# What transformers uses when the config has no head_dim; for other types hidden_size / heads.
_DEFAULT_HEAD_DIM = {"qwen3": 128}

# Rows of the padded vocabulary on a tp rank are a multiple of this: 8 bf16 values are 16 bytes.
VOCAB_ALIGNMENT = 8


class ModelError(UserError):
    """A model that is not supported, or a model folder that is not what it should be."""


@dataclass(frozen=True)
class ModelFacts:
    """Shape of one supported model. Sizes are global (before any parallel cut).

    Attributes:
        ffn_size: width of a dense layer's MLP.
        max_positions: `max_position_embeddings` of the config, in tokens.
        tied: the output head shares the embedding's weight.
        num_experts: experts of a layer; this and the other expert sizes are 0 in a dense model.
        normalize_expert_probs: the chosen experts' probabilities are made to sum to 1.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    num_experts: int = 0
    expert_ffn_size: int = 0
    experts_per_token: int = 0
    normalize_expert_probs: bool = True

    @property
    def qkv_bias(self) -> bool:
        return ARCHITECTURES[self.model_type][0]

    @property
    def qk_norm(self) -> bool:
        return ARCHITECTURES[self.model_type][1]

    @property
    def is_moe(self) -> bool:
        return ARCHITECTURES[self.model_type][2]

    def padded_vocab_size(self, tp: int) -> int:
        """Round the vocabulary up to equal, aligned shards: embedding rows over all `tp` ranks."""
        unit = VOCAB_ALIGNMENT * tp
        return -(-self.vocab_size // unit) * unit


# Settings that would change the computation, and their values that the model builder supports.
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu",)),
    ("attention_bias", (None, False)),
    ("mlp_bias", (None, False)),
    ("use_sliding_window", (None, False)),
    ("decoder_sparse_step", (None, 1)),
    ("mlp_only_layers", (None, [], ())),
    ("quantization_config", (None,)),
)


def facts_from_config(config: Mapping[str, Any], where: str = "config.json") -> ModelFacts:
    """Read the facts from a normalised HF config (`PretrainedConfig.to_dict()`).

    Args:
        config: keys as transformers writes them.
        where: name of the config, for messages.

    Raises:
        ModelError: an architecture or a setting that is not supported.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"{where}: model_type {model_type!r} is not supported; "
            f"use one of {sorted(ARCHITECTURES)}"
        )
    for key, allowed in _UNSUPPORTED:
        if config.get(key) not in allowed and not _is_architecture_default(model_type, key):
            raise ModelError(
                f"{where}: {key}={config[key]!r} is not supported for {model_type}; "
                f"expected {allowed[-1]!r}"
            )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads={heads} is no multiple of num_key_value_heads="
            f"{kv_heads}; copy the model's original config.json"
        )
    experts: dict[str, Any] = {}
    if ARCHITECTURES[model_type][2]:
        experts = {
            "num_experts": config.get("num_experts") or config["num_local_experts"],
            "expert_ffn_size": config["moe_intermediate_size"],
            "experts_per_token": config["num_experts_per_tok"],
            "normalize_expert_probs": bool(config.get("norm_topk_prob", False)),
        }
    return ModelFacts(
        model_type=model_type,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.get("head_dim") or _DEFAULT_HEAD_DIM.get(model_type) or hidden // heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        tied=bool(config.get("tie_word_embeddings", False)),
        **experts,
    )


def _is_architecture_default(model_type: str, key: str) -> bool:
    """Return True if the architecture ignores the setting.

    Qwen2 always has q/k/v biases, whatever a stray `attention_bias` in its config says.
    """
    return model_type == "qwen2" and key == "attention_bias"


def kv_repeat(facts: ModelFacts, tp: int, trained: bool) -> int:
    """Return how often each KV head is repeated on `tp` ranks.

    tp / KV heads in a frozen model that has fewer KV heads than tp, else 1.
    """
    return 1 if trained else max(1, tp // facts.num_kv_heads)


def frozen_sequence_parallel(facts: ModelFacts, layout: Layout) -> bool:
    """Return whether a frozen model's activations are cut along the sequence between tp ranks.

    They are where it has experts: a tp rank then sends its own tokens to them, not all tokens.
    """
    return facts.is_moe and layout.tp > 1


def layout_problems(
    facts: ModelFacts, layout: Layout, trained: bool, sequence_parallel: bool = False
) -> list[str]:
    """List why this model cannot be cut this way: one line per reason, with sizes that would work.

    Args:
        trained: the student (True) or a frozen model.
        sequence_parallel: activations are cut along the sequence between tp ranks.

    Returns:
        Lines that begin with the axis, such as `tp=3`; none if the layout fits.
    """
    problems = []
    cuts = [
        ("tp", layout.tp, "num_attention_heads", facts.num_heads),
        ("tp", layout.tp, "intermediate_size", facts.ffn_size),
        ("pp", layout.pp, "num_hidden_layers", facts.num_layers),
    ]
    if facts.is_moe:
        cuts = [cut for cut in cuts if cut[2] != "intermediate_size"]
        cuts.append(("ep", layout.ep, "num_experts", facts.num_experts))
    for axis, size, what, number in cuts:
        if number % size:
            problems.append(
                f"{axis}={size} does not divide {what}={number}; use one of {divisors(number)}"
            )
    kv_heads = facts.num_kv_heads
    if kv_heads % layout.tp and layout.tp % kv_heads:
        fitting = sorted(
            d for d in divisors(facts.num_heads) if not (kv_heads % d and d % kv_heads)
        )
        problems.append(
            f"tp={layout.tp} and num_key_value_heads={kv_heads} do not divide one another; "
            f"use one of {fitting}"
        )
    if layout.ep > 1 and not facts.is_moe:
        problems.append(f"ep={layout.ep}, but {facts.model_type} has no experts; use ep=1")
    if facts.is_moe and trained and layout.tp > 1 and not sequence_parallel:
        problems.append(
            f"tp={layout.tp} with experts trains only with sequence parallelism; "
            "set sequence_parallel: true"
        )
    return problems
