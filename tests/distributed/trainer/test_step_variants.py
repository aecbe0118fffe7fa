"""The step with everything else a configuration can ask for: against the same reference."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_vopd.curriculum import EntropyGatedLength
from megatron_vopd.data.stream import PromptStream
from megatron_vopd.errors import UserError
from megatron_vopd.hf.tensors import read_config
from megatron_vopd.megatron.groups import independent_groups
from megatron_vopd.megatron.microbatch import PackingSettings, cp_shard, cp_tokens
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.megatron.teacher import Teacher, score
from megatron_vopd.megatron.weights import export_weights
from megatron_vopd.objectives import group_advantages
from megatron_vopd.trainer.collector import RolloutCollector
from megatron_vopd.trainer.packing import pack
from megatron_vopd.trainer.student_logprobs import (
    mean_entropy,
    sequence_logprobs,
    student_statistics,
)
from megatron_vopd.trainer.trainer import PHASES, Trainer
from megatron_vopd.types import Layout, Prompt, Rollout
from tests.support.harness import spawn
from tests.support.layouts import Case, enter
from tests.support.reference_step import Adam, Reference, reference_step, response_logits
from tests.support.scripted import ScriptedEngine
from tests.support.settings import step_settings
from tests.support.steps import (
    Setup,
    make_rollouts,
    make_trainer,
    objective,
    whole_weights,
    worst_error,
)
from tests.support.tiny_models import TinyModel

VOCAB = 157
TWO_LAYERS = (("num_hidden_layers", 2),)
STUDENT = TinyModel("qwen3", True, VOCAB, overrides=TWO_LAYERS)
FIRST_TEACHER = TinyModel("qwen3", False, VOCAB, overrides=(("hidden_size", 80), *TWO_LAYERS))
# Fewer tokens than the student's vocabulary: only the common ones take part.
SECOND_TEACHER = TinyModel("llama", False, 151, overrides=TWO_LAYERS)
MOE = TinyModel("qwen3_moe", False, VOCAB, overrides=TWO_LAYERS)
SMALL_VOCAB = 151
ADAM = Adam(weight_decay=0.1, clip_grad=0.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": str(STUDENT.save(root, 0)),
        "teachers.a": str(FIRST_TEACHER.save(root, 1)),
        "teachers.b": str(SECOND_TEACHER.save(root, 2)),
        "moe": str(MOE.save(root, 3)),
    }


def _teachers(folders: dict[str, str]) -> dict[str, str]:
    return {key: folders[key] for key in ("teachers.a", "teachers.b")}


def _grouped_rollouts() -> tuple[list[Rollout], list[float]]:
    """Make pairs of responses to a prompt, teachers in turn, and a grade for each.

    The last two were not sampled by an engine; one response is empty.
    """
    made = make_rollouts(8, SMALL_VOCAB, seed=3, teachers=("teachers.a", "teachers.b"))
    rollouts = []
    for i, rollout in enumerate(made):
        prompt = replace(made[i - i % 2].prompt, teacher=("teachers.a", "teachers.b")[i // 2 % 2])
        rollouts.append(replace(rollout, prompt=prompt, sample=i % 2))
    rollouts[6:] = [replace(r, rollout_logprobs=None, policy_version=-1) for r in rollouts[6:]]
    rollouts[5] = replace(rollouts[5], response_ids=(), rollout_logprobs=())
    return rollouts, [0.0, 1.0, 0.5, 0.25, 2.0, 1.0, math.nan, math.nan]


def _task_advantages(rollouts: list[Rollout], grades: list[float]) -> list[float]:
    graded = group_advantages(rollouts[:6], grades[:6])
    return [0.7 * value for value in graded] + [0.0, 0.0]


def _one_step(setups: list[Setup], kind: str, grades: list[float]) -> list[dict[str, Any]]:
    """On a rank: take the same step under several setups of one layout."""
    groups = enter(setups[0].case)
    rollouts, _ = _grouped_rollouts()
    found = []
    for setup in setups:
        student = setup.student(groups)
        trainer = make_trainer(
            student, setup.teachers(student), [rollouts], kind, 80, grades, task_reward_weight=0.7
        )
        metrics = trainer.train_step()
        weights = whole_weights(student)
        found.append({"metrics": metrics, "gradients": trainer.gradients, "weights": weights})
    return found


def test_two_teachers_task_reward_recompute_offload(folders: dict[str, str]) -> None:
    """Weight decay and a tight clip too; offloading changes no bit."""
    rollouts, grades = _grouped_rollouts()
    case = Case("tp2-sp", Layout(2, tp=2), True)
    plain = Setup(case, folders["student"], _teachers(folders), Layout(2), adam=ADAM)
    setups = [plain, replace(plain, recompute="full", offload=True)]
    reference = reference_step(
        folders["student"],
        _teachers(folders),
        rollouts,
        "vopd_full",
        task_advantages=_task_advantages(rollouts, grades),
        adam=ADAM,
    )
    assert reference.grad_norm > ADAM.clip_grad
    for found in spawn(_one_step, 2, setups, "vopd_full", grades):
        for one in found:
            assert abs(one["metrics"]["loss/mean"] - reference.loss) <= 1e-6
            assert worst_error(one["gradients"], reference.gradients) <= 1e-5
            assert worst_error(one["weights"], reference.updated) <= 1e-5
            statistics = {
                "kl/reverse": reference.statistics["reverse"],
                "kl/forward": reference.statistics["forward"],
            }
            for key, expected in statistics.items():
                assert one["metrics"][key] == pytest.approx(
                    expected / reference.num_tokens, rel=1e-5
                )
        for name, weight in found[0]["weights"].items():
            # The teacher's weights went to the host and back; recomputation repeats the forward.
            assert torch.equal(weight, found[1]["weights"][name]), name


def _bf16(setup: Setup, rollouts: list[Rollout]) -> Any:
    groups = enter(setup.case)
    student = setup.student(groups)
    trainer = make_trainer(student, setup.teachers(student), [rollouts], "vopd_full")
    before = whole_weights(student)
    losses = [trainer.train_step()["loss/mean"] for _ in range(3)]
    after = whole_weights(student)
    moved = sum(not torch.equal(before[name], after[name]) for name in before)
    return losses, trainer.gradients, moved, {str(t.dtype) for t in after.values()}


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_follows_fp32(folders: dict[str, str], distributed: bool) -> None:
    """The first gradient within bf16 rounding of the fp32 one; main parameters move bf16 ones."""
    rollouts = make_rollouts(6, VOCAB)
    teachers = {"teacher": folders["teachers.a"]}
    setup = Setup(
        Case("dp2", Layout(2)),
        folders["student"],
        teachers,
        Layout(2, tp=2),
        distributed,
        torch.bfloat16,
        adam=Adam(learning_rate=1e-2),
    )
    reference = reference_step(folders["student"], teachers, rollouts, "vopd_full")
    for losses, _, moved, dtypes in spawn(_bf16, 2, setup, rollouts):
        assert dtypes == {"torch.bfloat16"} and moved > 10
        assert abs(losses[0] - reference.loss) <= 0.05 * max(1, abs(reference.loss))


def _moe_student(setup: Setup, rollouts: list[Rollout], kinds: tuple[str, ...]) -> Any:
    groups = enter(setup.case)
    found = {}
    for kind in kinds:
        student = setup.student(groups)
        trainer = make_trainer(student, setup.teachers(student), [rollouts], kind)
        metrics = trainer.train_step()
        found[kind] = metrics["loss/mean"], trainer.gradients, whole_weights(student)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "distributed", "teacher_layout"),
    [
        (Case("moe-ep2", Layout(2, ep=2)), True, Layout(2, tp=2)),
        (Case("moe-tp2-ep2-sp", Layout(4, tp=2, ep=2), True), False, Layout(4, ep=4)),
        (Case("moe-tp2-pp2-sp", Layout(4, tp=2, pp=2), True), False, Layout(4, ep=2)),
    ],
    ids=str,
)
def test_moe_student_and_moe_teacher(
    case: Case, distributed: bool, teacher_layout: Layout, folders: dict[str, str], tmp_path: Path
) -> None:
    teacher = str(MOE.save(tmp_path, 4))
    rollouts = make_rollouts(5, VOCAB)
    setup = Setup(case, folders["moe"], {"teacher": teacher}, teacher_layout, distributed)
    kinds = ("vopd_full", "mixed")
    references: dict[str, Reference] = {
        kind: reference_step(folders["moe"], {"teacher": teacher}, rollouts, kind) for kind in kinds
    }
    for found in spawn(_moe_student, case.layout.world_size, setup, rollouts, kinds):
        for kind, (loss, gradients, weights) in found.items():
            assert abs(loss - references[kind].loss) <= 1e-6
            assert worst_error(gradients, references[kind].gradients) <= 1e-5
            assert worst_error(weights, references[kind].updated) <= 1e-5


def _scores(setup: Setup, rollouts: list[Rollout], sequences: list[list[int]]) -> Any:
    groups = enter(setup.case)
    student = setup.student(groups)
    statistics = [part.clone() for part in student_statistics(student, rollouts, 48)]
    return (
        statistics,
        sequence_logprobs(student, sequences, 48),
        mean_entropy(student, rollouts, 48),
    )


@pytest.mark.parametrize(
    "case",
    [
        Case("tp2-sp", Layout(2, tp=2), True),
        Case("dp2", Layout(2)),
        Case("cp2", Layout(2, cp=2)),
        Case("cp2-pp2", Layout(4, pp=2, cp=2)),
    ],
    ids=str,
)
def test_the_students_own_logprobs_and_entropies(case: Case, folders: dict[str, str]) -> None:
    """They are as transformers computes them, and the same on every rank."""
    rollouts = make_rollouts(6, VOCAB)
    model = AutoModelForCausalLM.from_pretrained(folders["student"], dtype=torch.float32)
    with torch.no_grad():
        log_probs = [response_logits(model, r).double().log_softmax(-1) for r in rollouts]
    entropies = [-(log_p.exp() * log_p).sum(-1) for log_p in log_probs]
    sequences = [[*r.prompt.ids[-1:], *r.response_ids] for r in rollouts[:3]]
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids in sequences]
    setup = Setup(case, folders["student"])
    results = spawn(_scores, case.layout.world_size, setup, rollouts, sequences)
    for statistics, logprobs, entropy in results:
        for rollout, part, log_p, expected in zip(
            rollouts, statistics, log_probs, entropies, strict=True
        ):
            chosen = log_p[range(len(log_p)), list(rollout.response_ids)]
            torch.testing.assert_close(part[0], chosen, atol=1e-5, rtol=0)
            torch.testing.assert_close(part[1], expected, atol=1e-5, rtol=0)
        for ids, found, log_p in zip(sequences, logprobs, alone, strict=True):
            chosen = log_p[range(len(ids) - 1), ids[1:]]
            torch.testing.assert_close(torch.tensor(found).double(), chosen, atol=1e-5, rtol=0)
        # What the curriculum is gated by.
        error = abs(entropy - float(torch.cat(entropies).mean()))
        print(f"{case}: mean entropy {entropy:.6f} nats, transformers differs by {error:.1e}")
        assert error <= 1e-6
    assert len({entropy for *_, entropy in results}) == 1


def _unknown_teacher(setup: Setup, rollouts: list[Rollout]) -> str:
    student = setup.student(enter(setup.case))
    trainer = make_trainer(student, setup.teachers(student), [rollouts], "vopd_full")
    with pytest.raises(UserError) as caught:
        trainer.train_step()
    with pytest.raises(ValueError, match="objective sampled: expected a teacher, got none"):
        make_trainer(student, {}, [rollouts], "vopd_full")
    return str(caught.value)


def test_a_prompt_for_an_unknown_teacher_is_named(folders: dict[str, str]) -> None:
    rollouts = make_rollouts(2, VOCAB, teachers=("teachers.a", "teachers.c"))
    setup = Setup(Case("alone", Layout(1)), folders["student"], _teachers(folders))
    (message,) = spawn(_unknown_teacher, 1, setup, rollouts)
    assert "'teachers.c'; there are teachers.a, teachers.b; correct the field" in message


def _context_parallel(setup: Setup, rollouts: list[Rollout]) -> list[int]:
    """On a rank: compare the teacher's states over cp with those of the whole rows, in bits."""
    groups = enter(setup.case)
    _, facts = read_config(setup.student_dir)
    teacher_groups = independent_groups(setup.teacher_layout or setup.case.layout)
    teacher = Teacher(setup.teacher_dirs["teacher"], teacher_groups, facts, groups, ModelOptions())
    (rows,) = pack(rollouts, PackingSettings(1, 48, cp=2))
    counts = []
    # The teacher's replicas are one: both ranks have all of its states, to compare with.
    whole = teacher.score(rows)
    for row, full_TD, own_TD in zip(
        rows, whole, score({"teacher": teacher}, [rows], groups), strict=True
    ):
        tokens = cp_tokens(row, groups.coordinates.cp, 2)
        assert torch.equal(own_TD, full_TD[tokens])
        assert len(own_TD) == cp_shard(row, groups.coordinates.cp, 2).num_tokens
        counts.append(len(own_TD))
    return counts


