"""megatron-core's GPTModel from a HuggingFace config.

`build_model` makes one pipeline stage's shard of the model, empty; `weights.load_weights` fills it.
The student and the teacher are both built here, from their own `Groups`.

The last stage returns final hidden states, not logits: the vocabulary head is applied by the loss,
in chunks of tokens, so that `[T, V]` is never stored. The head's weight stays where checkpoints and
weight tying expect it (`head_weight`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vopd.errors import LayoutError
from megatron_vopd.hf.facts import ModelError, ModelFacts, kv_repeat, layout_problems
from megatron_vopd.hf.mapping import shard_parameters
from megatron_vopd.megatron.attention import CausalAttention, RMSNorm
from megatron_vopd.megatron.groups import Groups


@dataclass(frozen=True)
class ModelOptions:
    """How a model is built, beyond what its HF config says.

    Attributes:
        dtype: of parameters and activations.
        device: "cpu" or "cuda".
        layer_spec: "local" (runs anywhere) or "te" (TransformerEngine).
        sequence_parallel: cut activations along the sequence between tp ranks.
        recompute: activations computed again in the backward pass: none, of attention, of layers.
        trained: False for a frozen model: no gradients, KV heads repeated where tp exceeds them.
        output: what the last stage returns: "hidden" [B, S, D] (S cut over tp under sequence
            parallelism) or "logits" [B, S, V_padded / tp].
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layer_spec: Literal["local", "te"] = "local"
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    trained: bool = True
    output: Literal["hidden", "logits"] = "hidden"


def build_model(
    hf_config: Any, facts: ModelFacts, groups: Groups, options: ModelOptions
) -> GPTModel:
    """Build this rank's shard of the model; its parameters are not filled yet.

    Args:
        hf_config: the transformers config that `facts` were read from (its RoPE settings are used).
        groups: the model's layout and process groups.

    Raises:
        LayoutError: the model cannot be cut this way; the message lists the sizes that would work.
        ModelError: a RoPE variant that scales attention (YaRN).
    """
    layout = groups.layout
    problems = layout_problems(facts, layout, options.trained, options.sequence_parallel)
    if problems:
        raise LayoutError("; ".join(problems))
    config = transformer_config(facts, groups, options)
    model = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(config, facts, groups, options),
        vocab_size=facts.padded_vocab_size(layout.tp),
        max_sequence_length=facts.max_positions,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=facts.tied,
        position_embedding_type="rope",
        pg_collection=groups.process_groups,
    )
    model.rotary_pos_emb.inv_freq = rope_frequencies(hf_config).to(options.device)
    if groups.is_last_stage and options.output == "hidden":
        model.output_layer.forward = _return_hidden
    _mark_parameters(model, facts, groups, options)
    if options.layer_spec == "te" and options.trained:
        _fuse_weight_gradients(model)
    if not options.trained:
        model.requires_grad_(False)
        model.eval()
    return model


def _mark_parameters(
    model: GPTModel, facts: ModelFacts, groups: Groups, options: ModelOptions
) -> None:
    """Set the marks by which megatron-core sums gradients and counts each once in their norm.

    megatron-core sets them while it initialises weights, which is switched off here. Experts are
    whole, also where tp > 1: their gradients are summed over their own replicas, and every rank
    counts its own in the norm, whose group for experts has no replicas in it. megatron-core itself
    does so only if ep > 1; otherwise tp ranks would keep partial gradients.
    """
    repeat = kv_repeat(facts, groups.layout.tp, options.trained)
    plans = shard_parameters(facts, groups.layout, groups.coordinates, options.layer_spec, repeat)
    for name, parameter in model.named_parameters():
        is_expert, cut_dim = ".experts." in name, plans[name].partition_dim
        marks = {
            "allreduce": not is_expert,
            "tensor_model_parallel": is_expert or cut_dim is not None,
            "partition_dim": -1 if cut_dim is None else cut_dim,
            "partition_stride": 2 if name.endswith("mlp.linear_fc1.weight") else 1,
        }
        for mark, value in marks.items():
            setattr(parameter, mark, value)


def _fuse_weight_gradients(model: GPTModel) -> None:
    """Let TransformerEngine's layers add weight gradients into `main_grad` themselves.

    megatron-core's setting for it, `gradient_accumulation_fusion`, stays off: it would also ask its
    own output layer for an extension of apex, without which that layer cannot be built. The head
    needs none: the loss adds the head's gradient into `main_grad` itself.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = cast(Any, True)


def _return_hidden(input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Return the input, in place of the output layer's matrix product."""
    return input_, None


