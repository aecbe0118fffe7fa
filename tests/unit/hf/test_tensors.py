"""Model folders that are not what they should be: one line that names the file and the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vopd.errors import LayoutError
from megatron_vopd.hf.facts import ModelError, facts_from_config, layout_problems
from megatron_vopd.hf.tensors import SafetensorsFolder, read_config
from megatron_vopd.types import Layout
from tests.support.tiny_models import ARCHITECTURES, TinyModel

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _index(weight_map: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)

    return apply


def _config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return apply


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _code(folder: Path) -> None:
    _config(model_type="novel", auto_map={"AutoConfig": "evil.Evil"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")


# What is done to a good folder, and what the message must hold.
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing tensor": (_rewrite(lambda t: t.__delitem__(Q_PROJ)), (Q_PROJ, "missing")),
    "extra tensor": (
        _rewrite(lambda t: t.update(extra=torch.zeros(1))),
        ("model.safetensors", "extra", "unexpected"),
    ),
    "wrong shape": (
        _rewrite(lambda t: t.update({Q_PROJ: torch.zeros(3, 64)})),
        ("model.safetensors", Q_PROJ, "(3, 64)", "(96, 64)"),
    ),
    "truncated file": (_truncate, ("model.safetensors", "readable")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("no model.safetensors",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json", "not found")),
    "torn config": (lambda f: (f / "config.json").write_text('{"model_'), ("config.json",)),
    "list as config": (lambda f: (f / "config.json").write_text("[]"), ("config.json",)),
    "config without type": (lambda f: (f / "config.json").write_text("{}"), ("config.json",)),
    "other architecture": (_config(model_type="gpt2"), ("gpt2", "qwen3")),
    "other sizes": (_config(intermediate_size=128), ("gate_proj", "(96, 64)", "(128, 64)")),
    "attention bias": (_config(attention_bias=True), ("attention_bias", "False")),
    "activation": (_config(hidden_act="gelu"), ("hidden_act", "gelu", "silu")),
    "index to a missing file": (
        _index({Q_PROJ: "gone.safetensors"}),
        ("model.embed_tokens.weight", "missing"),
    ),
    "index out of the folder": (_index({Q_PROJ: "../x.safetensors"}), (Q_PROJ, "../x")),
    "absolute index": (_index({Q_PROJ: "/etc/passwd"}), (Q_PROJ, "/etc/passwd")),
    "numbers in the index": (_index({Q_PROJ: 3}), (Q_PROJ, "3")),
    "list as index": (_index([1]), ("index.json", "weight_map")),
    "code in the folder": (_code, ("config.json", "novel")),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder(case: str, tmp_path: Path) -> None:
    folder = TinyModel("qwen3").save(tmp_path)
    damage, words = BAD_FOLDERS[case]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        _, facts = read_config(folder)
        with SafetensorsFolder(folder) as tensors:
            tensors.require(facts)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for word in words:
        assert word in message
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_raw_config_gives_the_same_facts_as_transformers(model_type: str, tmp_path: Path) -> None:
    folder = TinyModel(model_type, tied=True, vocab_size=157).save(tmp_path)
    _, facts = read_config(folder)
    assert facts_from_config(json.loads((folder / "config.json").read_text())) == facts


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path: Path) -> None:
    folder = TinyModel("qwen3", tied=True).save(tmp_path)
    _rewrite(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    _, facts = read_config(folder)
    with SafetensorsFolder(folder) as tensors:
        tensors.require(facts)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(3, tp=3), ("tp=3", "num_attention_heads=4", "[1, 2, 4]")),
        (Layout(8, pp=8), ("pp=8", "num_hidden_layers=4", "[1, 2, 4]")),
        (Layout(2, ep=2), ("ep=2", "no experts")),
    ],
)
def test_layouts_that_do_not_fit_the_model(
    layout: Layout, words: tuple[str, ...], tmp_path: Path
) -> None:
    _, facts = read_config(TinyModel("qwen3").save(tmp_path))
    problems = "; ".join(layout_problems(facts, layout, trained=True))
    for word in words:
        assert word in problems


def test_experts_need_divisors_and_sequence_parallelism(tmp_path: Path) -> None:
    _, facts = read_config(TinyModel("qwen3_moe").save(tmp_path))
    assert "[1, 2, 4]" in layout_problems(facts, Layout(3, ep=3), trained=True)[0]
    training = layout_problems(facts, Layout(2, tp=2), trained=True)
    assert "sequence_parallel: true" in training[0]
    assert layout_problems(facts, Layout(2, tp=2), trained=True, sequence_parallel=True) == []
    assert layout_problems(facts, Layout(2, tp=2), trained=False) == []


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 3}, ("tp=3", "4 ranks", "[1, 2, 4]")),
        ({"pp": 2, "ep": 4}, ("ep=4", "2 ranks", "[1, 2]")),
        ({"tp": 0}, ("tp=0",)),
    ],
)
def test_layouts_that_do_not_divide_the_world(
    sizes: dict[str, int], words: tuple[str, ...]
) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout(4, **sizes)
    for word in words:
        assert word in str(caught.value)
