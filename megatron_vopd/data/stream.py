"""The order in which a run sees its prompts: reshuffled each epoch, exact over restarts.

Each epoch is sorted by a hash of (seed, epoch, name of the item): the order depends on no random
number generator and no library version, and a resumed run needs only the epoch and the position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from megatron_vopd.errors import Problem, UserError, shown
from megatron_vopd.types import Prompt, Rollout

Item = TypeVar("Item", Prompt, Rollout)


def _name(item: Prompt | Rollout) -> str:
    if isinstance(item, Rollout):
        return f"{item.prompt.prompt_id}/{item.sample}"
    return item.prompt_id


def _hash(*parts: object) -> bytes:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()


def fingerprint(items: Sequence[Prompt | Rollout]) -> str:
    """Hash names, token ids, answers and teachers of all items, in order: 16 hexadecimal digits.

    It identifies the data that a checkpoint's position refers to.
    """
    digest = hashlib.sha256()
    for item in items:
        prompt = item.prompt if isinstance(item, Rollout) else item
        response_ids = item.response_ids if isinstance(item, Rollout) else ()
        content = (_name(item), prompt.ids, response_ids, prompt.answer, prompt.teacher)
        digest.update(repr(content).encode())
    return digest.hexdigest()[:16]


def split_held_out(
    prompts: Sequence[Prompt], num_held_out: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into (those to train on, held-out ones), disjoint in content.

    Equal arguments give equal lists. A prompt whose ids repeat those of a held-out one is in
    neither list.

    Raises:
        UserError: there are not `num_held_out` different prompts, or none is left to train on.
    """
    order = sorted(prompts, key=lambda prompt: _hash("held out", seed, prompt.prompt_id))
    held_out: list[Prompt] = []
    taken: set[tuple[int, ...]] = set()
    for prompt in order:
        if len(held_out) == num_held_out:
            break
        if prompt.ids not in taken:
            held_out.append(prompt)
            taken.add(prompt.ids)
    training = [prompt for prompt in prompts if prompt.ids not in taken]
    if not training or len(held_out) < num_held_out:
        num_different = len({prompt.ids for prompt in prompts})
        raise UserError(
            str(
                Problem(
                    "curriculum.held_out_prompts",
                    str(num_held_out),
                    f"fewer than the {num_different} different prompts of data.train",
                    "lower it, or give more prompts",
                )
            )
        )
    return training, held_out


class PromptStream(Generic[Item]):
    """An endless, resumable sequence of prompts (or of ready rollouts).

    Each epoch gives every item once, in another order.

    Args:
        prompts: at least one; names must differ.
        seed: seed of the order.
    """

    def __init__(self, prompts: Sequence[Item], seed: int) -> None:
        if not prompts:
            raise UserError(
                "prompt stream: got no prompts, expected at least one; check data.train"
            )
        self._items = list(prompts)
        self._names = [_name(item) for item in self._items]
        if len(set(self._names)) != len(self._names):
            raise ValueError("prompt stream: two items with the same name")
        self._seed = seed
        self._fingerprint = fingerprint(self._items)
        self._epoch, self._position = 0, 0
        self._order = self._ordered()

    def __len__(self) -> int:
        """Return the number of items in one epoch."""
        return len(self._items)

    @property
    def epoch(self) -> int:
        """Whole passes given so far."""
        return self._epoch

    def next(self, n: int) -> list[Item]:
        """Return the next `n` items; the last of an epoch are followed by the first of the next."""
        result: list[Item] = []
        while len(result) < n:
            taken = self._order[self._position : self._position + n - len(result)]
            result += [self._items[i] for i in taken]
            self._position += len(taken)
            if self._position == len(self._items):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._ordered()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position and the identity of its data, as JSON values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "num_items": len(self._items),
            "first_item": self._names[0],
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the position in `state`.

        Raises:
            UserError: the state belongs to other data (both are named) or to another seed.
        """
        mine = self.state_dict()
        identity = ("num_items", "first_item", "fingerprint")
        if any(state.get(key) != mine[key] for key in identity):
            problem = Problem(
                "prompt stream",
                _described(mine),
                f"those of the checkpoint, {_described(state)}",
                "give back its data files, tokenizer and template settings, or start a new run",
            )
            raise UserError(str(problem))
        if state.get("seed") != self._seed:
            problem = Problem(
                "run.seed",
                str(self._seed),
                f"the checkpoint's, {shown(state.get('seed'))}",
                "set it back, or start a new run",
            )
            raise UserError(str(problem))
        epoch, position = state["epoch"], state["position"]
        if not (epoch >= 0 and 0 <= position < len(self._items)):
            raise ValueError(f"prompt stream: position {position} of epoch {epoch}")
        self._epoch, self._position = epoch, position
        self._order = self._ordered()

    def _ordered(self) -> list[int]:
        keys = [_hash(self._seed, self._epoch, name) for name in self._names]
        return sorted(range(len(keys)), key=keys.__getitem__)


def _described(state: dict[str, Any]) -> str:
    return (
        f"{shown(state.get('num_items'))} items from {shown(state.get('first_item'))[1:-1]} on "
        f"(fingerprint {shown(state.get('fingerprint'))[1:-1]})"
    )
