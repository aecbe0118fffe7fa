"""Hashes of a checkpoint, which all ranks check by shares and rank 0 judges."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vopd.errors import UserError
from megatron_vopd.files.atomic_folder import FileRecord, staging_folder
from megatron_vopd.run import verify
from megatron_vopd.run.folder import KIND, make_room, step_dir
from megatron_vopd.run.start import choose_resume
from megatron_vopd.run.verify import with_all_ranks
from tests.support.harness import spawn

RANKS, SIZE = 4, 1000


def _save(run_dir: Path, step: int) -> Path:
    """Publish a folder with a file of each rank, and a small one."""
    out_dir = step_dir(run_dir, step)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(out_dir) as staging:
        for rank in range(RANKS):
            staging.write(f"__{rank}_0.distcp", bytes(SIZE + rank))
        staging.write("common.json", b"{}")
        staging.publish(out_dir, staging.records, {"kind": KIND, "step": step})
    return out_dir


def _chosen(run_dir: Path) -> tuple[Any, dict[str, int], Any]:
    """Return what a start resumes from, bytes hashed on this rank by folder, and a later save."""
    read, check = Counter[str](), verify.verify_hashes

    def counted(folder: Path, records: list[FileRecord]) -> None:
        read[folder.name] += sum(record.size for record in records)
        check(folder, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "verify_hashes", counted)
        chosen = choose_resume(run_dir, "auto")
    again = with_all_ranks(lambda check: make_room(run_dir, 2, check))
    return chosen, dict(read), again


def test_each_rank_hashes_a_share_of_the_newest_that_verifies(tmp_path: Path) -> None:
    """F13: a quarter on each of four ranks; the damaged one is named and passed over."""
    for step in (2, 4, 6):
        _save(tmp_path, step)
    for name in ("__1_0.distcp", "__2_0.distcp"):
        (step_dir(tmp_path, 6) / name).write_bytes(b"x" * (SIZE + int(name[2])))
    for chosen, read, again in spawn(_chosen, RANKS, tmp_path):
        assert (chosen.folder, chosen.step) == (step_dir(tmp_path, 4), 4)
        # Of two damaged files the first by name, whichever rank is done earlier.
        assert "__1_0.distcp: content is not what" in chosen.remarks[0]
        assert read.keys() == {"step_4", "step_6"} and max(read.values()) < SIZE + 10
        assert again == (True, [])


def _refused(run_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        choose_resume(run_dir, "auto")
    assert dist.get_world_size() == RANKS
    return str(caught.value)


def test_nothing_valid_is_one_line_on_every_rank(tmp_path: Path) -> None:
    (_save(tmp_path, 2) / "common.json").write_bytes(b"[]")
    messages = spawn(_refused, RANKS, tmp_path)
    assert set(messages) == {messages[0]} and "nothing can be resumed from" in messages[0]
    assert "common.json: content is not what" in messages[0]
