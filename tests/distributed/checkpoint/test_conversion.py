"""H1: HF -> Megatron -> HF through the tools, at every layout, is the same, bit for bit.

Each checkpoint is also loaded by megatron-core's own `dist_checkpointing.load`, in the layout that
wrote it and, for the one written by a single process, in every other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_vopd.checkpoint.index import INDEX_NAME, index_bytes, read_index
from megatron_vopd.checkpoint.sharded import CheckpointReader, entries, load_entries
from megatron_vopd.hf.mapping import hf_tensors
from tests.support.harness import spawn
from tests.support.layouts import DENSE_CASES, MOE_CASES, Case, build, destroy_groups, enter
from tests.support.tiny_models import DENSE, TinyModel, add_tokenizer
from tests.support.tools import run

DENSE_LAYOUTS = [case for case in DENSE_CASES if case.name in ("tp1", "tp2", "pp2", "tp2-pp2")]
MOE_LAYOUTS = [
    case for case in MOE_CASES if case.name in ("moe-tp1", "moe-ep2", "moe-pp2", "moe-tp2-ep2-sp")
]
CARRIED = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")


def _variants(model_types: tuple[str, ...]) -> list[TinyModel]:
    return [
        TinyModel(model_type, tied, vocab_size, dtype)
        for model_type in model_types
        for tied in (False, True)
        for vocab_size in (160, 157)
        for dtype in ("float32", "bfloat16")
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "dense": [add_tokenizer(model.save(root)) for model in _variants(DENSE)],
        "moe": [add_tokenizer(model.save(root)) for model in _variants(("qwen3_moe",))],
    }
    for kind, case in (("dense", DENSE_LAYOUTS[0]), ("moe", MOE_LAYOUTS[0])):
        spawn(_to_megatron, 1, case, made[kind])
    return made


def _checkpoint(model_dir: Path, case: Case) -> Path:
    return model_dir.parent / f"{model_dir.name}.{case.name}.megatron"


def _to_megatron(case: Case, model_dirs: list[Path]) -> int:
    """On a rank: convert every model in this layout; returns how many succeeded."""
    layout, done = case.layout, 0
    cut = ("--tp", layout.tp, "--pp", layout.pp, "--ep", layout.ep)
    for model_dir in model_dirs:
        ran = run("convert_hf_to_megatron", model_dir, _checkpoint(model_dir, case), *cut)
        assert ran.status == 0, ran.err
        done += 1
    return done


def _load(case: Case, writer: Case, model_dirs: list[Path]) -> int:
    """On a rank: compare what stock megatron-core and this library load with the HF slices."""
    groups = enter(case)
    for model_dir in model_dirs:
        folder = _checkpoint(model_dir, writer)
        dtype = torch.bfloat16 if "bfloat16" in model_dir.name else torch.float32
        model, _ = build(str(model_dir), case, groups, dtype)
        expected = {name: value.clone() for name, value in model.state_dict().items() if _is(value)}
        for load in (_load_stock, _load_ours):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(7)
            load(model, folder)
            for name, value in model.state_dict().items():
                if _is(value):
                    assert torch.equal(value, expected[name]), f"{folder.name}: {name}"
    destroy_groups()
    return len(model_dirs)


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _load_stock(model: Any, folder: Path) -> None:
    wanted = dict(entries(model.sharded_state_dict()))
    loaded: Any = dist_checkpointing.load(wanted, str(folder), strict="raise_all")
    model.load_state_dict(loaded, strict=False)


def _load_ours(model: Any, folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        load_entries(entries(model.sharded_state_dict()), reader)


def _to_hf(case: Case, model_dirs: list[Path]) -> int:
    """On a rank: convert back; returns how many models are the same bit for bit."""
    same = 0
    for model_dir in model_dirs:
        back = model_dir.parent / f"{model_dir.name}.{case.name}.hf"
        ran = run("convert_megatron_to_hf", _checkpoint(model_dir, case), back)
        assert ran.status == 0, ran.err
        same += _is_same_folder(model_dir, back)
    return same


def _is_same_folder(model_dir: Path, back: Path) -> bool:
    """Compare every tensor's bits outside the library, names, bytes of config and tokenizer."""
    from safetensors.torch import load_file

    original = load_file(model_dir / "model.safetensors")
    returned = load_file(back / "model.safetensors")
    assert original.keys() == returned.keys()
    for name, tensor in original.items():
        assert tensor.dtype == returned[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), returned[name].view(torch.uint8)), name
    for name in CARRIED:
        assert (model_dir / name).read_bytes() == (back / name).read_bytes(), name
    return True


