"""Student, teacher and layouts of the tests that compare a step with the plain reference."""

from __future__ import annotations

from megatron_vopd.types import Layout
from tests.support.layouts import Case
from tests.support.tiny_models import TinyModel

VOCAB = 157
BAR = 1e-5

STUDENT = TinyModel("qwen3", False, VOCAB)
# Another width than the student's, and two KV heads, fewer than tp 4.
TEACHER = TinyModel("qwen3", False, VOCAB, overrides=(("hidden_size", 80),))

# Name -> (layout, whether the optimizer is distributed).
STUDENTS = {
    "tp2": (Case("tp2", Layout(2, tp=2)), False),
    "tp2-sp": (Case("tp2-sp", Layout(2, tp=2), True), False),
    "pp2": (Case("pp2", Layout(2, pp=2)), False),
    "tp2-pp2": (Case("tp2-pp2", Layout(4, tp=2, pp=2)), False),
    "dp2": (Case("dp2", Layout(2)), False),
    "dp2-distributed": (Case("dp2", Layout(2)), True),
    "tp2-dp2-distributed": (Case("tp2-dp2", Layout(4, tp=2)), True),
    "cp2-distributed": (Case("cp2", Layout(2, cp=2)), True),
    "tp2-cp2-sp": (Case("tp2-cp2-sp", Layout(4, tp=2, cp=2), True), False),
    "cp2-pp2": (Case("cp2-pp2", Layout(4, pp=2, cp=2)), False),
    "cp2-dp2-distributed": (Case("cp2-dp2", Layout(4, cp=2)), True),
}
