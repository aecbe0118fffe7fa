"""Frozen teachers, each in a parallel layout of its own over the student's ranks.

A teacher scores in a forward-only pass of its own, never inside the student's schedule: two
pipelines interleaved on the same ranks can wait for one another. What it hands over is the final
hidden state of every response token, [T, D], which is smaller than logits by V / D. The student's
last stage holds the teacher's head, cut on the *student's* vocabulary boundaries, so the loss
multiplies both heads on the same columns of the same rank.

With experts and tp > 1 a teacher is sequence parallel: otherwise each tp rank would send all tokens
to the experts, who would compute every one of them tp times.

What crosses the wire: from tp rank 0 of the teacher's last stage to tp rank 0 of the student's last
stage, [T, D] per microbatch, point to point, all messages posted at once and in the same order on
every rank; what a rank owes itself is not sent. Then one broadcast per microbatch over the
student's tp.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vopd.collectives import broadcast_from_position
from megatron_vopd.errors import UserError
from megatron_vopd.hf.facts import ModelFacts, frozen_sequence_parallel, kv_repeat
from megatron_vopd.hf.tensors import SafetensorsFolder, read_config
from megatron_vopd.megatron.forward import forward_hidden
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.host_copy import host_copies
from megatron_vopd.megatron.microbatch import (
    Microbatch,
    Row,
    cp_tokens,
    deal,
    empty_row,
    filled_row,
)
from megatron_vopd.megatron.model import ModelOptions, build_model
from megatron_vopd.megatron.weights import load_weights
from megatron_vopd.vocab_parallel import VocabShard

Replicas = Sequence[Sequence[Row]]
Place = tuple[int, int]  # student replica, microbatch of that replica
Keep = Callable[[Place, Tensor], None]


def student_shard(facts: ModelFacts, groups: Groups, vocab_size: int | None = None) -> VocabShard:
    """Return this tp rank's columns of the student's head that are below `vocab_size`.

    Args:
        vocab_size: of the vocabulary that both models share; None: the student's.
    """
    rows = facts.padded_vocab_size(groups.layout.tp) // groups.layout.tp
    limit = min(facts.vocab_size, vocab_size or facts.vocab_size)
    start, stop = (min((groups.coordinates.tp + i) * rows, limit) for i in (0, 1))
    return VocabShard(start, stop, groups.tp)


def load_head(
    model_dir: str | Path, facts: ModelFacts, shard: VocabShard, options: ModelOptions
) -> Tensor:
    """Read rows [start, stop) of a model's vocabulary head, [V_shard, D], from its folder."""
    name = "model.embed_tokens.weight" if facts.tied else "lm_head.weight"
    with SafetensorsFolder(model_dir) as folder:
        rows = folder.slices(name)[shard.start : shard.stop]
    return rows.to(device=options.device, dtype=options.dtype).contiguous()


