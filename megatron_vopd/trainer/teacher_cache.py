"""Teacher hidden states of a step: read from disk where they are cached, else computed.

Responses that are given (not sampled from the student) come back each epoch with the same text, so
their states are computed once and kept (`files/teacher_states.py`). Kept are the tensors that ranks
exchange: the final hidden states of the response tokens, before the head.

Every rank must take part in a teacher's forward pass or none may, so ranks agree first: each rank
that needs a response's states reports whether it can read them (one all-reduce of 8 bytes per
response of the step). A row whose responses are all cached is left out of the teacher's plan; when
all rows are, no teacher runs. A cached state is used even if its row is computed for the sake of
another response: a step that is repeated after a restart then takes the same bits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_vopd.collectives import all_ranks, sum_over_world
from megatron_vopd.files.teacher_states import StateCache
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.microbatch import Row, cp_tokens
from megatron_vopd.megatron.teacher import Place, Replicas, Teacher, score
from megatron_vopd.types import Rollout

Caches = Mapping[str, StateCache]


def cached_score(
    teachers: Mapping[str, Teacher],
    caches: Caches,
    rollouts: Sequence[Rollout],
    replicas: Replicas,
    student: Groups,
    device: torch.device | str,
) -> list[Tensor]:
    """Return what `teacher.score` does, but read cached states, and keep the computed ones.

    A collective of the whole world.

    Args:
        teachers: teachers by key.
        caches: caches by key of the teacher; states of a teacher without one are always computed.
        rollouts: of the whole step, the same on every rank.
        replicas: `rollouts` packed into whole rows, for all replicas of the student.
        student: layout and groups of the student.
        device: device of the tensors that are reduced.

    Returns:
        On the student's last stage [T, D] of each microbatch of this rank's replica (its part of
        the tokens under cp); elsewhere [].

    Raises:
        UserError: on every rank; a torn cache file, or a folder that cannot be written.
    """
    keys = _keys(rollouts, caches)
    if not keys:
        return score(teachers, replicas, student)
    hits = _agreed(caches, keys, rollouts, replicas, student, device)
    complete = {
        (replica, position)
        for replica, rows in enumerate(replicas)
        for position, row in enumerate(rows)
        if row.num_tokens and hits.issuperset(row.rollouts)
    }
    fresh: dict[str, dict[str, Tensor]] = {}

    def keep(place: Place, states_TD: Tensor) -> None:
        row = replicas[place[0]][place[1]]
        for index, tokens in _spans(row, rollouts):
            if index in keys and index not in hits:
                fresh.setdefault(row.teacher, {})[keys[index]] = states_TD[tokens]

    hidden = score(teachers, replicas, student, complete, keep)
    if len(hits) < len(keys):
        all_ranks(lambda: [caches[key].write(states) for key, states in fresh.items()])
    if not hits:
        return hidden
    own = replicas[student.coordinates.dp] if student.is_last_stage else []

    def filled() -> list[Tensor]:
        pairs = zip(own, hidden, strict=True)
        return [_filled(row, h, caches, keys, hits, rollouts, student) for row, h in pairs]

    return all_ranks(filled)


def _keys(rollouts: Sequence[Rollout], caches: Caches) -> dict[int, str]:
    """Return index -> cache key of each given response whose teacher has a cache.

    A text that occurs twice in a step has a key for each: its two states were computed in two
    rows, and differ in their last bits.
    """
    seen: Counter[str] = Counter()
    keys = {}
    for index, rollout in enumerate(rollouts):
        if rollout.policy_version < 0 and rollout.response_ids and rollout.prompt.teacher in caches:
            digest = text_digest(rollout)
            keys[index] = f"{digest}-{seen[digest]}"
            seen[digest] += 1
    return keys


def _agreed(
    caches: Caches,
    keys: Mapping[int, str],
    rollouts: Sequence[Rollout],
    replicas: Replicas,
    student: Groups,
    device: torch.device | str,
) -> set[int]:
    """Return the indices of the responses whose states every rank that needs them can read."""
    own: list[int] = []
    if student.is_last_stage:
        own = [i for row in replicas[student.coordinates.dp] for i in row.rollouts if i in keys]

    def unknown() -> list[int]:
        return [i for i in own if keys[i] not in caches[rollouts[i].prompt.teacher]]

    def look() -> list[int]:
        for teacher in sorted({rollouts[i].prompt.teacher for i in unknown()}):
            caches[teacher].scan()
        return unknown()

    missing = torch.zeros(len(rollouts), dtype=torch.float64, device=device)
    missing[all_ranks(look)] = 1.0
    counts = sum_over_world(missing).tolist()
    return {i for i in keys if not counts[i]}


def _spans(row: Row, rollouts: Sequence[Rollout]) -> Iterator[tuple[int, slice]]:
    """Yield (index of the rollout, its slice of the row's tokens) for each response of a row."""
    start = 0
    for index in row.rollouts:
        stop = start + len(rollouts[index].response_ids)
        yield index, slice(start, stop)
        start = stop


def _filled(
    row: Row,
    computed_TD: Tensor,
    caches: Caches,
    keys: Mapping[int, str],
    hits: set[int],
    rollouts: Sequence[Rollout],
    student: Groups,
) -> Tensor:
    """Return the row's states on this rank: read where they are cached, else as computed."""
    if not hits.intersection(row.rollouts):
        return computed_TD
    cache = caches[row.teacher]
    read_TD = torch.empty(row.num_tokens, cache.hidden_size, dtype=cache.dtype)
    is_read_T = torch.zeros(row.num_tokens, dtype=torch.bool)
    for index, tokens in _spans(row, rollouts):
        if index in hits:
            read_TD[tokens] = cache.read(keys[index])
            is_read_T[tokens] = True
    own = cp_tokens(row.microbatch, student.coordinates.cp, student.layout.cp)
    read_TD, is_read_T = read_TD[own], is_read_T[own]
    if bool(is_read_T.all()):
        return read_TD
    at = computed_TD.device
    return torch.where(is_read_T.to(at)[:, None], read_TD.to(at), computed_TD)


def text_digest(rollout: Rollout) -> str:
    """Return a hash of the token ids of prompt and response, 32 hexadecimal digits."""
    text = f"{list(rollout.prompt.ids)}{list(rollout.response_ids)}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def text_name(rollout: Rollout) -> str:
    """Return the name of a given response in messages: `prompt_id/sample`."""
    return f"{rollout.prompt.prompt_id}/{rollout.sample}"