def head_weight(model: GPTModel) -> Tensor:
    """Return the last stage's vocabulary head [V_padded / tp, D]; when tied, the embedding."""
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    assert weight is not None, "only the last pipeline stage has the head"
    return weight


def rope_frequencies(hf_config: Any) -> Tensor:
    """Return inverse rotary frequencies [head_dim / 2] fp32, as transformers computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # Real numbers also where the model is built on the meta device, for its shapes only.
    with torch.device("cpu"):
        rope = LlamaRotaryEmbedding(config=hf_config)
    if rope.attention_scaling != 1.0:
        kind = hf_config.rope_parameters["rope_type"]
        raise ModelError(
            f"config.json: rope_type {kind!r} scales attention by {rope.attention_scaling:.4f}, "
            "which is not supported; use a checkpoint with rope_type default, linear or llama3"
        )
    return rope.inv_freq.float().clone()


def transformer_config(
    facts: ModelFacts, groups: Groups, options: ModelOptions
) -> TransformerConfig:
    """Make megatron-core's config: exact operations, no dropout, token-summed loss."""
    layout, on_cpu = groups.layout, options.device == "cpu"
    recompute: dict[str, Any] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }[options.recompute]
    return TransformerConfig(
        num_layers=facts.num_layers,
        hidden_size=facts.hidden_size,
        num_attention_heads=facts.num_heads,
        num_query_groups=facts.num_kv_heads * kv_repeat(facts, layout.tp, options.trained),
        kv_channels=facts.head_dim,
        ffn_hidden_size=facts.ffn_size,
        layernorm_epsilon=facts.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=facts.qkv_bias,
        qk_layernorm=facts.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
        # The weights are read from a checkpoint; load_weights checks that every element is.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        params_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        pipeline_dtype=options.dtype,
        variable_seq_lengths=True,
        deallocate_pipeline_outputs=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        sequence_parallel=options.sequence_parallel and layout.tp > 1,
        **recompute,
        **_fusions(options),
        **_expert_settings(facts, options),
    )


def _fusions(options: ModelOptions) -> dict[str, bool]:
    """Choose fused kernels, which come with TransformerEngine, or the local spec's plain ones."""
    fused = options.layer_spec == "te"
    return {
        "gradient_accumulation_fusion": False,  # of TransformerEngine: `_fuse_weight_gradients`
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "apply_rope_fusion": fused,
        "masked_softmax_fusion": False,
        "persist_layer_norm": fused,
    }


def _expert_settings(facts: ModelFacts, options: ModelOptions) -> dict[str, Any]:
    """Send every token to all of its experts without balancing loss, as transformers does."""
    # megatron-core asks for this dispatcher wherever sequence lengths vary, experts or not.
    dispatcher = {"moe_token_dispatcher_type": "alltoall"}
    if not facts.is_moe:
        return dispatcher
    return dispatcher | {
        "num_moe_experts": facts.num_experts,
        "moe_ffn_hidden_size": facts.expert_ffn_size,
        "moe_router_topk": facts.experts_per_token,
        "moe_router_pre_softmax": not facts.normalize_expert_probs,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": options.layer_spec == "te",
    }


def _block_spec(
    config: TransformerConfig, facts: ModelFacts, groups: Groups, options: ModelOptions
) -> Any:
    """Declare this stage's layers; the local ones get our norm and attention (`attention`)."""
    if options.layer_spec == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=facts.num_experts or None,
            moe_grouped_gemm=facts.is_moe,
            qk_layernorm=facts.qk_norm,
        )
    spec = get_gpt_layer_local_spec(
        num_experts=facts.num_experts or None,
        moe_grouped_gemm=False,
        qk_layernorm=facts.qk_norm,
        normalization="RMSNorm",
    )
    layer = cast(Any, spec.submodules)
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if facts.is_moe:
        # Before experts the norm is a module of its own in TransformerEngine's layers too; only in
        # dense ones is it a part of the first product. Checkpoints of both have the same keys.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    attention = layer.self_attention.submodules
    attention.core_attention = CausalAttention
    if facts.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = [replace(spec) for _ in range(facts.num_layers // groups.layout.pp)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=cast(Any, RMSNorm))
