"""The order of prompts: every one once an epoch, exact over restarts, other data refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from megatron_vopd.data.stream import PromptStream, split_held_out
from megatron_vopd.errors import UserError
from megatron_vopd.types import Prompt, Rollout


def prompts(num: int, name: str = "a.jsonl") -> list[Prompt]:
    return [Prompt(f"{name}:{i + 1}", (i, i + 1), str(i)) for i in range(num)]


def names(drawn: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in drawn]


@pytest.mark.parametrize("n", [1, 3, 7, 10, 23])
def test_each_epoch_gives_every_prompt_once(n: int) -> None:
    stream, drawn = PromptStream(prompts(10), seed=3), []
    while len(drawn) < 60:
        step = names(stream.next(n))
        assert len(step) == n
        drawn += step
    epochs = [drawn[start : start + 10] for start in range(0, 60, 10)]
    assert all(Counter(epoch) == Counter(names(prompts(10))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6, "each epoch has an order of its own"
    assert stream.epoch == len(drawn) // 10


def test_the_order_is_that_of_the_seed_and_of_nothing_else() -> None:
    def first(items: list[Prompt], seed: int) -> list[str]:
        return names(PromptStream(items, seed).next(10))

    assert first(prompts(10), 3) == first(prompts(10), 3) == first(prompts(10)[::-1], 3)
    assert first(prompts(10), 3) != first(prompts(10), 4)
    # Written down once: an order that changed with a library would break every resume.
    assert first(prompts(5), 0)[:5] == [f"a.jsonl:{i}" for i in GOLDEN]


GOLDEN = (5, 1, 3, 4, 2)


@pytest.mark.parametrize("n", [3, 5, 10, 11])
def test_a_restart_at_any_step_changes_nothing(n: int) -> None:
    """It holds before, at and after an epoch's border."""
    whole, steps = PromptStream(prompts(10), 1), 8
    expected = [names(whole.next(n)) for _ in range(steps)]
    for restart in range(steps):
        before = PromptStream(prompts(10), 1)
        drawn = [names(before.next(n)) for _ in range(restart)]
        after = PromptStream(prompts(10), 1)
        after.next(4)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        drawn += [names(after.next(n)) for _ in range(steps - restart)]
        assert drawn == expected, restart


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (prompts(9), ["9 items", "10 items"]),
        (prompts(10, "b.jsonl"), ["b.jsonl:1", "a.jsonl:1"]),
        ([*prompts(9), Prompt("a.jsonl:10", (1, 2, 3), "9")], ["fingerprint"]),
        ([*prompts(9), Prompt("a.jsonl:10", (9, 10), "8")], ["fingerprint"]),
        ([replace(p, teacher="teachers.b") for p in prompts(10)], ["fingerprint"]),
    ],
)
def test_other_data_is_refused(other: list[Prompt], words: list[str]) -> None:
    stream = PromptStream(other, 1)
    before = stream.state_dict()
    with pytest.raises(UserError) as caught:
        stream.load_state_dict(PromptStream(prompts(10), 1).state_dict())
    message = str(caught.value)
    assert all(word in message for word in [*words, "checkpoint"]) and "\n" not in message
    assert stream.state_dict() == before


def test_another_seed_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.seed: got 2, expected the checkpoint's, 1"):
        PromptStream(prompts(3), 2).load_state_dict(PromptStream(prompts(3), 1).state_dict())


def test_nothing_to_stream_and_equal_names() -> None:
    with pytest.raises(UserError, match="no prompts"):
        PromptStream([], 0)
    with pytest.raises(ValueError, match="same name"):
        PromptStream([*prompts(2), *prompts(1)], 0)


def test_ready_rollouts_stream_too() -> None:
    prompt = prompts(1)[0]
    rollouts = [Rollout(prompt, i, (i,), None, "stop", -1) for i in range(4)]
    stream = PromptStream(rollouts, 0)
    assert Counter(rollout.sample for rollout in stream.next(8)) == dict.fromkeys(range(4), 2)
    changed = [*rollouts[:3], replace(rollouts[3], response_ids=(9,))]
    with pytest.raises(UserError, match="fingerprint"):
        PromptStream(changed, 0).load_state_dict(stream.state_dict())


def test_held_out_prompts_are_never_trained_on() -> None:
    repeated = [*prompts(20), *(replace(p, prompt_id=f"again:{p.prompt_id}") for p in prompts(20))]
    training, held_out = split_held_out(repeated, 6, seed=5)
    assert len(held_out) == 6 == len({prompt.ids for prompt in held_out})
    assert not {prompt.ids for prompt in training} & {prompt.ids for prompt in held_out}
    assert len(training) == 40 - 2 * 6
    assert split_held_out(repeated[::-1], 6, seed=5)[1] == held_out
    assert split_held_out(repeated, 6, seed=6)[1] != held_out
    assert split_held_out(repeated, 0, seed=5) == (repeated, [])


@pytest.mark.parametrize("num", [10, 11])
def test_too_many_held_out(num: int) -> None:
    with pytest.raises(UserError, match=r"curriculum\.held_out_prompts: got .* 10 different"):
        split_held_out(prompts(10), num, 0)
