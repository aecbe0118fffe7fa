"""Prompts as token ids: read, rendered, tokenized; too long ones left out, some held out.

The student's tokenizer and chat template render every prompt; teachers score the same ids. A record
whose fields are missing, empty or of a wrong type is refused with its name.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from megatron_vopd.config.schema import DataSection, StudentSection
from megatron_vopd.data.records import (
    EVALUATION_SPLITS,
    TRAINING_SPLITS,
    Conversation,
    DataError,
    Record,
    answer_of,
    conversation_of,
    read_records,
    teacher_of,
)
from megatron_vopd.data.stream import PromptStream, split_held_out
from megatron_vopd.errors import Problem, shown
from megatron_vopd.types import Prompt, is_local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_RECORDS = 1000
_BATCH = 1000
_COPY_TOKENIZER = "copy the tokenizer files of the model into its folder"
_MAX_TEMPLATE_BYTES = 2**20


@dataclass(frozen=True)
class PromptTokenizer:
    """The student's tokenizer and chat template: text or chat messages to token ids and back.

    Attributes:
        tokenizer: the student's tokenizer.
        template: Jinja text; None: plain text, with the special tokens that the tokenizer adds.
        thinking: value of the template's `enable_thinking`.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    thinking: bool
    _pool: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, folder: str, student: StudentSection) -> PromptTokenizer:
        """Read the tokenizer of a local model folder, and the template that `student` asks for.

        Raises:
            DataError: a model without tokenizer or template.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            got = f"no usable tokenizer ({shown(str(error))})"
            remedy = _COPY_TOKENIZER
            raise DataError("student.path", got, "a model with a fast tokenizer", remedy) from None
        # transformers makes such a tokenizer of a folder without tokenizer.json.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            got, expected = "an empty tokenizer", "a model with its tokenizer"
            raise DataError("student.path", got, expected, _COPY_TOKENIZER)
        template = _template(student.chat_template, tokenizer)
        return cls(tokenizer, template, student.thinking)

    def rendered(self, conversation: Conversation, where: str) -> str:
        """Render a prompt as the text whose ids the models see.

        Args:
            where: name of the record, for messages.

        Raises:
            DataError: chat messages without a template, or ones that the template refuses.
        """
        from jinja2 import TemplateError

        if self.template is None:
            if isinstance(conversation, str):
                return conversation
            remedy = "set student.chat_template=tokenizer"
            raise DataError(where, "chat messages", "text, as there is no chat template", remedy)
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        try:
            text = self.tokenizer.apply_chat_template(
                conversation,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self.thinking,
            )
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            got = f"a chat that the template refuses ({shown(str(error))})"
            remedy = "correct the messages, or give another student.chat_template"
            raise DataError(where, got, "messages that it can render", remedy) from None
        return cast(str, text)

    def encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered prompts."""
        plain = self.template is None
        batch = self.tokenizer(list(texts), add_special_tokens=plain, verbose=False)
        return cast(list[list[int]], batch["input_ids"])

    def prompt_ids(self, records: Sequence[Record], name: str) -> list[tuple[int, ...]]:
        """Tokenize the records' prompts, which are in the field `name`.

        Raises:
            DataError: a prompt that is missing, of a wrong type, or without tokens.
        """
        texts = [
            self.rendered(conversation_of(record, name), f"{record.name} {name}")
            for record in records
        ]
        rows = self.encoded(texts)
        for record, ids in zip(records, rows, strict=True):
            if not ids:
                where = f"{record.name} {name}"
                raise DataError(where, "no tokens", "a prompt", "remove the record")
        return [self.shared(ids) for ids in rows]

    def shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return `ids` with one object per id, not one per token: 8 bytes a token instead of 36."""
        return tuple([self._pool.setdefault(i, i) for i in ids])

    def encoded_response(self, text: str) -> list[int]:
        """Return the token ids of a response text; no special tokens, as it follows a prompt."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return cast(list[int], ids)

    def decoded(self, ids: Sequence[int]) -> str:
        """Return the text of a response without special tokens, as it is graded."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _template(choice: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the Jinja text that `choice` names: tokenizer, none (no template), or a file's path.

    Raises:
        DataError: a file that is not readable, empty or too large; a tokenizer without a template.
    """
    key = "student.chat_template"
    if choice == "none":
        return None
    if choice != "tokenizer":
        try:
            with open(choice, encoding="utf-8") as file:
                text = file.read(_MAX_TEMPLATE_BYTES + 1)
        except (OSError, UnicodeDecodeError) as error:
            remedy = "check the path and the file"
            raise DataError(key, shown(str(error)), "a readable Jinja file", remedy) from None
        if not text.strip() or len(text) > _MAX_TEMPLATE_BYTES:
            got = "an empty file" if not text.strip() else f"{shown(choice)}, more than 1 MiB"
            raise DataError(key, got, "a Jinja file", "set student.chat_template=tokenizer")
        return text
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        remedy = "set student.chat_template=none for plain text, or give the path of a Jinja file"
        raise DataError(key, "a tokenizer without a chat template", "one with it", remedy)
    return template


def batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Yield the records in lists of up to 1000, each of which is tokenized in one call."""
    while batch := list(itertools.islice(records, _BATCH)):
        yield batch


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of the data, and the number that was left out as too long."""

    prompts: list[Prompt]
    num_too_long: int


