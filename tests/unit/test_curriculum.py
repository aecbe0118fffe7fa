"""Scripted traces of the length curricula: when they advance, hold, and resume after a restart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pytest

from megatron_vopd.config.method import CurriculumSection
from megatron_vopd.curriculum import Curriculum, EntropyGatedLength, FixedLength, LinearLength
from megatron_vopd.run.settings import build_curriculum

LADDER = (128, 256, 512, 1024)


def trace(curriculum: Curriculum, entropies: Iterable[float], first_step: int = 1) -> list[int]:
    """Return lengths after each check from `first_step` on, one measurement per due check."""
    measured, lengths, step = iter(entropies), [], first_step
    while True:
        if curriculum.due(step):
            entropy = next(measured, None)
            if entropy is None:
                return lengths
            curriculum.update(step, entropy)
            lengths.append(curriculum.max_response_tokens)
        step += 1


@pytest.mark.parametrize(
    ("settings", "entropies", "lengths"),
    [
        # Absolute: equality advances, below holds without going back, the last rung stays.
        (
            {"min_entropy": 0.5},
            [0.5, 0.49, 0.3, 0.6, 0.7, 9, 0.1],
            [256, 256, 256, 512, *[1024] * 3],
        ),
        # Relative to the first measurement (1.2), which itself always passes.
        ({"min_entropy_fraction": 0.5}, [1.2, 0.59, 0.61, 0.6], [256, 256, 512, 1024]),
        ({"min_entropy_fraction": 1.0}, [1.0, 0.9, 1.0, 1.1], [256, 256, 512, 1024]),
        # An absolute threshold takes precedence over the fraction.
        ({"min_entropy": 2.0, "min_entropy_fraction": 0.5}, [1.2, 1.9, 2.0], [128, 128, 256]),
        # Smoothing 0.9 * past + 0.1 * now within a stage: 1, 0.94 hold, 0.956 advances ...
        ({"min_entropy": 0.95, "ema": 0.9}, [0.94, 0.94, 1.1], [128, 128, 256]),
        # ... and restarts at each rung: a carried-over 1.99 would pass 0.9 on, and must not.
        ({"min_entropy": 0.95, "ema": 0.9}, [2.0, 0.9, 0.9, 2.0], [256, 256, 256, 512]),
    ],
)
def test_entropy_gate(settings: dict[str, Any], entropies: list[float], lengths: list[int]) -> None:
    assert trace(EntropyGatedLength(LADDER, interval=10, **settings), entropies) == lengths


def test_checks_come_every_interval_and_a_stage_lasts_one() -> None:
    gate = EntropyGatedLength(LADDER, min_entropy=0.0, interval=50)
    due = []
    for step in range(201):
        if gate.due(step):
            due.append(step)
            gate.update(step, 1.0)
    assert due == [50, 100, 150, 200] and gate.max_response_tokens == 1024
    early = EntropyGatedLength(LADDER, min_entropy_fraction=0.5, interval=50)
    early.update(0, 4.0)  # a measurement before training: the reference, no advance
    assert early.max_response_tokens == 128 and early.threshold == 2.0 and not early.due(49)
    early.update(50, 1.9)
    assert early.max_response_tokens == 128


def test_metrics_say_what_was_compared() -> None:
    gate = EntropyGatedLength(LADDER, min_entropy=0.5, interval=10)
    assert gate.metrics() == {"curriculum/stage": 0, "curriculum/max_response_tokens": 128}
    gate.update(10, 0.75)
    assert gate.metrics() == {
        "curriculum/stage": 1,
        "curriculum/max_response_tokens": 256,
        "curriculum/entropy": 0.75,
        "curriculum/threshold": 0.5,
    }


def test_remarks_say_what_was_compared_and_what_follows() -> None:
    gate = EntropyGatedLength((8, 16), interval=10, ema=0.5)
    assert gate.remark == ""
    remarks = []
    for step, entropy in ((4, 1.0), (10, 0.2), (20, 0.8), (30, 0.9)):
        gate.update(step, entropy)
        remarks.append(gate.remark)
    assert remarks == [
        "curriculum after step 4: entropy 1.0000 (measured 1.0000, smoothed) >= 0.5000 nats "
        "(0.5 of the first): holds at 8 tokens (rung 1 of 2), until its interval is over",
        "curriculum after step 10: entropy 0.6000 (measured 0.2000, smoothed) >= 0.5000 nats "
        "(0.5 of the first): responses grow to 16 tokens (rung 2 of 2)",
        "curriculum after step 20: entropy 0.8000 (measured 0.8000, smoothed) >= 0.5000 nats "
        "(0.5 of the first): holds at 16 tokens (rung 2 of 2), the last",
        "curriculum after step 30: entropy 0.8500 (measured 0.9000, smoothed) >= 0.5000 nats "
        "(0.5 of the first): holds at 16 tokens (rung 2 of 2), the last",
    ]
    absolute = EntropyGatedLength((8, 16), min_entropy=0.5, interval=10)
    absolute.update(10, 0.3)
    assert absolute.remark == (
        "curriculum after step 10: entropy 0.3000 < 0.5000 nats: holds at 8 tokens (rung 1 of 2)"
    )
    linear = LinearLength((8, 16), 10)
    linear.update(10)
    grown = "curriculum after step 10: interval over: responses grow to 16 tokens (rung 2 of 2)"
    assert linear.remark == grown
    linear.update(20)
    assert linear.remark == ""


ENTROPIES = [1.0, 0.8, 0.4, 0.45, 0.7, 0.3, 0.6, 0.9, 0.2]
KINDS = {
    "relative": lambda: EntropyGatedLength(LADDER, None, 0.5, interval=7, ema=0.3),
    "absolute": lambda: EntropyGatedLength(LADDER, 0.6, None, interval=7, ema=0.3),
    "linear": lambda: LinearLength(LADDER, 14),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_anywhere_changes_nothing(kind: str) -> None:
    def run(restart_after: int | None) -> list[tuple[int, dict[str, float]]]:
        curriculum, seen = KINDS[kind](), []
        for step in range(1, 7 * len(ENTROPIES) + 1):
            if curriculum.due(step):
                curriculum.update(step, ENTROPIES[step // 7 - 1])
            if step == restart_after:
                state = json.loads(json.dumps(curriculum.state_dict()))
                curriculum = KINDS[kind]()
                curriculum.load_state_dict(state)
            seen.append((curriculum.max_response_tokens, curriculum.metrics()))
        return seen

    undisturbed = run(None)
    assert len({length for length, _ in undisturbed}) > 1
    for step in range(1, 7 * len(ENTROPIES)):
        assert run(step) == undisturbed, step


@pytest.mark.parametrize(
    ("ladder", "length", "next_length", "remark"),
    [
        (LADDER, 256, 512, None),
        # Shorter at the end.
        ((128, 256, 512), 256, 512, "responses stay at 256 tokens (rung 2 of 3)"),
        # A rung below, another above.
        ((64, 128, 256, 384), 256, 384, "responses stay at 256 tokens (rung 3 of 4)"),
        # No such length: the longest below it; nothing below: the first.
        ((200, 400), 200, 400, "go from 256 to 200 tokens (rung 1 of 2), the longest rung below"),
        ((300, 600), 300, 600, "go from 256 to 300 tokens (rung 1 of 2), the first rung, as none"),
        ((128, 256), 256, 256, "responses stay at 256 tokens (rung 2 of 2)"),
    ],
)
def test_a_changed_ladder_keeps_the_length_and_is_reported(
    ladder: tuple[int, ...], length: int, next_length: int, remark: str | None
) -> None:
    before = EntropyGatedLength(LADDER, min_entropy=0.5, interval=10, ema=0.9)
    before.update(10, 1.0)
    before.update(20, 0.2)
    after = EntropyGatedLength(ladder, min_entropy=0.5, interval=10, ema=0.9)
    after.load_state_dict(before.state_dict())
    start = f"curriculum: the ladder was {list(LADDER)} and is {list(ladder)}; "
    assert after.remark.startswith(start) and remark in after.remark if remark else not after.remark
    linear = LinearLength(ladder, 10)
    linear.load_state_dict(before.state_dict())
    assert linear.remark == after.remark
    assert after.max_response_tokens == length and not after.due(29) and after.due(30)
    after.update(30, 0.6)
    same = length == before.max_response_tokens
    # Measured at the same length, 0.2 still weighs 0.9; at another one 0.6 counts alone.
    assert after.entropy == pytest.approx(0.24 if same else 0.6)
    after.update(40, 5.0)
    assert after.max_response_tokens == next_length


def test_fixed_and_linear() -> None:
    fixed = FixedLength(LADDER)
    assert fixed.max_response_tokens == 1024 and not any(fixed.due(step) for step in range(500))
    linear = LinearLength(LADDER, 10)
    assert [linear.max_response_tokens for step in range(35) if not _advance(linear, step)][
        ::10
    ] == [
        128,
        256,
        512,
        1024,
    ]
    assert trace(LinearLength(LADDER, 10), [0.0] * 5) == [256, 512, 1024, 1024, 1024]
    assert not fixed.needs_entropy and not linear.needs_entropy


def _advance(curriculum: Curriculum, step: int) -> None:
    if curriculum.due(step):
        curriculum.update(step, None)


def test_switching_the_kind_on_resume() -> None:
    linear = LinearLength(LADDER, 10)
    linear.update(10)
    gate = EntropyGatedLength(LADDER, interval=10)
    gate.load_state_dict(linear.state_dict())
    assert gate.max_response_tokens == 256 and gate.due(20) and not gate.due(19)
    fixed = FixedLength(LADDER)
    fixed.load_state_dict(gate.state_dict())
    assert fixed.max_response_tokens == 1024
    assert fixed.remark == "curriculum: the length was fixed at 256 and is 1024 tokens"


@pytest.mark.parametrize(
    "arguments",
    [
        {"ladder": []},
        {"ladder": [2, 2]},
        {"ladder": [4, 2]},
        {"ladder": [0, 2]},
        {"ladder": [1], "min_entropy_fraction": None},
        {"ladder": [1], "min_entropy": -1.0},
        {"ladder": [1], "min_entropy": math.nan},
        {"ladder": [1], "interval": 0},
        {"ladder": [1], "ema": 1.0},
    ],
)
def test_wrong_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        EntropyGatedLength(**arguments)


@pytest.mark.parametrize("entropy", [math.nan, math.inf, None])
def test_a_measurement_must_be_a_number(entropy: float | None) -> None:
    gate = EntropyGatedLength(LADDER, interval=1)
    with pytest.raises(ValueError, match="finite"):
        gate.update(1, entropy)
    assert gate.state_dict()["last_check"] == 0


def test_from_the_configuration() -> None:
    section = CurriculumSection(ladder=(8, 16), interval=3, min_entropy=0.5)
    gate = build_curriculum(section)
    assert trace(gate, [0.4, 0.5]) == [8, 16] and gate.needs_entropy
    relative = build_curriculum(CurriculumSection(ladder=(8, 16, 32), interval=3))
    assert trace(relative, [1.0, 0.4, 0.5]) == [16, 16, 32]
    assert (
        build_curriculum(CurriculumSection(kind="fixed", ladder=(8, 16))).max_response_tokens == 16
    )
    linear = build_curriculum(CurriculumSection(kind="linear", ladder=(8, 16), interval=3))
    assert trace(linear, [0.0]) == [16] and linear.due(6)
