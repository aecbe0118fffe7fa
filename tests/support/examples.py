"""The examples for GPUs, and the facts of the models that they name."""

from __future__ import annotations

from megatron_vopd.config import Config, load_config
from tests.support import ROOT

MODELS = ROOT / "tests" / "fixtures" / "models"
# Name of the folder -> ranks that its page and its script speak of.
EXAMPLES = {
    "math_qwen3_1.7b": 1,
    "math_qwen3_4b": 8,
    "qwen3_8b_from_32b": 8,
    "qwen3_4b_from_235b": 64,
}
# A GPU for the demo: its runs are for a CPU as they stand.
DEMO = "arithmetic/distil.yaml"
ON_GPU = ["parallel.device=cuda", "student.dtype=bf16", "teacher.dtype=bf16", "rollout.dtype=bf16"]


def local_models(name: str) -> list[str]:
    """Return overrides that give each model of an example as a local folder of its facts."""
    config = load_config(ROOT / "examples" / name / "config.yaml")
    sections = {"student": config.student, **config.named_teachers}
    return [f"{key}.path={MODELS / one.path.split('/')[1]}" for key, one in sections.items()]


def example(name: str, *overrides: str) -> Config:
    """Load an example on local folders of its models' facts."""
    path = ROOT / "examples" / name / "config.yaml"
    return load_config(path, [*local_models(name), *overrides])
