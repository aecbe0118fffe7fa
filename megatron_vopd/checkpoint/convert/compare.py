"""Is a converted model the model it was converted from? Bits first, then what it computes.

1. Every tensor of the HF folder against the same tensor of the other side, bit by bit.
2. Logits and the gradient of a fixed token sequence: the other side run by megatron-core (a
   checkpoint) or transformers (an HF folder), against the HF folder run by transformers, in fp32.

The bits go through the mapping table in reverse, so a table that is wrong in both directions passes
them; the second check does not use the table on transformers' side and finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_vopd.checkpoint.convert.model import CheckpointModel
from megatron_vopd.checkpoint.sharded import CheckpointReader, entries, load_entries
from megatron_vopd.checkpoint.staging import PhaseProgress, no_progress
from megatron_vopd.hf.facts import ModelError, ModelFacts
from megatron_vopd.hf.mapping import hf_tensors, model_units
from megatron_vopd.hf.source import ModelSource, read_source, same_bits
from megatron_vopd.hf.tensors import SafetensorsFolder
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.model import ModelOptions, build_model
from megatron_vopd.megatron.weights import export_tensors

NUM_TOKENS = 32
# fp32 rounding through the layers; relative to the largest logit where that exceeds 1.
LOGIT_TOLERANCE = 1e-5
# Per parameter: norm of the difference over max(its norm, 1e-3 of the largest gradient norm).
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class CheckRow:
    """One line of the verdict: what was compared, the result, what it should be."""

    name: str
    result: str
    expected: str
    passed: bool


def is_checkpoint(folder: Path) -> bool:
    return (folder / "metadata.json").is_file()


def check_tensors(
    hf_dir: Path,
    other: Path,
    groups: Groups,
    dtype: str | None = None,
    skip_objects: bool = False,
    progress: PhaseProgress = no_progress,
) -> list[CheckRow]:
    """Compare all tensors bit by bit; the first that differ are named.

    Args:
        dtype: the type that the other side was converted to; None: the stored one.
    """
    source = read_source(hf_dir, dtype)
    names = hf_tensors(source.facts)
    advance = progress("tensors", sum(torch.Size(s).numel() for s in names.values()) * 4)
    different, seen = [], 0
    with SafetensorsFolder(hf_dir) as tensors:
        for name, got in other_tensors(other, source, groups, skip_objects):
            seen += 1
            if not same_bits(tensors.slices(name)[:].to(source.dtype), got):
                different.append(name)
            advance(got.numel() * 4)
    assert seen == len(names)
    rows = [
        CheckRow(
            "tensors, bit by bit",
            f"{seen - len(different)} of {seen} equal",
            "all",
            not different,
        )
    ]
    rows += [CheckRow(f"  {name}", "differs", "equal bits", False) for name in different[:8]]
    return rows


def other_tensors(
    other: Path, source: ModelSource, groups: Groups, skip_objects: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the HF tensors of the other side, in HF's order."""
    if is_checkpoint(other):
        with CheckpointModel(other, groups, None, skip_objects) as model:
            _require_same_model(model.facts, source.facts, other)
            for unit in model_units(model.facts):
                yield from model.unit_tensors(unit)
        return
    facts = read_source(other, None).facts
    _require_same_model(facts, source.facts, other)
    with SafetensorsFolder(other) as tensors:
        for name in hf_tensors(facts):
            yield name, tensors.slices(name)[:]


def _require_same_model(got: ModelFacts, expected: ModelFacts, where: Path) -> None:
    for key, value in vars(expected).items():
        if getattr(got, key) != value:
            raise ModelError(
                f"{where}: {key} is {getattr(got, key)}, the other model has {value}; give two "
                "forms of one model"
            )


@dataclass(frozen=True)
class Outputs:
    """Logits [S, V] of the fixed sequence, and the gradient of its mean cross-entropy."""

    logits: Tensor
    gradients: dict[str, Tensor]


