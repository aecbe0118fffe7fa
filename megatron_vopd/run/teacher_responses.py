"""A teacher's responses to prompts, as a file that a run with `prefix: teacher` trains on.

Prompts are read, rendered and named as a run does. A batch of prompts is sampled at a time, each
response with a seed of its own (`response_seed`), the engine's cache emptied before: a batch that
is sampled again after a kill gives the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_vopd.config.schema import StudentSection
from megatron_vopd.data.prompts import PromptTokenizer, batches
from megatron_vopd.data.records import DataError, Record, read_records
from megatron_vopd.data.stream import fingerprint as data_fingerprint
from megatron_vopd.errors import EngineError, Problem, UserError
from megatron_vopd.files.response_file import ResponseFile
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.hf.folder import ModelFolder, read_model_folder
from megatron_vopd.hf.folder import fingerprint as model_fingerprint
from megatron_vopd.hf.hub import local_model_folder
from megatron_vopd.rollout.engine import Engine, Sampling
from megatron_vopd.rollout.validate import check_rollouts
from megatron_vopd.rollout.vllm.local import FrozenEngine
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.types import Prompt, Rollout

FORMAT = 1
_WEEK_SECONDS = 604800.0


@dataclass(frozen=True)
class Job:
    """An order for responses, with the names of the command's options.

    Attributes:
        model: HF folder or hub id of the teacher.
        tokenizer: folder or hub id whose tokenizer and template render the prompts; None: `model`.
        batch: prompts that are sampled at a time.
    """

    model: str
    prompts: str
    out: Path
    tokenizer: str | None = None
    chat_template: str = "tokenizer"
    thinking: bool = False
    prompt_field: str = "prompt"
    max_prompt_tokens: int = 1024
    samples: int = 1
    max_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 256
    dtype: str = "bf16"
    device: str = "cpu"
    tp: int = 1
    memory_fraction: float = 0.9


@dataclass(frozen=True)
class Plan:
    """A job whose inputs were read: records and their prompts, in order, and how to sample."""

    job: Job
    folder: str
    model: ModelFolder
    tokenizer: PromptTokenizer
    records: list[Record]
    prompts: list[Prompt]
    num_too_long: int
    sampling: Sampling

    @property
    def places(self) -> list[tuple[str, int]]:
        """Prompt and sample of each line."""
        return [(p.prompt_id, sample) for p in self.prompts for sample in range(self.job.samples)]

    def identity(self) -> dict[str, Any]:
        """Return what decides every bit of the lines, as JSON values."""
        job = self.job
        options = ("samples", "max_tokens", "temperature", "top_p", "seed", "dtype")
        return {
            "format": FORMAT,
            "model": model_fingerprint(Path(self.folder))[:16],
            "prompts": f"{len(self.prompts)} ({data_fingerprint(self.prompts)})",
            **{option: getattr(job, option) for option in options},
        }


def plan(job: Job) -> Plan:
    """Read everything that can be wrong before the engine is started, which takes minutes.

    Raises:
        UserError: no such model, prompts that cannot be used, responses longer than the context.
    """
    folder = local_model_folder(job.model, "MODEL_DIR")
    model = read_model_folder(folder)
    student = StudentSection(
        path=job.tokenizer or job.model, chat_template=job.chat_template, thinking=job.thinking
    )
    own_folder = local_model_folder(student.path, "student.path", weights=False)
    tokenizer = PromptTokenizer.of(own_folder, student)
    records, prompts, num_records = [], [], 0
    for batch in batches(read_records(job.prompts, "PROMPTS")):
        num_records += len(batch)
        ids = tokenizer.prompt_ids(batch, job.prompt_field)
        for record, own in zip(batch, ids, strict=True):
            if len(own) <= job.max_prompt_tokens:
                records.append(record)
                prompts.append(Prompt(record.name, own))
    if not prompts:
        got = f"{num_records} records, none of at most {job.max_prompt_tokens} tokens"
        raise DataError("PROMPTS", got, "at least one prompt", "see --max-prompt-tokens")
    _require_room(job, model, prompts)
    sampling = Sampling(
        max_tokens=job.max_tokens,
        samples=job.samples,
        temperature=job.temperature,
        top_p=job.top_p,
        seed=job.seed,
        stop_ids=tuple(sorted(model.eos_ids)),
    )
    too_long = num_records - len(prompts)
    return Plan(job, folder, model, tokenizer, records, prompts, too_long, sampling)


def _require_room(job: Job, model: ModelFolder, prompts: Sequence[Prompt]) -> None:
    longest, largest = max(len(p.ids) for p in prompts), max(max(p.ids) for p in prompts)
    if longest + job.max_tokens > model.context:
        raise DataError(
            "--max-tokens",
            f"{job.max_tokens} after prompts of up to {longest} tokens",
            f"at most the context of {job.model}, {model.context}, together",
            f"give --max-tokens {max(model.context - longest, 1)}, or --max-prompt-tokens",
        )
    if largest >= model.facts.vocab_size:
        expected = f"ids below the teacher's vocabulary of {model.facts.vocab_size}"
        raise DataError("--tokenizer", f"the id {largest}", expected, "give the teacher's own")
    if not model.eos_ids:
        remedy = "add eos_token_id to generation_config.json"
        raise DataError("MODEL_DIR", "no EOS id", "at least one: a response has to end", remedy)


def require_vllm() -> None:
    """Refuse where vLLM is not installed."""
    if find_spec("vllm") is None:
        remedy = "install it (CPU: make engine)"
        raise UserError(str(Problem("vLLM", "no such package", "it beside this package", remedy)))


def make_engine(plan: Plan) -> Engine:
    """Make a vLLM engine on the teacher's own weights; it starts when it is first asked."""
    job = plan.job
    longest = max(len(prompt.ids) for prompt in plan.prompts)
    return FrozenEngine(
        LocalSettings(
            plan.folder,
            log_path=f"{job.out}.engine.log",
            max_model_len=longest + job.max_tokens,
            dtype=CONFIG_DTYPES[job.dtype].name,
            device=job.device,
            tp=job.tp,
            seed=job.seed,
            deadline_seconds=_WEEK_SECONDS,
            memory_fraction=job.memory_fraction,
            # Each batch starts with an empty cache: its bits follow from the batch alone.
            prefix_caching=False,
            reads_weights=True,
        )
    )


