"""One policy version behind: the mismatch metrics see it, importance weights make up for it.

Responses of a single token, so that the token's probability is all that can be off-policy; the
exact reverse gradient on the same prompts is what the sampled one estimates.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vopd.types import Layout, Prompt, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.reference_step import Adam, load, reference_step
from tests.support.steps import Setup, make_rollouts, make_trainer, objective
from tests.support.tiny_models import TinyModel

VOCAB = 61
STUDENT = TinyModel("qwen3", False, VOCAB, overrides=(("num_hidden_layers", 2),))
NUM_PROMPTS, DRAWS = 6, 1200


def _sampled(model: torch.nn.Module, version: int) -> list[Rollout]:
    """Draw single-token responses from the model, with its own log-probs."""
    generator = torch.Generator().manual_seed(5)
    rollouts = []
    for i in range(NUM_PROMPTS):
        prompt = Prompt(f"p{i}", (3 + i, 40 - i, 2 * i))
        with torch.no_grad():
            log_p = model(torch.tensor([prompt.ids])).logits[0, -1].log_softmax(-1)
        drawn = torch.multinomial(log_p.exp(), DRAWS, replacement=True, generator=generator)
        rollouts += [
            Rollout(prompt, n, (int(a),), (float(log_p[a]),), "length", version)
            for n, a in enumerate(drawn)
        ]
    return rollouts


def _gradients(setup: Setup, cases: list[tuple[list[Rollout], str, str]]) -> list:
    groups = enter(setup.case)
    found = []
    for rollouts, kind, importance in cases:
        student = setup.student(groups)
        wanted = objective(kind, chunk=4096)
        wanted = replace(wanted, settings=replace(wanted.settings, importance=importance))
        trainer = make_trainer(
            student, setup.teachers(student), [rollouts], kind, 4096, objective=wanted
        )
        metrics = trainer.train_step()
        flat = torch.cat([g.flatten() for _, g in sorted(trainer.gradients.items())])
        found.append((flat.double(), metrics))
    return found


@pytest.mark.slow
def test_weights_bring_a_stale_gradient_closer(tmp_path: Path) -> None:
    old_dir = STUDENT.save(tmp_path / "old", 0)
    teacher_dir = str(STUDENT.save(tmp_path / "teacher", 1))
    teachers = {"teacher": teacher_dir}
    # One large update lies between the weights that sampled and those that are trained.
    update = reference_step(
        old_dir, teachers, make_rollouts(6, VOCAB), "reverse", adam=Adam(learning_rate=1e-2)
    )
    old, new = load(old_dir), load(old_dir)
    new.load_state_dict(update.updated)
    new_dir = str(tmp_path / "new")
    new.save_pretrained(new_dir)
    stale, fresh = _sampled(old, 0), _sampled(new, 1)
    cases = [
        (fresh, "reverse", "none"),
        (fresh, "vopd_full", "none"),
        (stale, "vopd_full", "none"),
        (stale, "vopd_full", "truncate"),
    ]
    setup = Setup(Case("alone", Layout(1)), new_dir, teachers)
    ((exact, _), *sampled), *_ = spawn(_gradients, 1, setup, cases)
    distance = [float((g - exact).norm() / exact.norm()) for g, _ in sampled]
    cosine = [float(torch.cosine_similarity(g, exact, dim=0)) for g, _ in sampled]
    kl = [metrics["mismatch/kl"] for _, metrics in sampled]
    ratio = [metrics["mismatch/ratio_mean"] for _, metrics in sampled]
    names = ("on-policy", "stale, unweighted", "stale, weighted")
    for name, *values in zip(names, distance, cosine, kl, ratio, strict=True):
        print("\n{}: distance {:.3f} cosine {:.3f} kl {:.2e} ratio {:.3f}".format(name, *values))
    on_policy, unweighted, weighted = distance
    assert weighted < 0.7 * unweighted
    assert on_policy <= 1.2 * weighted
    assert kl[0] < 1e-9 and kl[1] == kl[2] > 1e-2
    # mass that the old weights could sample: all of it
    assert all(math.isclose(value, 1.0, abs_tol=0.05) for value in ratio)