def check_outputs(
    hf_dir: Path, other: Path, groups: Groups, skip_objects: bool = False
) -> list[CheckRow]:
    """Compare logits and gradients in fp32. Holds both models and their gradients in memory."""
    ids = probe_ids(read_source(hf_dir, "float32").facts)
    expected = transformers_outputs(hf_dir, ids)
    if is_checkpoint(other):
        got = megatron_outputs(other, groups, ids, skip_objects)
    else:
        got = transformers_outputs(other, ids)
    scale = max(1.0, float(expected.logits.abs().max()))
    logit_error = float((got.logits - expected.logits).abs().max()) / scale
    name, gradient_error = worst_gradient(got.gradients, expected.gradients)
    return [
        CheckRow(
            "logits, largest difference",
            f"{logit_error:.1e}",
            f"<= {LOGIT_TOLERANCE:.0e}",
            logit_error <= LOGIT_TOLERANCE,
        ),
        CheckRow(
            f"gradient, worst of {len(expected.gradients)} ({name})",
            f"{gradient_error:.1e}",
            f"<= {GRADIENT_TOLERANCE:.0e}",
            gradient_error <= GRADIENT_TOLERANCE,
        ),
    ]


def probe_ids(facts: ModelFacts) -> Tensor:
    """Make a fixed sequence of token ids [S + 1] that holds the first and the last id."""
    length = min(NUM_TOKENS, facts.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, facts.vocab_size, (length + 1,), generator=generator)
    ids[0], ids[-2], ids[-1] = 0, facts.vocab_size - 1, facts.vocab_size // 2
    return ids


def transformers_outputs(hf_dir: Path, ids: Tensor) -> Outputs:
    """Compute the outputs of a folder with transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    model.eval()
    logits = model(ids[None, :-1]).logits[0]
    cross_entropy(logits, ids[1:]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Outputs(logits.detach(), split_experts(gradients))


def split_experts(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split stacked experts, as transformers has them in memory, into those of its checkpoints."""
    split: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, both in enumerate(gradient):
                gate, up = both.chunk(2)
                split[f"{prefix}.{expert}.gate_proj.weight"] = gate
                split[f"{prefix}.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            for expert, down in enumerate(gradient):
                split[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            split[name] = gradient
    return split


def megatron_outputs(
    ckpt_dir: Path, groups: Groups, ids: Tensor, skip_objects: bool = False
) -> Outputs:
    """Compute the outputs of a checkpoint with megatron-core, in one process."""
    with CheckpointModel(ckpt_dir, groups, None, skip_objects) as checked:
        hf_config, facts, stored = checked.hf_config, checked.facts, checked.dtype
    options = ModelOptions(dtype=stored, output="logits")
    model: Any = build_model(hf_config, facts, groups, options)
    with CheckpointReader(ckpt_dir, skip_objects) as reader:
        load_entries(entries(model.sharded_state_dict()), reader, ignored=("optimizer.",))
    if stored != torch.float32:
        weights = model.state_dict()
        model = build_model(hf_config, facts, groups, ModelOptions(output="logits"))
        model.load_state_dict({k: v.float() if v is not None else v for k, v in weights.items()})
    row = ids[None, :-1]
    logits = model(row, torch.arange(row.shape[1])[None], None)[0][:, : facts.vocab_size].float()
    cross_entropy(logits, ids[1:]).backward()
    shards = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    return Outputs(logits.detach(), dict(export_tensors(shards, facts, groups)))


def worst_gradient(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """Return the parameter whose gradient is furthest off, and by how much."""
    assert got.keys() >= expected.keys(), sorted(expected.keys() - got.keys())
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    errors = {
        name: float((got[name] - gradient).norm()) / max(float(gradient.norm()), floor)
        for name, gradient in expected.items()
    }
    name = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else torch.inf)
    return name, errors[name]
