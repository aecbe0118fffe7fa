"""A byte-level tokenizer with the special tokens and the chat template of a small Qwen."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ENDOFTEXT, IM_START, IM_END = 256, 257, 258
VOCAB_SIZE = 264
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def save_tokenizer(folder: Path, template: str | None = TEMPLATE, begins: bool = False) -> Path:
    """Write the tokenizer's files into `folder`, made when absent.

    Args:
        begins: plain text begins with <|endoftext|>, as Llama's begins with its own token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    if begins:
        begin = (SPECIALS[0], ENDOFTEXT)
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin[0]} $0", None, [begin])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[2])
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def save_model_folder(folder: Path, eos: int | list[int] | None = IM_END) -> Path:
    """Save a Qwen3 folder without weights, with the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return save_tokenizer(folder)
