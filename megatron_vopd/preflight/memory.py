"""An estimate of each rank's memory before anything is started: a sum of parts from sizes.

What a rank holds all the time (weights, gradients, optimizer, teacher) is counted exactly, from the
same table that loads the weights (`hf/mapping.py`). Beside it, a step goes through phases, each of
which needs something more; the peak is what is held plus the most demanding phase::

    rollout     the share of the GPU of a local engine, which sleeps in all other phases but `push`
                and then still holds something (`engine_memory`)
    scoring     the teacher's activations, the hidden states that it hands over
    loss        activations of the microbatches in flight, both models' logits of a chunk
    backward    the same activations, the gradients of head and hidden states
    update      the optimizer's temporaries
    push        two layer groups of the student's weights, what they are packed into, the engine

Rows are assumed to be full and to hold response tokens alone. Not counted: what the trainer holds
beside tensors (Python and libraries, CUDA context, NCCL's buffers; a dry run measures it),
fragmentation, and experts that get more than their share of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from megatron_vopd.config.method import RolloutSection
from megatron_vopd.config.schema import Config, StudentSection, TeacherSection
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.hf.facts import ModelFacts, frozen_sequence_parallel, kv_repeat
from megatron_vopd.hf.mapping import shard_parameters
from megatron_vopd.preflight.activations import Kind, LayerMemory, Recompute, layer_memory
from megatron_vopd.preflight.engine_memory import Engine, engine_phases
from megatron_vopd.types import LOSS_CHUNK, Coordinates, Layout

GRADIENT_SIZE = MOMENT_SIZE = MASTER_SIZE = LOGIT_SIZE = 4


@dataclass(frozen=True)
class Machine:
    """The hardware of the ranks.

    Attributes:
        kind: cpu, or on a GPU the layer specification: local or te.
        memory: memory of one GPU in bytes, of which a local engine takes its share.
    """

    kind: Kind
    memory: float = 0.0


@dataclass(frozen=True)
class Workload:
    """The tokens of one step on one data-parallel replica of the student.

    Attributes:
        row: tokens of the longest packed row.
        response: response tokens of that row.
        num_rows: number of rows (microbatches).
        step_response: response tokens of all rows.
    """

    row: int
    response: int
    num_rows: int
    step_response: int


def workload(config: Config, num_replicas: int) -> Workload:
    """Return the largest workload that `config` allows: every prompt and response at full length.

    Args:
        num_replicas: data-parallel size of the student.
    """
    rollout = config.rollout
    number = math.ceil(rollout.num_prompts * rollout.samples_per_prompt / num_replicas)
    longest = config.max_response_tokens
    total = number * (config.data.max_prompt_tokens + longest - 1)
    row = min(config.train.max_tokens_per_microbatch, total)
    return Workload(row, min(row, number * longest), math.ceil(total / row), number * longest)


@dataclass(frozen=True)
class RankMemory:
    """The estimate of one rank, in bytes.

    Attributes:
        rank: global rank.
        held: part -> bytes held all the time.
        phases: phase -> part -> bytes needed during it, beside what is held.
        host: host memory that holds weights and states of offloaded teachers, on a GPU machine.
        place: coordinates in the student's layout.
    """

    rank: int
    held: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    host: float = 0.0
    place: Coordinates = field(default=Coordinates(0, 0, 0, 0, 0))

    def phase_bytes(self, phase: str) -> float:
        """Return the bytes needed during `phase`, beside what is held."""
        return sum(self.phases[phase].values())

    @property
    def worst_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak(self) -> float:
        """The most bytes that the rank has at any time."""
        return sum(self.held.values()) + self.phase_bytes(self.worst_phase)


@dataclass(frozen=True)
class _Model:
    """One model in its layout."""

    facts: ModelFacts
    layout: Layout
    item_size: int
    layer: LayerMemory

    def numbers(self, stage: int, trained: bool) -> tuple[int, int, int]:
        """Count the parameters of a rank of the stage: (all but experts, experts, largest one)."""
        repeat = kv_repeat(self.facts, self.layout.tp, trained)
        return _numbers(self.facts, self.layout, stage, repeat)

    @property
    def layers_per_stage(self) -> int:
        return self.facts.num_layers // self.layout.pp


@dataclass(frozen=True)
class _Student(_Model):
    """The model in training, and the settings that decide what its training keeps."""

    sequence_parallel: bool
    recompute: Recompute
    distributed: bool


@cache
def _numbers(facts: ModelFacts, layout: Layout, stage: int, repeat: int) -> tuple[int, int, int]:
    place = Coordinates(tp=0, cp=0, dp=0, pp=stage, ep=0)
    plans = shard_parameters(facts, layout, place, "local", repeat)
    sizes = {name: math.prod(plan.shape) for name, plan in plans.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return sum(sizes.values()) - experts, experts, max(sizes.values())


def estimate(
    config: Config,
    facts: Mapping[str, ModelFacts],
    layouts: Mapping[str, Layout],
    machine: Machine,
) -> list[RankMemory]:
    """Estimate the memory of every rank, in rank order.

    Args:
        facts: shapes of `student` and of each scoring teacher, by key.
        layouts: layouts of the same models, from `config.world.layouts`.
    """
    model = (facts["student"], layouts["student"], machine)
    cut, split = config.parallel.sequence_parallel, config.optimizer.distributed
    student = _student(config.student, *model, cut, split)
    teachers = {
        key: (_teacher(section.dtype, facts[key], layouts[key], machine), section)
        for key, section in config.named_teachers.items()
        if key in layouts
    }
    work = workload(config, student.layout.dp)
    engine = _engine(config.rollout, config.has_engines, machine)
    ranks = []
    known: dict[tuple, RankMemory] = {}
    for rank in range(student.layout.world_size):
        place = student.layout.coordinates(rank)
        stages = tuple(model.layout.coordinates(rank).pp for model, _ in teachers.values())
        key = (place.pp, place.is_leader, stages)
        if key not in known:
            known[key] = _rank_memory(student, teachers, work, machine, engine, rank)
        ranks.append(replace(known[key], rank=rank, place=place))
    return ranks


def _engine(rollout: RolloutSection, has_engines: bool, machine: Machine) -> Engine:
    """Return the engine of a leader; on a CPU engines are processes with memory of their own."""
    if machine.kind == "cpu" or not has_engines:
        return Engine()
    share = rollout.memory_fraction * machine.memory if rollout.engine == "local" else 0.0
    by_nccl = rollout.engine == "server"
    return Engine(share, by_nccl, CONFIG_DTYPES[rollout.dtype].num_bytes)


def _student(
    section: StudentSection,
    facts: ModelFacts,
    layout: Layout,
    machine: Machine,
    parallel: bool,
    distributed: bool,
) -> _Student:
    size = CONFIG_DTYPES[section.dtype].num_bytes
    layer = layer_memory(facts, layout, machine.kind, size, True, parallel and layout.tp > 1)
    settings = (parallel, section.recompute, distributed)
    return _Student(facts, layout, size, layer, *settings)


def _teacher(dtype: str, facts: ModelFacts, layout: Layout, machine: Machine) -> _Model:
    size, cut = CONFIG_DTYPES[dtype].num_bytes, frozen_sequence_parallel(facts, layout)
    layer = layer_memory(facts, layout, machine.kind, size, False, cut)
    return _Model(facts, layout, size, layer)


def _rank_memory(
    student: _Student,
    teachers: Mapping[str, tuple[_Model, TeacherSection]],
    work: Workload,
    machine: Machine,
    engine: Engine,
    rank: int,
) -> RankMemory:
    place = student.layout.coordinates(rank)
    held = _student_held(student, place.pp)
    scoring: dict[str, float] = {"activations": 0.0, "hidden states": 0.0}
    host = waiting = 0.0
    is_last = place.pp == student.layout.pp - 1
    for teacher, section in teachers.values():
        weights = _teacher_weights(teacher, rank)
        if section.offload:
            host += weights if machine.kind != "cpu" else 0
            scoring["weights"] = max(scoring.get("weights", 0), weights)
        else:
            held["teacher weights"] = held.get("teacher weights", 0) + weights
        if is_last:
            head = _head_rows(student, teacher.facts.vocab_size) * teacher.facts.hidden_size
            held["teacher head"] = held.get("teacher head", 0) + head * teacher.item_size
        activations, sent, received = _scoring(teacher, student, work, rank, is_last)
        scoring["activations"] = max(scoring["activations"], activations)
        scoring["hidden states"] = max(scoring["hidden states"], sent + received)
        waits = received if not section.offload else received * work.response / work.step_response
        waiting = max(waiting, waits)
        host += received if section.offload and machine.kind != "cpu" else 0
    phases = {"scoring": scoring}
    phases |= _training(student, place.pp, work, machine, waiting)
    own = engine if place.is_leader else Engine()
    held |= own.kept(student.facts)
    phases = {name: parts | own.asleep for name, parts in phases.items()}
    phases |= engine_phases(student.facts, student.item_size, own)
    return RankMemory(rank, held, phases, host)


def _student_held(student: _Student, stage: int) -> dict[str, float]:
    """Return part -> bytes that the student holds all the time on a rank of `stage`."""
    dense, experts, _ = student.numbers(stage, trained=True)
    layout = student.layout
    split = layout.dp * layout.cp if student.distributed else 1
    expert_split = layout.expert_dp if student.distributed else 1
    per_value = 2 * MOMENT_SIZE + (MASTER_SIZE if student.item_size < MASTER_SIZE else 0)
    return {
        "student weights": (dense + experts) * student.item_size,
        "gradients": (dense + experts) * GRADIENT_SIZE,
        "optimizer": per_value * (dense / split + experts / expert_split),
    }


def _teacher_weights(teacher: _Model, rank: int) -> float:
    """Return the bytes of the teacher's weights on `rank`, without its head.

    The head is on the ranks of the student's last stage.
    """
    stage = teacher.layout.coordinates(rank).pp
    dense, experts, _ = teacher.numbers(stage, trained=False)
    is_last = stage == teacher.layout.pp - 1
    if is_last and not (teacher.facts.tied and teacher.layout.pp == 1):
        tp = teacher.layout.tp
        dense -= teacher.facts.padded_vocab_size(tp) // tp * teacher.facts.hidden_size
    return (dense + experts) * teacher.item_size


def _head_rows(student: _Model, common_vocab_size: int) -> int:
    """Return the vocabulary columns of the student's first tp rank, which has the most."""
    tp = student.layout.tp
    return min(student.facts.padded_vocab_size(tp) // tp, common_vocab_size)


def _scoring(
    teacher: _Model, student: _Model, work: Workload, rank: int, is_last: bool
) -> tuple[float, float, float]:
    """Return bytes of (activations, hidden states that the rank computes, those it receives).

    Args:
        is_last: the rank is on the student's last stage, which receives hidden states.
    """
    width = teacher.facts.hidden_size * teacher.item_size
    has_states = teacher.layout.coordinates(rank).pp == teacher.layout.pp - 1
    share = student.layout.dp / teacher.layout.dp
    sent = work.step_response * share * width if has_states else 0.0
    received = work.step_response / student.layout.cp * width if is_last else 0.0
    return work.row * teacher.layer.forward, sent, received


def _training(
    student: _Student, stage: int, work: Workload, machine: Machine, waiting: float
) -> dict[str, dict[str, float]]:
    """Return the phases backward, update and, on the last stage, loss.

    Args:
        waiting: bytes of hidden states that wait for the loss.
    """
    in_flight = _in_flight(student, stage, work, machine)
    row, layer = work.row / student.layout.cp, student.layer
    again = layer.kept - layer.kept_full if student.recompute == "full" else 0.0
    fused = machine.kind == "te"
    weight = 0.0 if fused else _largest_layer_weight(student.facts, student.layout)
    passing = row * (again + layer.backward) + weight * student.item_size
    backward = {"activations": in_flight + passing, "hidden states": waiting}
    update = {"temporaries": _update(student, stage, machine)}
    phases = {"backward": backward, "update": update}
    if stage == student.layout.pp - 1:
        loss, stands_in = _loss(student, work, machine)
        output = row * student.facts.hidden_size * student.item_size
        phases["loss"] = {"activations": in_flight + output, "hidden states": waiting} | loss
        gradients = "gradients of head and rows"
        backward[gradients] = loss[gradients] + stands_in
    return phases


def _in_flight(student: _Student, stage: int, work: Workload, machine: Machine) -> float:
    """Return the bytes of activations of all microbatches between forward and backward pass."""
    layout, e = student.layout, student.item_size
    row = work.row / layout.cp
    # The stage's output, or the input of the final norm and what that keeps.
    is_last = stage == layout.pp - 1
    width = student.facts.hidden_size / (layout.tp if student.sequence_parallel else 1)
    at_end = row * width * (2 * 4 if is_last and machine.kind == "cpu" else e)
    layers = row * student.layers_per_stage * student.layer.kept_by(student.recompute)
    return (layers + at_end) * min(work.num_rows, layout.pp - stage)


def _loss(student: _Model, work: Workload, machine: Machine) -> tuple[dict[str, float], float]:
    """Return the operator's parts, and the bytes of autograd's stand-in for the head's gradient.

    The gradient itself goes into `main_grad`; autograd still needs a tensor (`ops/linear.py`).
    """
    layout, facts, e = student.layout, student.facts, student.item_size
    response = work.response / layout.cp
    rows = _head_rows(student, facts.vocab_size)
    head, hidden = rows * facts.hidden_size, response * facts.hidden_size
    summed = 4 if layout.tp > 1 else e
    parts = {
        "logits of a chunk": 2 * min(LOSS_CHUNK, response) * rows * LOGIT_SIZE,
        "gradients of head and rows": head * GRADIENT_SIZE + hidden * (summed + e),
    }
    # On the CPU only memory that is written to counts.
    is_written = facts.tied and layout.pp == 1
    return parts, head * e if machine.kind != "cpu" or is_written else 0.0


def _update(student: _Student, stage: int, machine: Machine) -> float:
    """Return the bytes of the optimizer's temporaries.

    torch's Adam updates one parameter after another on the CPU, all at once on a GPU; the fused
    Adam of TransformerEngine needs none.
    """
    dense, experts, largest = student.numbers(stage, trained=True)
    split = student.layout.dp * student.layout.cp if student.distributed else 1
    if machine.kind == "te":
        return 0.0
    if machine.kind == "local":
        return (dense + experts) / split * MOMENT_SIZE
    # gloo gathers the updated parameters into a second copy of them all.
    gathered = (dense + experts) * student.item_size if split > 1 else 0
    return max(2 * largest / split * MOMENT_SIZE, gathered)


def _largest_layer_weight(facts: ModelFacts, layout: Layout) -> float:
    """Return the values of a layer's largest weight on one rank: gate and up together."""
    if facts.is_moe:
        return 2 * facts.hidden_size * facts.expert_ffn_size
    return 2 * facts.hidden_size * facts.ffn_size / layout.tp
