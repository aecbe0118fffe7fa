"""Every setting: its section, type, range, default and meaning (docs/guide/configuration.md).

A section validates its own values when it is built; conditions between settings are in `rules`.
Types are strict: no text for numbers, no numbers for text, no NaN and no infinity.
"""

from __future__ import annotations

import os
import re
from typing import Any, Literal, TypeGuard

from pydantic import Field, field_validator

from megatron_vopd.config.method import CurriculumSection, ObjectiveSection, RolloutSection
from megatron_vopd.config.types import (
    Count,
    CountOrNever,
    Dtype,
    PathText,
    Section,
    Size,
    Text,
    invalid,
)
from megatron_vopd.types import sequence_multiple

_EVALUATION_EXPECTED = "text, or a mapping of task names to text, or null"


class RunSection(Section):
    name: Text = Field(default="vopd", description="Name of the run; its folder is `dir`/`name`.")
    dir: Text = Field(
        default="runs", description="Folder that holds run folders; made when absent."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of data order, sampling and RNG."
    )

    @field_validator("name")
    @classmethod
    def _one_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise invalid(
                "one folder name of letters, digits, '.', '_' and '-'",
                "put the folders above it in run.dir",
            )
        return name


class StudentSection(Section):
    path: PathText = Field(description="Model to train: local folder (`/...`, `./...`) or hub id.")
    dtype: Dtype = Field(default="bf16", description="Compute type of the student.")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations computed again in the backward pass to save memory.",
    )
    chat_template: PathText = Field(
        default="tokenizer",
        description="How prompts are rendered: `tokenizer` (its own template), `none` (plain "
        "text), or a path to a Jinja file. Student and teacher see the same ids.",
    )
    thinking: bool = Field(
        default=False, description="`enable_thinking` given to the chat template."
    )


class TeacherSection(Section):
    path: PathText = Field(description="Frozen model that scores: local folder or hub id.")
    tp: Size = Field(default=1, description="Tensor-parallel size of the teacher's own layout.")
    pp: Size = Field(default=1, description="Pipeline-parallel size of the teacher's own layout.")
    ep: Size = Field(
        default=1, description="Expert-parallel size of the teacher's own layout (MoE only)."
    )
    dtype: Dtype = Field(default="bf16", description="Compute type of the teacher.")
    offload: bool = Field(
        default=False, description="Keep its weights in host memory between scorings."
    )
    cache_dir: PathText | None = Field(
        default=None,
        description="Folder, made when absent, that keeps its hidden states of given responses "
        "(`data.responses`) from the first epoch on; for this teacher alone.",
    )


class ParallelSection(Section):
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="`auto` takes CUDA where there is a GPU."
    )
    backend: Literal["auto", "te", "local"] = Field(
        default="auto",
        description="Layer implementation; `auto` takes TransformerEngine on a GPU, where it is "
        "installed.",
    )
    tp: Size = Field(default=1, description="Tensor-parallel size of the student.")
    pp: Size = Field(default=1, description="Pipeline-parallel size of the student.")
    cp: Size = Field(
        default=1,
        description="Context-parallel size of the student: its ranks share every sequence.",
    )
    ep: Size = Field(default=1, description="Expert-parallel size of the student (MoE only).")
    sequence_parallel: bool = Field(
        default=False,
        description="Split norms and dropout over tp too; an MoE student with tp > 1 needs it.",
    )


class DataSection(Section):
    train: PathText | None = Field(
        default=None,
        description="Prompts: .jsonl or .parquet file, folder, or hub id of a dataset.",
    )
    evaluation: Any = Field(
        default=None,
        description="Held-out problems of the evaluation, as `train`, or a mapping by task name.",
        json_schema_extra={"values": _EVALUATION_EXPECTED},
    )
    responses: PathText | None = Field(
        default=None, description="Ready responses, for `prefix: teacher` or `prefix: dataset`."
    )
    prompt_field: Text = Field(
        default="prompt", description="Field of a record that holds the prompt."
    )
    answer_field: Text = Field(
        default="answer", description="Field that holds the reference answer."
    )
    teacher_field: Text | None = Field(
        default=None, description="Field that names each prompt's teacher, with several `teachers`."
    )
    max_prompt_tokens: Count = Field(
        default=1024, description="Longer prompts are left out and counted."
    )
    eos_contract: Literal["student", "teacher", "union"] | None = Field(
        default=None,
        description="Whose end-of-sequence ids stop a response, are trained and exported, when the "
        "models' sets differ; null: they must be equal. Base from Instruct: `teacher`.",
    )

    @field_validator("evaluation", mode="plain")
    @classmethod
    def _path_or_tasks(cls, value: Any) -> str | dict[str, str] | None:
        remedy = "write a path or hub id, or {task: path}"
        tasks = {"": value} if isinstance(value, str) else {} if value is None else value
        if not isinstance(tasks, dict) or (isinstance(value, dict) and not value):
            raise invalid(_EVALUATION_EXPECTED, remedy)
        for task, path in tasks.items():
            name_ok = task == "" or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", str(task))
            if (
                not name_ok
                or not isinstance(path, str)
                or not path.strip()
                or not path.isprintable()
            ):
                raise invalid(_EVALUATION_EXPECTED, remedy)
        expanded = {task: os.path.expanduser(path) for task, path in tasks.items()}
        return expanded.get("") if isinstance(value, str) else expanded or None


