"""The settings of the method itself: objective, rollouts, curriculum.

A row of ESTIMATORS says which settings select an objective, a row of objectives.OBJECTIVES what
it computes. Neither file may import the other; a test holds that they agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_vopd.config.types import (
    Count,
    Dtype,
    Fraction,
    Section,
    Size,
    Text,
    invalid,
    tuple_from_list,
)

PREFIX_SOURCES = ("student", "teacher", "dataset")
_PREFIX_EXPECTED = "student, teacher, dataset or a mapping of them to fractions that sum to 1"


@dataclass(frozen=True)
class Estimator:
    """The traits of an estimator that the conditions between settings depend on.

    Attributes:
        objectives: direction -> key of objectives.OBJECTIVES; other directions are refused.
        needs_teacher: whether it compares with a teacher; without one it learns given responses.
        has_advantage: whether it has baseline, importance weight and rewards, and is unbiased only
            for tokens that the student sampled at temperature 1.
        needs_topk: whether it is a sum over the student's top-k.
    """

    objectives: dict[str, str]
    needs_teacher: bool = True
    has_advantage: bool = False
    needs_topk: bool = False


ESTIMATORS = {
    "sampled": Estimator({"reverse": "sampled"}, has_advantage=True),
    "exact": Estimator({"reverse": "reverse", "forward": "forward", "mixed": "mixed"}),
    "topk": Estimator({"reverse": "topk_reverse"}, needs_topk=True),
    "hard": Estimator({"reverse": "hard"}, needs_teacher=False),
}
# Weight -> the one (estimator, direction) that reads it.
WEIGHTS = {"reverse_weight": ("exact", "mixed")}
# Baselines over the student's top-k.
TOPK_BASELINES = ("topk", "topk_tail")


def estimators_with(trait: str) -> str:
    """Return the names of the estimators that have a trait, for a message."""
    return " or ".join(name for name, row in ESTIMATORS.items() if getattr(row, trait))


class ObjectiveSection(Section):
    prefix: str | dict[str, float] = Field(
        default="student",
        description="Where responses come from: rollouts of the student, or responses in "
        "`data.responses` written by the teacher or given with the dataset.",
        json_schema_extra={"values": _PREFIX_EXPECTED},
    )
    estimator: Literal["sampled", "exact", "topk", "hard"] = Field(
        default="sampled",
        description="`sampled`: policy gradient of the sampled token (OPD, vOPD); `exact`: KL over "
        "the vocabulary, differentiated; `topk`: over the student's top-k, biased; `hard`: SFT.",
    )
    direction: Literal["reverse", "forward", "mixed"] = Field(
        default="reverse", description="Which KL; other than reverse needs `estimator: exact`."
    )
    reverse_weight: Fraction = Field(
        default=0.2,
        description="Weight of the reverse KL in `direction: mixed`; forward has the rest.",
    )
    baseline: Literal["none", "full", "topk", "topk_tail", "optimal"] = Field(
        default="full",
        description="Control variate of `estimator: sampled`: `none` is plain OPD, `full` the "
        "reverse KL over the vocabulary, `topk` the paper's, `topk_tail` and `optimal` ours.",
    )
    topk: int = Field(
        default=0, ge=0, le=1024, description="Size of the student's top-k set; 0 = not computed."
    )
    importance: Literal["none", "truncate", "mask"] = Field(
        default="truncate",
        description="Weight for engine and trainer disagreeing on a sampled token.",
    )
    importance_cap: float = Field(
        default=2.0,
        ge=1,
        le=1e6,
        description="Largest weight (`truncate`), or the band 1/cap to cap (`mask`).",
    )
    entropy_gate: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Add forward KL where the teacher's entropy exceeds this (nats).",
    )
    reward_floor: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Relaxed OPD's lambda: rewards below log(lambda) / (1 - lambda) are raised to "
        "it. Plain OPD only.",
    )
    task_reward_weight: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Weight of the group-normalised grade of each response.",
    )
    allow_biased_sampling: bool = Field(
        default=False,
        description="Accept rollout settings under which `sampled` is a biased estimate.",
    )

    @field_validator("prefix", mode="plain")
    @classmethod
    def _sources_or_fractions(cls, value: Any) -> str | dict[str, float]:
        remedy = "write for example {student: 0.5, dataset: 0.5}"
        if isinstance(value, str) and value in PREFIX_SOURCES:
            return value
        if not isinstance(value, dict) or not value or not set(value) <= set(PREFIX_SOURCES):
            raise invalid(_PREFIX_EXPECTED, remedy)
        for fraction in value.values():
            is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
            if not is_number or not 0 < fraction <= 1:
                raise invalid("fractions above 0 and at most 1", remedy)
        if abs(sum(value.values()) - 1) > 1e-6:
            raise invalid(f"fractions that sum to 1, not {sum(value.values()):.6g}", remedy)
        return {source: float(fraction) for source, fraction in value.items()}

    @property
    def prefix_fractions(self) -> dict[str, float]:
        """Share of the responses by source; the shares sum to 1."""
        return {self.prefix: 1.0} if isinstance(self.prefix, str) else dict(self.prefix)

    @property
    def traits(self) -> Estimator:
        """The row of ESTIMATORS that `estimator` names."""
        return ESTIMATORS[self.estimator]

    @property
    def name(self) -> str:
        """The key of objectives.OBJECTIVES that `estimator` and `direction` select."""
        return self.traits.objectives[self.direction]


class RolloutSection(Section):
    engine: Literal["local", "server"] = Field(
        default="local", description="vLLM started by the run, or running servers at `urls`."
    )
    urls: Annotated[tuple[Text, ...], BeforeValidator(tuple_from_list)] = Field(
        default=(), description="Servers of `engine: server`, as http://host:port."
    )
    allow_remote: bool = Field(
        default=False,
        description="Servers may be on other hosts: their network is closed to everybody else, "
        "since vLLM's routes for weights have no password.",
    )
    tp: Size = Field(default=1, description="Tensor-parallel size of each engine.")
    dtype: Dtype = Field(default="bf16", description="Compute type of the engine.")
    num_prompts: Count = Field(default=64, description="Prompts per step.")
    samples_per_prompt: Count = Field(default=1, description="Responses drawn per prompt.")
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="Sampling temperature; `sampled` is unbiased at 1 only.",
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Nucleus; `sampled` is unbiased at 1 only."
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        le=1,
        description="Policy versions a rollout may lag; 1 overlaps generation.",
    )
    memory_fraction: float = Field(
        default=0.4, gt=0, lt=1, description="Share of a GPU's memory that a local engine may take."
    )
    cpu_threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Threads of a local engine without a GPU, per worker; 0: all cores over its "
        "workers. Models of a million parameters are faster with 1.",
    )
    deadline_seconds: float = Field(
        default=1800.0, gt=0, le=604800, description="Longest wait for one step's rollouts."
    )


class CurriculumSection(Section):
    kind: Literal["entropy_gated", "fixed", "linear"] = Field(
        default="entropy_gated",
        description="Maximum response length: next rung when the student's entropy is high enough, "
        "always the last rung, or next rung every `interval` steps.",
    )
    ladder: Annotated[
        tuple[Count, ...], BeforeValidator(tuple_from_list), Field(min_length=1, max_length=100)
    ] = Field(
        default=(128, 256, 512, 1024, 2048, 4096),
        description="Response lengths in tokens, ascending.",
    )
    interval: Count = Field(default=50, description="Steps between checks, and at least per rung.")
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Smoothing of the measured entropy; restarts at each rung.",
    )
    min_entropy: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Entropy to advance, nats per token; null: by fraction.",
    )
    min_entropy_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Entropy to advance, as a share of the first measurement; 0.5 when neither "
        "is given.",
    )
    held_out_prompts: Count = Field(
        default=64,
        description="Prompts set aside from `data.train`, never trained on, to measure entropy.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_threshold(cls, values: Any) -> Any:
        absent = ("min_entropy", "min_entropy_fraction")
        if isinstance(values, dict) and all(values.get(key) is None for key in absent):
            return {**values, "min_entropy_fraction": 0.5}
        return values
