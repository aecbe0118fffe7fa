"""A training run's checkpoint as a HuggingFace folder, by the tool, with nothing else at hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_vopd.checkpoint.export import export_student
from megatron_vopd.files.atomic_folder import MANIFEST_NAME
from megatron_vopd.megatron.groups import init_world
from megatron_vopd.run.folder import verify_checkpoint
from megatron_vopd.types import Layout
from tests.support.harness import spawn
from tests.support.layouts import Case
from tests.support.resumable import VOCAB, make
from tests.support.steps import Setup
from tests.support.tiny_models import TinyModel
from tests.support.tools import Ran, run

MODEL = TinyModel("qwen3", True, VOCAB, overrides=(("num_hidden_layers", 2),))


def _train_and_export(setup: Setup, root: Path) -> None:
    """Train two steps at tp2 in bf16, from a folder whose config says float32; export."""
    init_world("cpu")
    made = make(replace(setup, dtype=torch.bfloat16), root / "run")
    for _ in range(2):
        made.trainer.train_step()
    made.checkpoints.save()
    export_student(made.student, setup.student_dir, root / "run" / "hf" / "step_2")


def _convert(*arguments: Path) -> Ran:
    return run("convert_megatron_to_hf", *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the run folder; the model that it began with is gone."""
    root = tmp_path_factory.mktemp("converted")
    student, teacher = MODEL.save(root / "student", 0), MODEL.save(root / "teacher", 1)
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    (student / "chat_template.jinja").write_text("{{ messages }}")
    layout = Layout(2, tp=2)
    setup = Setup(Case("", layout), str(student), {"teacher": str(teacher)})
    spawn(_train_and_export, 2, replace(setup, teacher_layout=layout), root)
    shutil.rmtree(student)
    return root / "run"


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_it_is_the_runs_own_export_byte_by_byte(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_2"
    assert verify_checkpoint(checkpoint) == 2
    (done,) = spawn(_convert, 1, checkpoint, tmp_path / "out")
    assert done.status == 0, done.err
    found, expected = _contents(tmp_path / "out"), _contents(trained / "hf" / "step_2")
    assert found == expected
    assert {"model.safetensors", "config.json", "chat_template.jinja"} <= found.keys()
    assert json.loads(found["generation_config.json"]) == {"eos_token_id": [5, 6]}


def test_the_carried_files_are_under_the_manifest(trained: Path, tmp_path: Path) -> None:
    for name, old, new in (
        ("generation_config.json", b"5", b"7"),
        ("config.json", b"bfloat16", b"bfloat61"),
    ):
        checkpoint = Path(shutil.copytree(trained / "checkpoints" / "step_2", tmp_path / name))
        path = checkpoint / "hf" / name
        path.write_bytes(path.read_bytes().replace(old, new))
        (done,) = spawn(_convert, 1, checkpoint, tmp_path / "out")
        assert done.status == 2 and name in done.err
        assert done.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_checkpoint_without_them_needs_an_option(trained: Path, tmp_path: Path) -> None:
    """Runs wrote such checkpoints before they carried their texts."""
    checkpoint = Path(shutil.copytree(trained / "checkpoints" / "step_2", tmp_path / "step_2"))
    shutil.rmtree(checkpoint / "hf")
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    kept = [one for one in manifest["files"] if not one["name"].startswith("hf/")]
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest | {"files": kept}))
    out, given = tmp_path / "out", trained / "hf" / "step_2"
    (without,) = spawn(_convert, 1, checkpoint, out)
    assert without.status == 2 and "--hf-config" in without.err
    (done,) = spawn(_convert, 1, checkpoint, out, "--hf-config", given)
    assert done.status == 0, done.err
    assert _contents(out) == _contents(given)