class Teacher:
    """One frozen model, spread over the world by its own layout.

    Attributes:
        facts: its shape.
        groups: its layout and process groups.
        shard: columns of the vocabulary shared with the student, on the student's boundaries.
        head_VD: those rows of its head; None where the student has no last stage.
    """

    def __init__(
        self,
        model_dir: str | Path,
        groups: Groups,
        student_facts: ModelFacts,
        student_groups: Groups,
        options: ModelOptions,
        offload: bool = False,
    ) -> None:
        """Build and load it. Every rank of the world calls this, in the same order of teachers.

        Args:
            options: dtype, device and layer spec; taken as frozen.
            offload: keep its weights in host memory between scorings.

        Raises:
            ModelError, LayoutError: the folder is no supported model, or cannot be cut this way.
        """
        config, self.facts = read_config(model_dir)
        cut = frozen_sequence_parallel(self.facts, groups.layout)
        known = (options.dtype, options.device, options.layer_spec)
        options = ModelOptions(*known, sequence_parallel=cut, trained=False)
        self.groups, self._device = groups, options.device
        self._alignment = groups.layout.tp if cut else 1
        self._model = build_model(config, self.facts, groups, options)
        repeat = kv_repeat(self.facts, groups.layout.tp, trained=False)
        load_weights(self._model, self.facts, groups, model_dir, options.layer_spec, repeat)
        if groups.is_first_stage:
            self._model.embedding.register_forward_hook(_plain_strides)
        if groups.is_last_stage:
            # The student's side has the head; a tied one of a single stage stays as embedding.
            self._model.output_layer.weight = None
        self.shard = student_shard(student_facts, student_groups, self.facts.vocab_size)
        self.head_VD = None
        if student_groups.is_last_stage:
            self.head_VD = load_head(model_dir, self.facts, self.shard, options)
        self._offload = offload
        self._host: dict[str, Tensor] = {}
        self._to_host()

    def score(self, rows: Sequence[Microbatch]) -> list[Tensor]:
        """Return hidden states [T, D] of the rows' responses on the last stage; elsewhere [].

        Every rank of a replica calls it with the same rows, every replica with equally many.
        """
        self._to_device()
        rows = [filled_row(row, self._alignment) for row in rows]
        hidden = forward_hidden(self._model, self.groups, rows, self._device)
        self._to_host()
        return hidden

    def received(self, num_tokens: int) -> Tensor:
        """Allocate memory for hidden states [num_tokens, D] of another rank."""
        dtype = next(self._model.parameters()).dtype
        return torch.empty(num_tokens, self.facts.hidden_size, dtype=dtype, device=self._device)

    def held(self, hidden_TD: Tensor) -> Tensor:
        """Move hidden states to where they wait for the loss: to the host when offloaded."""
        return hidden_TD.cpu() if self._offload else hidden_TD

    def _to_host(self) -> None:
        """Drop the device's copy; the weights never change, so they are copied to the host once."""
        if not self._offload:
            return
        parameters = dict(self._model.named_parameters())
        if not self._host:
            weights = {name: parameter.data for name, parameter in parameters.items()}
            self._host = weights if self._device == "cpu" else host_copies(weights)
        for name, parameter in parameters.items():
            parameter.data = self._host[name]

    def _to_device(self) -> None:
        for name, parameter in self._model.named_parameters():
            if name in self._host:
                parameter.data = self._host[name].to(self._device, non_blocking=True)


def _plain_strides(_module: Any, _inputs: Any, hidden: Tensor) -> Tensor:
    """Give embeddings [S, 1, D] the strides of a fresh tensor; values and memory stay.

    They come transposed from [1, S, D], with a stride of S * D for the middle dimension, which
    `contiguous` lets pass. With such strides and a weight that needs no gradient, torch multiplies
    position by position instead of all at once: slow, and rounded differently from the student.
    """
    return hidden.flatten(0, 1).unsqueeze(1) if hidden.shape[1] == 1 else hidden


def teacher_plan(num_tokens: Sequence[int], num_replicas: int) -> list[list[int | None]]:
    """Deal rows to teacher replicas, equally many to each: indices, None for a row of filling.

    Args:
        num_tokens: of each row, filling included.
    """
    hands: list[list[int | None]] = [list(hand) for hand in deal(num_tokens, num_replicas)]
    longest = max(map(len, hands))
    return [hand + [None] * (longest - len(hand)) for hand in hands]


def score(
    teachers: Mapping[str, Teacher],
    replicas: Replicas,
    student: Groups,
    skip: Collection[Place] = (),
    keep: Keep | None = None,
) -> list[Tensor]:
    """Score this rank's microbatches: teacher hidden states in their order, empty without response.

    A collective of the whole world, teacher by teacher in the order of their keys.

    Args:
        replicas: the whole plan, the same on every rank; whole rows, not yet cut over cp. Built are
            those that this rank scores or trains.
        student: its layout and groups.
        skip: rows that are not scored, the same on every rank.
        keep: called with each scored row's place and states [T, D], whole, on one rank: the first
            of the teacher's last stage that scored it.

    Returns:
        On the student's last stage one tensor per microbatch of this rank's replica (its part of
        the tokens under cp), the same on every tp rank; elsewhere [].

    Raises:
        UserError: a prompt names a teacher that does not exist.
    """
    found: dict[int, Tensor] = {}
    for key, places in sorted(_places(teachers, replicas, skip).items()):
        found |= _score_places(teachers[key], places, replicas, student, keep)
    if not student.is_last_stage:
        return []
    own = replicas[student.coordinates.dp]
    return [found.get(m, torch.zeros(0, 0)) for m in range(len(own))]