def test_teacher_states_for_context_parallel_ranks(folders: dict[str, str]) -> None:
    rollouts = make_rollouts(6, VOCAB)
    teachers = {"teacher": folders["teachers.a"]}
    case = Case("cp2", Layout(2, cp=2))
    setup = Setup(case, folders["student"], teachers, Layout(2, tp=2))
    first, second = spawn(_context_parallel, 2, setup, rollouts)
    assert len(first) == len(second) > 1
    assert sum(first) + sum(second) == sum(len(r.response_ids) for r in rollouts)


class _Records:
    """The records of a run, kept in memory in the run log's place."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, dict[str, float]]] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def record(self, step: int, values: dict[str, float]) -> None:
        self.recorded.append((step, values))


LADDER = (4, 8, 16)


def _whole_step(setup: Setup) -> Any:
    """On a rank: stream, engine, grader and curriculum as in a run, only the engine scripted."""
    groups = enter(setup.case)
    student = setup.student(groups)
    settings = step_settings(
        objective=objective("vopd_full"),
        num_prompts=4,
        samples_per_prompt=2,
        max_tokens_per_microbatch=64,
        task_reward_weight=0.5,
    )
    engine = ScriptedEngine(VOCAB)
    own = engine if groups.is_leader else None
    prompts = [Prompt(f"p{i}", (i, i + 1, 2 * i)) for i in range(20)]

    def push(policy_version: int) -> None:
        engine.update_weights(export_weights(student.bare, student.facts, groups), policy_version)

    collector = RolloutCollector(
        groups,
        own,
        PromptStream(prompts[5:], seed=0),
        settings,
        VOCAB,
        "cpu",
        grader=lambda rollout: float(sum(rollout.response_ids) % 5),
        push=push,
    )
    curriculum = EntropyGatedLength(LADDER, min_entropy_fraction=0.01, interval=1)
    sink = _Records()
    trainer = Trainer(
        student, setup.teachers(student), collector, curriculum, settings, sink, prompts[:5]
    )
    collector.push(0)
    trainer.fit(3)
    entropy = curriculum.entropy
    return sink.recorded, engine.policy_version, entropy, sink.said


@pytest.mark.parametrize("case", [Case("dp2", Layout(2)), Case("cp2", Layout(2, cp=2))], ids=str)
def test_whole_steps_with_a_curriculum_and_grades(case: Case, folders: dict[str, str]) -> None:
    """Responses get longer rung by rung; versions, lengths and metrics are as they should be."""
    teachers = {"teacher": folders["teachers.a"]}
    setup = Setup(case, folders["student"], teachers, Layout(2, tp=2))
    results = spawn(_whole_step, 2, setup)
    (first, version, entropy, said), (second, other_version, other_entropy, _) = results
    for (step, values), (_, others), length in zip(first, second, LADDER, strict=True):
        assert step == first.index((step, values)) + 1
        assert values["curriculum/max_response_tokens"] == values["rollout/length_max"] == length
        assert values["loss/num_tokens"] == 8 * length
        assert values["optim/skipped"] == 0
        # The scripted engine samples from something else than the student.
        assert values["mismatch/kl"] > 0.1
        differing = {key for key in values if values[key] != others[key]}
        assert all(key.startswith(("time/", "perf/")) for key in differing), differing
        phases = sum(values[f"time/{name}_seconds"] for name in (*PHASES, "other"))
        assert phases == pytest.approx(values["time/total_seconds"])
    assert version == other_version == 3
    assert entropy == other_entropy and entropy > 1
    # Checked before the second and the third step.
    assert [text.partition(": ")[0] for text in said] == [
        "curriculum after step 1",
        "curriculum after step 2",
    ]
    assert "responses grow to 8 tokens (rung 2 of 3)" in said[0]
    assert f"entropy {entropy:.4f} >= " in said[1]


GOLDEN = Path(__file__).with_name("golden_three_steps.txt")


def _three_steps(setup: Setup, steps: list[list[Rollout]]) -> list[dict[str, float]]:
    student = setup.student(enter(setup.case))
    teachers = setup.teachers(student)
    trainer = make_trainer(student, teachers, steps, "vopd_full")
    metrics = [trainer.train_step(), trainer.train_step()]
    state = json.loads(json.dumps(trainer.state_dict()))
    # The weights stay; everything else is a new trainer's, which continues where the first stopped.
    trainer = make_trainer(student, teachers, steps, "vopd_full")
    trainer.load_state_dict(state)
    stopped_at = []
    trainer.fit(3, lambda step: stopped_at.append(step) or True)
    assert (stopped_at, trainer.policy_version) == ([3], 3)
    return [*metrics, trainer.last_metrics]


def test_golden_run(folders: dict[str, str]) -> None:
    """Three steps of fixed data: loss, KL and gradient norm to six digits, in the text file."""
    steps = [make_rollouts(4, VOCAB, seed) for seed in range(3)]
    teachers = {"teacher": folders["teachers.a"]}
    adam = Adam(learning_rate=1e-3)
    setup = Setup(Case("alone", Layout(1)), folders["student"], teachers, adam=adam)
    (metrics,) = spawn(_three_steps, 1, setup, steps)
    keys = ("loss/mean", "kl/reverse", "optim/grad_norm")
    found = [" ".join(f"{m[key]:.6g}" for key in keys) for m in metrics]
    print("\n" + "\n".join(found))
    expected = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    for line, golden in zip(found, expected, strict=True):
        pairs = zip(map(float, line.split()), map(float, golden.split()), strict=True)
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs), (line, golden)