def generate(
    plan: Plan, file: ResponseFile, engine: Engine, advance: Callable[[int], None]
) -> None:
    """Sample the responses that are missing in `file`, and append them.

    Args:
        advance: called with the number of responses that are there, sampled ones included.

    Raises:
        EngineError: the engine failed twice on a batch; whole lines stay.
    """
    samples = plan.job.samples
    advance(file.num_lines)
    while file.num_lines < len(plan.places):
        # Batches lie at fixed places: one that was cut short by a kill is sampled again whole.
        first = file.num_lines // samples // plan.job.batch * plan.job.batch
        there = file.num_lines - first * samples
        rollouts = _batch(plan, engine, first, advance)
        records = plan.records[first : first + plan.job.batch]
        lines = [
            line_of(records[i // samples], rollout, plan.tokenizer)
            for i, rollout in enumerate(rollouts)
        ]
        file.append(lines[there:])
    file.finish()


def _batch(plan: Plan, engine: Engine, first: int, advance: Callable[[int], None]) -> list[Rollout]:
    prompts = plan.prompts[first : first + plan.job.batch]
    vocab_size = plan.model.facts.vocab_size

    def sampled() -> list[Rollout]:
        done = first * plan.job.samples
        rollouts = engine.generate(prompts, plan.sampling, lambda n, _: advance(done + n))
        check_rollouts(rollouts, prompts, plan.sampling, 0, 0, vocab_size)
        return rollouts

    try:
        return sampled()
    except EngineError:
        # The error ended the engine; a new one starts and gives the answer that was due.
        return sampled()


def line_of(record: Record, rollout: Rollout, tokenizer: PromptTokenizer) -> dict[str, Any]:
    """Return one response as `data.responses` loads it: the record's own fields, then ours."""
    return {
        **record.fields,
        "prompt_id": rollout.prompt.prompt_id,
        "sample": rollout.sample,
        "response": tokenizer.decoded(rollout.response_ids),
        "finish_reason": rollout.finish_reason,
        "prompt_ids": list(rollout.prompt.ids),
        "response_ids": list(rollout.response_ids),
        "logprobs": list(rollout.rollout_logprobs or ()),
    }
