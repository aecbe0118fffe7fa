"""Which token ids end a response (`data.eos_contract`).

A base model often ends with one id and its instruct sibling with two. When student and teacher
disagree and nobody decides, the student never learns to stop and responses grow without bound.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vopd.errors import refusal
from megatron_vopd.hf.folder import ModelFolder

_SETTING = "data.eos_contract"


def agreed_stop_ids(
    contract: str | None, student: frozenset[int], teachers: Mapping[str, frozenset[int]]
) -> tuple[int, ...]:
    """The ids that stop a response, ascending.

    Args:
        contract: student, teacher, union; None: all sets must be equal.
        student: end-of-sequence ids of the student.
        teachers: the same by key of each teacher; empty when none scores.

    Raises:
        UserError: the sets differ without a contract, or the chosen set is empty.
    """
    sets = set(teachers.values())
    chosen = student
    if contract == "union":
        chosen = student.union(*sets)
    elif contract == "teacher" and sets:
        if len(sets) > 1:
            raise refusal(
                _SETTING, "teacher", "teachers with equal EOS ids", "set data.eos_contract=union"
            )
        chosen = next(iter(sets))
    elif contract is None and sets - {student}:
        named = {"student": student, **teachers}
        got = ", ".join(f"{sorted(ids)} ({key})" for key, ids in named.items())
        remedy = "set data.eos_contract=teacher (the student learns the teacher's end) or union"
        raise refusal(_SETTING, f"EOS ids {got}", "equal sets, or a contract", remedy)
    if not chosen:
        remedy = "add eos_token_id to generation_config.json: a response has to end"
        raise refusal(_SETTING, f"no EOS id with contract {contract}", "at least one", remedy)
    return tuple(sorted(chosen))


def stop_ids(contract: str | None, models: Mapping[str, ModelFolder]) -> tuple[int, ...]:
    """Return the ids that stop a response, ascending, agreed between the models of a run.

    Each model's own ids come from generation_config.json, else config.json, else its tokenizer.

    Args:
        models: the student, and by its key each teacher that scores.
    """
    ids = {key: model.eos_ids for key, model in models.items()}
    return agreed_stop_ids(contract, ids.pop("student"), ids)
