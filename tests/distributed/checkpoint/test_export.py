"""The student's export while a file of it cannot be written: all ranks raise, none waits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vopd.checkpoint import export
from megatron_vopd.errors import UserError
from megatron_vopd.files.atomic_file import FileError
from megatron_vopd.files.atomic_folder import Staging
from megatron_vopd.hf.tensors import SafetensorsFolder
from megatron_vopd.megatron.model import ModelOptions
from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.layouts import Case, build, enter
from tests.support.tiny_models import TinyModel, reference_tensors

CASE = Case("tp2", Layout(2, tp=2))


def _export(model_dir: str, root: Path) -> tuple[str, bool]:
    groups = enter(CASE)
    model, facts = build(model_dir, CASE, groups)
    student: Any = SimpleNamespace(bare=model, facts=facts, groups=groups, options=ModelOptions())
    export.MAX_FILE_BYTES = 50_000
    export.export_student(student, model_dir, root / "whole")
    create = Staging.create

    def full(self: Staging, name: str) -> Any:
        if name.startswith("model-00002"):
            raise FileError(f"{name}: No space left on device; nothing was published")
        return create(self, name)

    Staging.create = full
    with pytest.raises(UserError) as caught:
        export.export_student(student, model_dir, root / "failed")
    return str(caught.value), (root / "failed").exists()


def test_a_file_that_cannot_be_written_fails_all_ranks(tmp_path: Path) -> None:
    model_dir = TinyModel("qwen3").save(tmp_path)
    for message, exists in spawn(_export, 2, str(model_dir), tmp_path):
        assert "No space left" in message
        assert not exists
    with SafetensorsFolder(tmp_path / "whole") as found:
        for name, tensor in reference_tensors(model_dir).items():
            assert found.slices(name)[:].equal(tensor), name