def _places(
    teachers: Mapping[str, Teacher], replicas: Replicas, skip: Collection[Place]
) -> dict[str, list[Place]]:
    """Sort rows with responses by teacher, in the order in which all ranks treat them."""
    places: dict[str, list[Place]] = {}
    if not teachers:  # an objective without one
        return places
    for replica, rows in enumerate(replicas):
        for position, row in enumerate(rows):
            if row.num_tokens and row.teacher not in teachers:
                raise UserError(
                    f"data: a prompt asks for the teacher {row.teacher!r}; there are "
                    f"{', '.join(sorted(teachers))}; correct the field data.teacher_field names"
                )
            if row.num_tokens and (replica, position) not in skip:
                places.setdefault(row.teacher, []).append((replica, position))
    return places


def _score_places(
    teacher: Teacher, places: list[Place], replicas: Replicas, student: Groups, keep: Keep | None
) -> dict[int, Tensor]:
    """Score with one teacher: hidden states of this rank's microbatches by their position."""
    rows = [replicas[replica][position] for replica, position in places]
    plan = teacher_plan([row.size for row in rows], teacher.groups.layout.dp)
    own = plan[teacher.groups.coordinates.dp]
    hidden = teacher.score([empty_row(rows[0]) if i is None else rows[i].microbatch for i in own])
    scored = {i: states for i, states in zip(own, hidden, strict=False) if i is not None}
    if keep is not None and teacher.groups.coordinates.tp == 0:
        for i, states in scored.items():
            keep(places[i], states)
    replica_of = {i: replica for replica, hand in enumerate(plan) for i in hand if i is not None}
    arrived = _exchange(teacher, places, rows, scored, replica_of, student)
    if not student.is_last_stage:
        return {}
    result = {}
    for i, (replica, position) in enumerate(places):
        if replica == student.coordinates.dp:
            wanted = len(cp_tokens(rows[i].microbatch, student.coordinates.cp, student.layout.cp))
            states = arrived.get(i)
            states = teacher.received(wanted) if states is None else states
            result[position] = teacher.held(broadcast_from_position(states, 0, student.tp))
    return result


def _exchange(
    teacher: Teacher,
    places: list[Place],
    rows: list[Row],
    scored: Mapping[int, Tensor],
    replica_of: Mapping[int, int],
    student: Groups,
) -> dict[int, Tensor]:
    """Send what this rank scored and owes, receive what it is owed: row -> hidden states."""
    me, cp = dist.get_rank(), student.layout.cp
    last_stage, operations, arrived = teacher.groups.layout.pp - 1, [], {}
    for i, (replica, _) in enumerate(places):
        source = teacher.groups.layout.rank_at(0, 0, replica_of[i], last_stage)
        for cp_rank in range(cp):
            target = student.layout.rank_at(0, cp_rank, replica, student.layout.pp - 1)
            if me not in (source, target):
                continue
            tokens = cp_tokens(rows[i].microbatch, cp_rank, cp)
            if not len(tokens):
                continue
            if me == source:
                part = scored[i][tokens.to(scored[i].device)].contiguous()
                if me == target:
                    arrived[i] = part
                else:
                    operations.append(dist.P2POp(dist.isend, part, target))
            else:
                arrived[i] = teacher.received(len(tokens))
                operations.append(dist.P2POp(dist.irecv, arrived[i], source))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return arrived
