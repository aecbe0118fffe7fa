"""Runs whose every rank is lived (`lives`): the examples in their own layouts, and harder ones."""

from __future__ import annotations

from pathlib import Path

from megatron_vopd.config.loading import load_config
from megatron_vopd.config.world import layouts
from megatron_vopd.types import Layout
from tests.support.lives import VOCAB, Example
from tests.support.tiny_models import TinyModel

EXAMPLES = Path(__file__).parents[2] / "examples"
_SIZES = (("hidden_size", 32), ("intermediate_size", 32), ("head_dim", 8))
_DENSE = TinyModel("qwen3", True, VOCAB, overrides=(*_SIZES, ("num_hidden_layers", 4)))
_LAYERS = ("num_hidden_layers", 2)
_SMALL = TinyModel("qwen3", True, VOCAB, overrides=(*_SIZES, _LAYERS))
_WIDE = TinyModel("qwen3", False, VOCAB, overrides=(*_SIZES, _LAYERS, ("num_attention_heads", 8)))
_EXPERTS = TinyModel(
    "qwen3_moe",
    False,
    VOCAB,
    overrides=(
        *_SIZES,
        _LAYERS,
        ("num_key_value_heads", 4),
        ("moe_intermediate_size", 8),
        ("num_experts", 32),
    ),
)
# Name of an example -> small models of its student's and its teacher's kind.
MODELS = {
    "math_qwen3_4b": (_SMALL, _SMALL),
    "qwen3_8b_from_32b": (_SMALL, _WIDE),
    "qwen3_4b_from_235b": (_SMALL, _EXPERTS),
}


def example(name: str, world_size: int, rows: int = 1) -> Example:
    """Return an example of this repository on `world_size` ranks: more or fewer replicas."""
    config = load_config(str(EXAMPLES / name / "config.yaml"), [])
    cut = layouts(config, world_size)
    return Example(
        name,
        cut["student"],
        cut["teacher"],
        *MODELS[name],
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.student.recompute,
        staleness=config.rollout.max_staleness,
        rows=rows,
    )


# What no example has: a student in stages with a tied head, one with experts, teachers in more
# stages than it, rows in flight in both pipelines, generation one step ahead.
HARDER = (
    Example(
        "stages", Layout(8, tp=2, pp=4), Layout(8, tp=4, pp=2), _DENSE, _WIDE, True, "full", 1, 6
    ),
    Example("deep", Layout(8, pp=2), Layout(8, pp=4, tp=2), _DENSE, _DENSE, rows=4),
    Example(
        "experts",
        Layout(8, tp=2, pp=2, ep=2),
        Layout(8, tp=2, pp=2, ep=4),
        _EXPERTS,
        _EXPERTS,
        True,
        rows=4,
    ),
)