class TrainSection(Section):
    steps: Count = Field(default=1000, description="Optimizer steps of the run.")
    max_tokens_per_microbatch: Count = Field(
        default=8192, description="Tokens packed into one microbatch; one whole sequence must fit."
    )
    spike_factor: float = Field(
        default=10.0,
        gt=1,
        le=1e9,
        description="A gradient norm this many times the running median is skipped.",
    )
    max_consecutive_skips: Count = Field(
        default=5, description="Skipped steps in a row that end the run."
    )


class OptimizerSection(Section):
    learning_rate: float = Field(
        default=1e-6, gt=0, le=1, description="Peak learning rate of AdamW."
    )
    min_learning_rate: float = Field(
        default=0.0, ge=0, le=1, description="Learning rate at the last step."
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="Shape of the decay after the warm-up."
    )
    warmup_steps: CountOrNever = Field(default=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Decoupled weight decay.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of Adam's first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of Adam's second moment.")
    eps: float = Field(default=1e-8, gt=0, le=1, description="Adam's epsilon.")
    clip_grad: float = Field(
        default=1.0, ge=0, le=1e9, description="Largest gradient norm; 0 = no clipping."
    )
    distributed: bool = Field(
        default=True, description="Split optimizer state over data parallelism."
    )
    overlap_grad_reduce: bool = Field(
        default=False,
        description="Sum gradients over replicas during the last row's backward, from the second "
        "step of a process on; not yet measured on a GPU.",
    )


class CheckpointSection(Section):
    interval: CountOrNever = Field(
        default=50, description="Steps between checkpoints; 0 = at the end only."
    )
    keep: int = Field(
        default=2, ge=2, le=10**6, description="Newest checkpoints kept, beside the best one."
    )
    export_hf: bool = Field(
        default=True, description="Also write each checkpoint as a Hugging Face folder."
    )
    resume: PathText = Field(
        default="auto",
        description="`auto`: newest valid checkpoint of this run; `never`: start fresh; or a path.",
    )


class EvaluationSection(Section):
    interval: CountOrNever = Field(
        default=50, description="Steps between evaluations on `data.evaluation`; 0 = never."
    )
    samples: Count = Field(default=8, description="Responses per problem; the n of avg@n.")
    k: Count = Field(default=8, description="k of pass@k; at most `samples`.")
    temperature: float = Field(
        default=1.0, ge=0, le=10, description="Sampling temperature; 0 = greedy."
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the evaluation.")
    max_tokens: Count = Field(default=4096, description="Longest response in an evaluation.")


class LoggingSection(Section):
    console: bool = Field(default=True, description="One line per step on the terminal.")
    tensorboard: bool = Field(default=True, description="Event files in the run folder.")
    wandb: bool = Field(default=False, description="Weights & Biases, when it is installed.")


class Config(Section):
    """A whole configuration. Build it with config.load_config, which checks all conditions."""

    run: RunSection = Field(default_factory=RunSection)
    student: StudentSection
    teacher: TeacherSection | None = None
    teachers: dict[str, TeacherSection] = Field(default_factory=dict)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    curriculum: CurriculumSection = Field(default_factory=CurriculumSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @property
    def named_teachers(self) -> dict[str, TeacherSection]:
        """Key of each teacher (`teacher`, or `teachers.<name>`) -> its section."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}

    @property
    def scores_with_teacher(self) -> bool:
        """True if the objective compares with a teacher; `estimator: hard` needs labels only."""
        return self.objective.traits.needs_teacher

    @property
    def model_paths(self) -> dict[str, str]:
        """Key of each model that the run needs -> its path or hub id; the student first."""
        teachers = self.named_teachers if self.scores_with_teacher else {}
        return {"student": self.student.path} | {key: t.path for key, t in teachers.items()}

    @property
    def has_rollouts(self) -> bool:
        """True if training samples responses from the student."""
        return "student" in self.objective.prefix_fractions

    @property
    def evaluates(self) -> bool:
        """True if the run is evaluated, which takes engines whatever it trains on."""
        return self.data.evaluation is not None and self.evaluation.interval > 0

    @property
    def has_engines(self) -> bool:
        """True if the run samples at all: to train, to be evaluated, or both."""
        return self.has_rollouts or self.evaluates

    @property
    def max_response_tokens(self) -> int:
        """Longest response that training can ask for, in tokens."""
        return self.curriculum.ladder[-1]

    @property
    def max_engine_tokens(self) -> int:
        """Longest prompt and response together that an engine is asked for, in tokens."""
        trained = self.max_response_tokens if self.has_rollouts else 0
        evaluated = self.evaluation.max_tokens if self.evaluates else 0
        return self.data.max_prompt_tokens + max(trained, evaluated)

    @property
    def max_sequence_tokens(self) -> int:
        """Most tokens that prompt and response may have together to fit into a row."""
        row = self.train.max_tokens_per_microbatch
        return row - row % sequence_multiple(self.parallel.cp)


def section_models() -> dict[str, type[Section]]:
    """Return section name -> its model, in the order of the documentation."""
    hints = {name: field.annotation for name, field in Config.model_fields.items()}
    hints["teacher"] = TeacherSection
    return {name: hint for name, hint in hints.items() if _is_section(hint)}


def _is_section(hint: Any) -> TypeGuard[type[Section]]:
    return isinstance(hint, type) and issubclass(hint, Section)
