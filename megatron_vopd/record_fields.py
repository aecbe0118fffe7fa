"""What a record must hold to become a prompt: its conversation, reference answer and teacher."""

from __future__ import annotations

from typing import Any

from megatron_vopd.config.schema import Config
from megatron_vopd.problems import shown
from megatron_vopd.records import DataError, Record

Conversation = str | list[dict[str, Any]]


def conversation_of(record: Record, field: str) -> Conversation:
    """The prompt: text, or chat messages with role and content; raises DataError."""
    where = f"{record.name} {field}"
    value = record.fields.get(field)
    if value is None:
        known = ", ".join(shown(name)[1:-1] for name in list(record.fields)[:10])
        raise DataError(
            where,
            f"no such field (there are: {known})",
            "text or a list of chat messages",
            "add it, or set data.prompt_field to one of these",
        )
    if isinstance(value, str):
        if not value.strip():
            raise DataError(where, "blank text", "a prompt", "remove the record")
        return value
    return [_message(message, where) for message in _messages(value, where)]


def _messages(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            shown(value),
            "text or a list of chat messages",
            'write text, or [{"role": "user", "content": "..."}]',
        )
    last = value[-1]
    if isinstance(last, dict) and last.get("role") == "assistant":
        raise DataError(
            where,
            "a chat that ends with the assistant",
            "one that ends before the response",
            "remove the last message; ready responses belong in data.responses",
        )
    return value


def _message(message: Any, where: str) -> dict[str, Any]:
    texts = isinstance(message, dict) and all(
        isinstance(message.get(part), str) for part in ("role", "content")
    )
    if not texts:
        raise DataError(
            where, shown(message), "messages with role and content as text", "correct the record"
        )
    # Tables fill a field that only some messages have with nulls.
    return {name: value for name, value in message.items() if value is not None}


def answer_of(record: Record, field: str, needed: bool) -> str | None:
    """The reference answer; None when nothing needs it and the field holds none.

    Raises:
        DataError: it is needed, and missing, blank, or neither text nor a number.
    """
    value = record.fields.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.strip():
        return value
    if not needed:
        return None
    where = f"{record.name} {field}"
    if value is None:
        remedy = "add it, or set data.answer_field"
        raise DataError(where, "no such field", "the reference answer", remedy)
    expected = "the reference answer as text or a number"
    raise DataError(where, shown(value), expected, "correct the record")


def teacher_of(record: Record, config: Config) -> str:
    """Key of the teacher that scores the record; raises DataError for an unknown name."""
    keys = list(config.named_teachers)
    field = config.data.teacher_field
    if len(keys) < 2 or field is None:
        return keys[0] if keys else "teacher"
    name = record.fields.get(field)
    if f"teachers.{name}" not in keys:
        names = ", ".join(key.removeprefix("teachers.") for key in keys)
        where = f"{record.name} {field}"
        raise DataError(where, shown(name), f"one of {names}", "correct it, or add the teacher")
    return f"teachers.{name}"