def _round_trip(case: Case, model_dirs: list[Path], single: Case) -> tuple[int, int, int]:
    """On a rank: go through the whole matrix of one layout."""
    if case is not single and case.name != single.name:
        _to_megatron(case, model_dirs)
        destroy_groups()
    loaded = _load(case, case, model_dirs) + _load(case, single, model_dirs)
    from megatron_vopd.megatron import groups

    getattr(groups.student_groups, "cache_clear", lambda: None)()
    return loaded, _to_hf(case, model_dirs), len(model_dirs)


@pytest.mark.parametrize("case", DENSE_LAYOUTS, ids=str)
def test_dense(case: Case, folders: dict[str, list[Path]]) -> None:
    size = case.layout.world_size
    results = spawn(_round_trip, size, case, folders["dense"], DENSE_LAYOUTS[0])
    assert results == [(48, 24, 24)] * size


@pytest.mark.parametrize("case", MOE_LAYOUTS, ids=str)
def test_moe(case: Case, folders: dict[str, list[Path]]) -> None:
    size = case.layout.world_size
    results = spawn(_round_trip, size, case, folders["moe"], MOE_LAYOUTS[0])
    assert results == [(16, 8, 8)] * size


def _former(case: Case, model_dir: Path) -> set[str]:
    """On a rank: load a checkpoint under the keys of version 0.1.0; return those that differ."""
    model, _ = build(str(model_dir), case, enter(case))
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    folder = _checkpoint(model_dir, case)
    stored = read_index(folder)
    former = {
        key.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"): tensor
        for key, tensor in stored.items()
    }
    (folder / INDEX_NAME).write_bytes(index_bytes(former))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    _load_ours(model, folder)
    (folder / INDEX_NAME).write_bytes(index_bytes(stored))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    return former.keys() - stored.keys()


def test_the_former_key_of_the_norm_before_experts(folders: dict[str, list[Path]]) -> None:
    """It is read still; TransformerEngine's layers never had it."""
    (former,) = spawn(_former, 1, MOE_LAYOUTS[0], folders["moe"][0])
    assert former == {"decoder.layers.mlp.linear_fc1.layer_norm_weight"}


def _several_files(model_dir: Path, out: Path) -> list[str]:
    ran = run("convert_hf_to_megatron", model_dir, out / "meg", "--verify")
    assert ran.status == 0, ran.err
    ran = run("convert_megatron_to_hf", out / "meg", out / "hf", "--max-file-gb", 1e-4, "--verify")
    assert ran.status == 0, ran.err
    ran = run("convert_hf_to_megatron", out / "hf", out / "again")
    assert ran.status == 0, ran.err
    return sorted(path.name for path in (out / "hf").glob("*.safetensors"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_several_files_with_an_index(world_size: int, tmp_path: Path) -> None:
    """transformers reads the sharded export, and the import takes it back."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model_dir = add_tokenizer(TinyModel("qwen3", False, 157).save(tmp_path))
    names = spawn(_several_files, world_size, model_dir, tmp_path)[0]
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    original = load_file(model_dir / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())


def _other_type(model_dir: Path, out: Path) -> None:
    ran = run("convert_hf_to_megatron", model_dir, out / "meg", "--dtype", "bf16")
    assert ran.status == 0, ran.err
    ran = run("convert_megatron_to_hf", out / "meg", out / "hf", "--dtype", "fp32", "--verify")
    assert ran.status == 0, ran.err


def test_types_are_converted_on_request_and_the_config_says_so(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file

    model_dir = TinyModel("qwen3").save(tmp_path)
    spawn(_other_type, 1, model_dir, tmp_path)
    original = load_file(model_dir / "model.safetensors")
    returned = load_file(tmp_path / "hf/model.safetensors")
    for name in hf_tensors_of(model_dir):
        assert torch.equal(returned[name], original[name].bfloat16().float()), name
    assert json.loads((tmp_path / "meg/hf/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "float32"


def hf_tensors_of(model_dir: Path) -> list[str]:
    from megatron_vopd.hf.tensors import read_config

    return list(hf_tensors(read_config(model_dir)[1]))
