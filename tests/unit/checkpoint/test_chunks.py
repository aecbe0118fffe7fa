"""Chunks of tensors as a checkpoint holds them: what goes wrong while one is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vopd.checkpoint.chunks import write_payload
from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.atomic_folder import staging_folder


@pytest.mark.parametrize("at", range(6))
def test_a_disk_that_fills_up_is_named(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it does: torch's writer of archives has an error of its own, which says less."""
    write, calls = os.write, iter(range(100))

    def full(descriptor: int, data: Any) -> int:
        if next(calls) >= at:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with (
        monkeypatch.context() as patch,
        pytest.raises(FileError) as caught,
        staging_folder(tmp_path / "out") as staging,
        staging.create("a") as file,
    ):
        patch.setattr(os, "write", full)
        write_payload(file, torch.zeros(2**20))
        write_payload(file, torch.zeros(3))
        write_payload(file, torch.zeros(2**18 + 3))
    assert "/a: No space left on device; " in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
