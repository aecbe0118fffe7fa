"""A training run saved and resumed: weights, Adam's state, random states, and all else as JSON.

`save` writes `checkpoints/step_N` beside its place and publishes it whole (`checkpoint.staging`);
`load` fills a run that was built from the same configuration, in any layout (`run.identity` defines
"the same"). Both are collectives of the whole world. A resumed CPU run is bitwise equal to an
uninterrupted one; random states belong to a layout; in another one they start from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vopd.checkpoint.optimizer import (
    fill_optimizer,
    num_updates,
    optimizer_shards,
    optimizer_values,
    set_num_updates,
)
from megatron_vopd.checkpoint.random_states import random_bytes, restore_random_bytes
from megatron_vopd.checkpoint.sharded import (
    HF_DIR,
    CheckpointReader,
    ShardFile,
    Written,
    complete,
    entries,
    is_saved_here,
    rank_row,
    read_state,
    shards,
)
from megatron_vopd.checkpoint.shares import Span, saved_spans, slice_shards
from megatron_vopd.checkpoint.staging import begin_staging, publish_staging
from megatron_vopd.collectives import all_ranks, from_all_ranks, rank_0
from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.atomic_folder import CheckHashes, Staging, read_manifest
from megatron_vopd.hf.tensors import dtype_name
from megatron_vopd.hf.writer import text_files
from megatron_vopd.megatron.student import Student
from megatron_vopd.run.folder import (
    KIND,
    checkpoints_dir,
    make_room,
    remove_old,
    step_dir,
    write_latest,
)
from megatron_vopd.run.identity import require_same
from megatron_vopd.run.verify import with_all_ranks
from megatron_vopd.trainer.trainer import Trainer

_RANDOM = "random_states"


@dataclass(frozen=True)
class RunCheckpoints:
    """The checkpoints of one run, which it saves to and loads from.

    Attributes:
        source_dir: the student's model folder; checkpoints must not lie in it.
        identity: from `run.identity.identity`, the same on every rank.
        keep: how many of the newest checkpoints stay.
        say: takes a log line; does nothing on ranks without a terminal.
    """

    run_dir: Path
    source_dir: Path
    student: Student
    trainer: Trainer
    identity: Mapping[str, Any]
    keep: int
    say: Callable[[str], None]

    def save(self, extra: Mapping[str, Any] | None = None, keep_also: Collection[int] = ()) -> Path:
        """Publish the state after the last step as `step_N`; one that verifies is left alone.

        Args:
            extra: JSON values of the caller, such as the best evaluation; `load` returns them.
            keep_also: steps whose checkpoints stay in any case, beside the newest `keep`.

        Raises:
            UserError: on every rank, naming the path; earlier checkpoints are untouched.
        """
        step = self.trainer.step
        out_dir = step_dir(self.run_dir, step)
        state = self._state(extra or {})
        is_there, remarks = with_all_ranks(partial(self._prepare, step))
        for remark in remarks:
            self.say(remark)
        if not is_there:
            with ExitStack() as stack:
                staging = begin_staging(stack, out_dir, self.source_dir, self._num_bytes())
                weights = entries(self.student.bare.sharded_state_dict())
                spans = saved_spans(self.student, weights)
                written = from_all_ranks(self._write, staging, spans)
                chunks = [chunk for part in written for chunk in part]
                rank_0(self._finish, staging, chunks, state)
                info = {"kind": KIND, "step": step, "topology": state["layout"]}
                publish_staging(staging, out_dir, info)
        rank_0(write_latest, self.run_dir, step)
        rank_0(self._remove_old, step, keep_also)
        return out_dir

    def _finish(self, staging: Staging, chunks: list[Written], state: dict[str, Any]) -> None:
        """Write index, state, and the files that make a HuggingFace folder of the weights."""
        for name, content in text_files(self.source_dir, self.student.options.dtype):
            staging.write(f"{HF_DIR}/{name}", content)
        complete(staging, chunks, state)

    def _prepare(self, step: int, check: CheckHashes) -> tuple[bool, list[str]]:
        """Make the folder of checkpoints; return what `make_room` finds at the place of `step`."""
        checkpoints_dir(self.run_dir).mkdir(parents=True, exist_ok=True)
        return make_room(self.run_dir, step, check)

    def _remove_old(self, newest: int, also: Collection[int]) -> None:
        remove_old(self.run_dir, newest, self.keep, also)

    def _state(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON values of `common.json`, which rank 0 writes."""
        return {
            "kind": KIND,
            "step": self.trainer.step,
            "dtype": dtype_name(self.student.options.dtype),
            "layout": asdict(self.student.groups.layout),
            "num_updates": num_updates(self.student),
            "trainer": self.trainer.state_dict(),
            "extra": dict(extra),
            **self.identity,
        }

    def _num_bytes(self) -> int:
        """Count the bytes of the whole checkpoint: what all ranks hold of it, replicas left out."""
        student = self.student
        weights = entries(student.bare.sharded_state_dict())
        local = [shard for entry in weights.values() for shard in shards(entry)]
        local += optimizer_shards(student)
        sizes = [
            shard.data.nbytes for shard in local if shard.data is not None and is_saved_here(shard)
        ]
        return sum(from_all_ranks(sum, sizes))

    def _write(self, staging: Staging, spans: Mapping[str, Span]) -> list[Written]:
        """Write this rank's shares into its file; return its chunks."""
        with ShardFile(staging, dist.get_rank()) as file:
            for shard in self._values(spans):
                shard.data = shard.data.detach().cpu()
                file.add(shard)
        return file.written

    def _values(self, spans: Mapping[str, Span]) -> Iterator[Any]:
        for name, entry in entries(self.student.bare.sharded_state_dict()).items():
            assert entry.data is not None
            if name in spans:
                start, stop = spans[name]
                yield from slice_shards(entry, spans[name], entry.data.view(-1)[start:stop])
        yield from optimizer_values(self.student, spans)
        yield rank_row(_RANDOM, random_bytes())

    def load(self, folder: Path) -> dict[str, Any]:
        """Resume from `folder`, whose hashes were just verified; return the caller's `extra`.

        Raises:
            UserError: on every rank: no checkpoint of a training run, or one of another model,
                teacher or configuration (named by key).
        """
        state = all_ranks(self._checked_state, folder)
        hashed = all_ranks(lambda: [record.name for record in _manifest(folder)["files"]])
        with all_ranks(CheckpointReader, folder, hashed=hashed) as reader:
            same_layout = state["layout"] == asdict(self.student.groups.layout)
            self._fill(reader, same_layout)
        if not same_layout:
            self.say(f"{folder}: was saved by another layout; random states start from the seed")
        set_num_updates(self.student, state["num_updates"])
        all_ranks(self.trainer.load_state_dict, state["trainer"])
        if self.trainer.curriculum.remark:
            self.say(self.trainer.curriculum.remark)
        return state["extra"]

    def _checked_state(self, folder: Path) -> dict[str, Any]:
        state = read_state(folder)
        if state.get("kind") != KIND:
            raise FileError(
                f"{folder}: not a checkpoint of a training run; give a step_N folder of a run's "
                "checkpoints"
            )
        require_same(state, json.loads(json.dumps(self.identity)), str(folder))
        return state

    def _fill(self, reader: CheckpointReader, same_layout: bool) -> None:
        """Fill weights, optimizer and, in the same layout, random states from the files."""
        student = self.student
        weights = entries(student.bare.sharded_state_dict())
        wanted = [shard for entry in weights.values() for shard in shards(entry)]
        # Random states are read where they belong: on the same rank of the same layout.
        random_row = rank_row(_RANDOM, torch.empty_like(random_bytes()))
        own_row = [random_row] if same_layout else []
        asked = [*wanted, *optimizer_shards(student), *own_row]
        keys = set[str]().union(*from_all_ranks(reader.require, asked), {_RANDOM})
        all_ranks(reader.require_only, keys)
        all_ranks(lambda: [reader.fill(shard) for shard in wanted])
        all_ranks(fill_optimizer, student, reader)
        if same_layout:
            all_ranks(reader.fill, random_row)
            assert random_row.data is not None
            restore_random_bytes(random_row.data[0])


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileError(f"{folder}: has no manifest.json; the checkpoint is not complete")
    return manifest