def load_prompts(
    path: str,
    key: str,
    fields: DataSection,
    tokenizer: PromptTokenizer,
    teachers: Sequence[str],
    needs_answer: bool,
) -> Prompts:
    """Read the training prompts at `path`.

    Args:
        path: local file or folder, or hub id.
        key: the setting that holds `path`, for messages.
        fields: names of a record's fields, and the longest prompt in tokens.
        teachers: keys of the configured teachers.
        needs_answer: require a reference answer of every record.

    Raises:
        DataError: a record that cannot be used, or no prompt left.
    """
    return _read_prompts(path, key, fields, tokenizer, TRAINING_SPLITS, teachers, needs_answer)


def _read_prompts(
    path: str,
    key: str,
    fields: DataSection,
    tokenizer: PromptTokenizer,
    splits: tuple[str, ...],
    teachers: Sequence[str],
    needs_answer: bool,
) -> Prompts:
    """Read the prompts of the first of `splits` that the data set has, as `load_prompts` does."""
    prompts: list[Prompt] = []
    num_records = 0
    for batch in batches(read_records(path, key, splits)):
        num_records += len(batch)
        for record, ids in zip(
            batch, tokenizer.prompt_ids(batch, fields.prompt_field), strict=True
        ):
            if len(ids) <= fields.max_prompt_tokens:
                answer = answer_of(record, fields.answer_field, needs_answer)
                teacher = teacher_of(record, fields.teacher_field, teachers)
                prompts.append(Prompt(record.name, ids, answer, teacher))
    if not prompts:
        longest = fields.max_prompt_tokens
        got = f"{num_records or 'no'} records"
        got += f", all longer than {longest} tokens" if num_records else ""
        remedy = "raise data.max_prompt_tokens" if num_records else "give a file with records"
        raise DataError(key, got, "at least one prompt", remedy)
    return Prompts(prompts, num_records - len(prompts))


@dataclass(frozen=True)
class TrainingPrompts:
    """The stream that training draws from, and held-out prompts that are not in it."""

    stream: PromptStream[Prompt]
    held_out: list[Prompt]
    num_too_long: int


def load_training_prompts(
    data: DataSection,
    tokenizer: PromptTokenizer,
    teachers: Sequence[str],
    needs_answer: bool,
    num_held_out: int,
    seed: int,
) -> TrainingPrompts:
    """Read `data.train`, with `num_held_out` prompts held out (for the curriculum's entropy).

    Args:
        teachers: keys of the configured teachers.
        needs_answer: require a reference answer of every record.
        seed: decides which prompts are held out, and the order of the others.

    Raises:
        DataError: no `data.train`, a record that cannot be used, or no prompt left.
        UserError: not enough different prompts to hold out `num_held_out` of them.
    """
    if data.train is None:
        raise DataError("data.train", "nothing", "prompts", "set it to a path or hub id")
    read = load_prompts(data.train, "data.train", data, tokenizer, teachers, needs_answer)
    training, held_out = split_held_out(read.prompts, num_held_out, seed)
    return TrainingPrompts(PromptStream(training, seed), held_out, read.num_too_long)


def evaluation_paths(evaluation: str | dict[str, str] | None) -> dict[str, str]:
    """Return task name -> path of `data.evaluation`.

    A single path is named after its last part, without the ending .jsonl or .parquet.
    """
    if evaluation is None or isinstance(evaluation, dict):
        return dict(evaluation or {})
    name = os.path.basename(evaluation.rstrip("/"))
    return {name.removesuffix(".jsonl").removesuffix(".parquet") or "evaluation": evaluation}


def evaluation_problems(data: DataSection) -> list[Problem]:
    """Find the first mistake in each local data set of `data.evaluation`, without a tokenizer.

    Hub ids are not looked at.
    """
    found = [
        _first_problem(path, f"data.evaluation.{task}", data, EVALUATION_SPLITS)
        for task, path in evaluation_paths(data.evaluation).items()
    ]
    return [problem for problem in found if problem is not None]


def training_problems(
    data: DataSection, teachers: Sequence[str], needs_answer: bool
) -> list[Problem]:
    """Find the first mistake in the beginning of a local `data.train`, without a tokenizer.

    Only the first FIRST_RECORDS records are read, since a data set may have millions. A hub id is
    not looked at.

    Args:
        teachers: keys of the configured teachers.
        needs_answer: require a reference answer of every record.
    """
    if data.train is None:
        return []
    known = (data, TRAINING_SPLITS, teachers, needs_answer, FIRST_RECORDS)
    problem = _first_problem(data.train, "data.train", *known)
    return [] if problem is None else [problem]


def _first_problem(
    path: str,
    key: str,
    data: DataSection,
    splits: Sequence[str],
    teachers: Sequence[str] = (),
    needs_answer: bool = True,
    limit: int | None = None,
) -> Problem | None:
    """Return the first mistake among `limit` records (None: all) of a local data set."""
    if not is_local_path(path):
        return None
    is_empty = True
    try:
        for record in itertools.islice(read_records(path, key, splits), limit):
            conversation_of(record, data.prompt_field)
            answer_of(record, data.answer_field, needs_answer)
            if teachers:
                teacher_of(record, data.teacher_field, teachers)
            is_empty = False
        if is_empty:
            raise DataError(key, "no records", "at least one problem", "give a file with some")
    except DataError as error:
        return error.problem
    return None


def load_evaluation_prompts(data: DataSection, tokenizer: PromptTokenizer) -> dict[str, Prompts]:
    """Read the problems of each task of `data.evaluation`, every one with its reference answer.

    They belong to no teacher: evaluation scores none.

    Raises:
        DataError: a record that cannot be used, or a task without a problem.
    """
    return {
        task: _read_prompts(
            path, f"data.evaluation.{task}", data, tokenizer, EVALUATION_SPLITS, (), True
        )
        for task, path in evaluation_paths(data.evaluation).items()
    }
