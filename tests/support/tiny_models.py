"""Small random models of every supported architecture, saved by transformers itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.15,
}
# head_dim 24 is not hidden / heads; one KV head is fewer than tp; Llama 3.1 scales rotary bands.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {"num_key_value_heads": 1},
    "llama": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 24,
        "moe_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
DENSE = ("qwen3", "qwen2", "llama")


@dataclass(frozen=True)
class TinyModel:
    """One model to make: its folder name says what it is."""

    model_type: str
    tied: bool = False
    vocab_size: int = 160
    dtype: str = "float32"
    overrides: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        extra = "".join(f"-{key}-{value}" for key, value in self.overrides)
        return f"{self.model_type}-{tied}-{self.vocab_size}-{self.dtype}{extra}"

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Make it with random weights, norms and biases included, and save it below `folder`."""
        torch.manual_seed(seed)
        settings = {**_SIZES, **ARCHITECTURES[self.model_type], **dict(self.overrides)}
        config = AutoConfig.for_model(
            self.model_type,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tied,
            **settings,
        )
        dtype = getattr(torch, self.dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    noise = 0.2 * torch.randn_like(parameter)
                    parameter.copy_(noise if name.endswith("bias") else 1 + noise)
        path = folder / str(self)
        model.save_pretrained(path)
        return path


def reference_tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    """Read the checkpoint as it lies on disk."""
    return load_file(model_dir / "model.safetensors")


def add_tokenizer(folder: Path, num_tokens: int = 150) -> Path:
    """Write a word-level tokenizer and a chat template beside the weights."""
    vocabulary = {f"w{i}": i for i in range(num_tokens)}
    Tokenizer(WordLevel(vocabulary, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
