"""Small Qwen3 models with random weights, with a tokenizer of one token per character."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from megatron_vopd.demo.additions import Addition

END, UNKNOWN = "<|end|>", "<|unknown|>"
# vLLM's attention on a CPU takes heads of 32 and its multiples.
HEAD_DIM = 32


def save_tokenizer(folder: Path, alphabet: str) -> int:
    """Write a tokenizer into `folder`; returns its number of tokens, the end of a response last."""
    letters = [*alphabet, UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token=UNKNOWN)
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([UNKNOWN, END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
    fast.save_pretrained(folder)
    return len(fast)


def save_model(
    folder: Path, alphabet: str, seed: int, hidden_size: int, num_layers: int, context: int
) -> int:
    """Write a Qwen3 model as transformers initialises it; returns its number of parameters.

    Args:
        hidden_size: a multiple of 32; as many heads as 32 goes into it.
        context: longest prompt and response together, in tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tokenizer(folder, alphabet)
    num_heads = hidden_size // HEAD_DIM
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(1, num_heads // 2),
        "head_dim": HEAD_DIM,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "eos_token_id": vocab_size - 1,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3", **sizes), dtype=torch.float32
        )
    disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": vocab_size - 1}))
    return sum(parameter.numel() for parameter in model.parameters())


def share_right(folder: Path, problems: Sequence[Addition], max_new_tokens: int) -> float:
    """Return the share of right sums, 0 to 1, in greedy answers of a model under transformers.

    Args:
        problems: all of as many digits, so that their prompts are of one length.
    """
    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompts_PT = tokenizer([problem.prompt for problem in problems], return_tensors="pt").input_ids
    with torch.no_grad():
        ids = model.generate(
            prompts_PT,
            attention_mask=torch.ones_like(prompts_PT),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=model.generation_config.eos_token_id,
        )
    texts = tokenizer.batch_decode(ids[:, prompts_PT.shape[1] :], skip_special_tokens=True)
    pairs = zip(problems, texts, strict=True)
    right = sum(text.rpartition("\n")[2] == problem.answer for problem, text in pairs)
    return right / len(problems)
