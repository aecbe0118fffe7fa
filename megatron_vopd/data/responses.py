"""Ready responses (`data.responses`, for `prefix: teacher` or `dataset`) as rollouts.

A record holds the prompt, as in `data.train`, and one of
    response       text; an end-of-sequence id is added unless `finish_reason` is "length"
    response_ids   token ids as they were sampled, taken as they are

and may hold the `prompt_ids` that the response was generated after; they are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_vopd.config.schema import DataSection
from megatron_vopd.data.prompts import PromptTokenizer, batches
from megatron_vopd.data.records import DataError, Record, answer_of, read_records, teacher_of
from megatron_vopd.errors import shown
from megatron_vopd.types import FinishReason, Prompt, Rollout


@dataclass(frozen=True)
class Responses:
    """Ready responses in the order of the data, and how many prompts were longer than allowed."""

    rollouts: list[Rollout]
    num_too_long: int


def load_responses(
    data: DataSection,
    tokenizer: PromptTokenizer,
    teachers: Sequence[str],
    stop_ids: Sequence[int],
    context: int,
    vocab_size: int | None = None,
) -> Responses:
    """Read `data.responses` as rollouts that no engine sampled (no log-probs, version -1).

    Args:
        teachers: keys of the configured teachers.
        stop_ids: ids that end a response; a text that stops gets the tokenizer's own end if it is
            one of them, else the first.
        context: most tokens that prompt and response may have together.
        vocab_size: of the models: ids are below it; None: the tokenizer's.

    Raises:
        DataError: a record without response, with a wrong type or id, longer than `context`, or
            generated for other prompt ids than the student's template gives.
    """
    path, key = data.responses, "data.responses"
    if path is None:
        raise DataError(key, "nothing", "ready responses", "set it to a path or hub id")
    rollouts: list[Rollout] = []
    num_records = 0
    vocab_size = vocab_size or len(tokenizer.tokenizer)
    for batch in batches(read_records(path, key)):
        num_records += len(batch)
        for record, ids in zip(batch, tokenizer.prompt_ids(batch, data.prompt_field), strict=True):
            if len(ids) > data.max_prompt_tokens:
                continue
            answer = answer_of(record, data.answer_field, False)
            teacher = teacher_of(record, data.teacher_field, teachers)
            prompt = Prompt(record.name, ids, answer, teacher)
            _require_same_prompt(record, ids)
            rollouts.append(_ready(record, prompt, tokenizer, stop_ids, context, vocab_size))
    if not rollouts:
        got = f"{num_records} records, every prompt too long" if num_records else "no records"
        raise DataError(key, got, "at least one response", "give a file with records")
    return Responses(rollouts, num_records - len(rollouts))


def _ready(
    record: Record,
    prompt: Prompt,
    tokenizer: PromptTokenizer,
    stop_ids: Sequence[int],
    context: int,
    vocab_size: int,
) -> Rollout:
    given = record.fields.get("response_ids")
    if given is not None:
        response = _given_ids(record, vocab_size)
        finish: FinishReason = "stop" if response[-1] in stop_ids else "length"
    else:
        response, finish = _text_ids(record, tokenizer, stop_ids)
    if len(prompt.ids) + len(response) > context:
        raise DataError(
            record.name,
            f"{len(prompt.ids)} prompt + {len(response)} response tokens",
            f"at most {context}",
            "remove the record, or shorten its response and give finish_reason length",
        )
    return Rollout(prompt, 0, tokenizer.shared(response), None, finish, -1)


def _require_same_prompt(record: Record, ids: Sequence[int]) -> None:
    """A response was generated after these prompt ids and no others, where the record says so."""
    generated = record.fields.get("prompt_ids")
    if generated is None or list(ids) == generated:
        return
    size = len(generated) if isinstance(generated, list) else "no list of"
    raise DataError(
        f"{record.name} prompt_ids",
        f"{size} ids that are not those of its prompt",
        f"the {len(ids)} ids that the student's tokenizer and chat template give",
        "generate with the student's tokenizer and template, or remove the field prompt_ids",
    )


def _given_ids(record: Record, vocabulary_size: int) -> list[int]:
    ids = record.fields["response_ids"]
    good = isinstance(ids, list) and ids
    if good:
        good = all(type(i) is int and 0 <= i < vocabulary_size for i in ids)
    if not good:
        expected = f"a list of token ids below {vocabulary_size}"
        raise DataError(f"{record.name} response_ids", shown(ids), expected, "correct the record")
    return ids


def _text_ids(
    record: Record, tokenizer: PromptTokenizer, stop_ids: Sequence[int]
) -> tuple[list[int], FinishReason]:
    text = record.fields.get("response")
    where = f"{record.name} response"
    if not isinstance(text, str):
        got = "no such field" if text is None else shown(text)
        raise DataError(where, got, "text, or token ids in response_ids", "add it to the record")
    finish = record.fields.get("finish_reason") or "stop"
    if finish not in ("stop", "length"):
        where = f"{record.name} finish_reason"
        raise DataError(where, shown(finish), "stop or length", "correct the record")
    ids = tokenizer.encoded_response(text)
    if finish == "stop" and (not ids or ids[-1] not in stop_ids):
        own = tokenizer.tokenizer.eos_token_id
        ids = [*ids, own if own in stop_ids else stop_ids[0]]
    if not ids:
        raise DataError(where, "no tokens", "a response", "remove the record")
    return ids, finish


def shortened(rollout: Rollout, max_response_tokens: int) -> Rollout:
    """The first `max_response_tokens` of a response (the curriculum's limit for ready ones)."""
    if len(rollout.response_ids) <= max_response_tokens:
        return rollout
    ids, logprobs = rollout.response_ids, rollout.rollout_logprobs
    return replace(
        rollout,
        response_ids=ids[:max_response_tokens],
        rollout_logprobs=None if logprobs is None else logprobs[:max_response_tokens],
        finish_reason="length",
    )
