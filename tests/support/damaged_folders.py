"""The ways in which test_conversion_faults damages a good folder, and what must be said of each."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_vopd.checkpoint.index import StoredTensor, index_bytes, read_index
from tests.support.tiny_models import add_tokenizer

Q_PROJ, EMBED = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MARKER = "foreign_code_ran"
Damage = Callable[[Path], object]
Case = tuple[Damage, tuple[str, ...]]


class Evil:
    """An object that pickles to a call, which leaves a file behind."""

    def __init__(self, folder: Path) -> None:
        self._command = f"touch {folder.parent / MARKER}"

    def __reduce__(self) -> tuple:
        return os.system, (self._command,)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return damage


def _json(name: str, **changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    return damage


def _index(change: Callable[[dict[str, Any], Path], object]) -> Damage:
    """Split the model into an indexed folder of two files, then change the weight map."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        names = sorted(tensors)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file_name, part in halves.items():
            save_file({name: tensors[name] for name in part}, folder / file_name)
        weight_map: dict[str, Any] = {n: f for f, part in halves.items() for n in part}
        change(weight_map, folder)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def _point(target: Any) -> Damage:
    return _index(lambda weight_map, _: weight_map.update({Q_PROJ: target}))


def _cut(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1000)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ][3, 5] = float("nan")


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")


def _twice_in_index(folder: Path) -> None:
    _index(lambda *_: None)(folder)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(
        text.replace('{"weight_map": {', f'{{"weight_map": {{"{Q_PROJ}": "a.safetensors", ')
    )


def _twice_in_files(folder: Path) -> None:
    _index(lambda *_: None)(folder)
    for name in ("a.safetensors", "b.safetensors"):
        tensors = load_file(folder / name)
        save_file(tensors | {Q_PROJ: torch.zeros(96, 64)}, folder / name)


def _only_bin(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder)))


def _outside(folder: Path) -> Path:
    """Move the weights out of the folder."""
    target = folder.parent / "outside.safetensors"
    shutil.move(folder / SINGLE, target)
    return target


def _link_out(folder: Path) -> None:
    os.symlink(_outside(folder), folder / SINGLE)


def _other_model_in_the_cache(folder: Path) -> None:
    """Make a hub cache whose link leads to the blobs of another model."""
    blobs = folder.parent / "models--other" / "blobs"
    blobs.mkdir(parents=True)
    shutil.move(folder / SINGLE, blobs / "x")
    os.symlink(blobs / "x", folder / SINGLE)


def _code(*configs: str) -> Damage:
    def damage(folder: Path) -> None:
        touch = f"open({str(folder.parent / MARKER)!r}, 'w')\n"
        (folder / "modeling_evil.py").write_text(touch + "class Evil: pass\n")
        for name in configs:
            _json(name, auto_map={"AutoConfig": "modeling_evil.Evil"})(folder)

    return damage


def _auto_map_alone(name: str) -> Damage:
    return _json(name, auto_map={"AutoTokenizer": ["org/repo--evil.Evil", None]})


HF_CASES: dict[str, Case] = {
    "missing tensor": (_tensors(lambda t: t.pop(Q_PROJ)), (Q_PROJ, "missing")),
    "extra tensor": (
        _tensors(lambda t: t.update(extra=torch.zeros(1))),
        (SINGLE, "extra", "unexpected"),
    ),
    "wrong shape": (
        _tensors(lambda t: t.update({Q_PROJ: torch.zeros(3, 64)})),
        (SINGLE, Q_PROJ, "(3, 64)", "(96, 64)"),
    ),
    "mixed types": (
        _tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].bfloat16()})),
        (SINGLE, Q_PROJ, "BF16", "F32", "--dtype"),
    ),
    "integers": (
        _tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)})),
        (SINGLE, Q_PROJ, "I8"),
    ),
    "truncated file": (_cut(SINGLE), (SINGLE, "not a readable")),
    "absent file": (
        _index(lambda _, folder: (folder / "b.safetensors").unlink()),
        ("b.safetensors", "not found"),
    ),
    "key twice in the index": (_twice_in_index, (INDEX, Q_PROJ, "twice")),
    "key in two files": (_twice_in_files, (".safetensors", Q_PROJ, "in this file too")),
    "no safetensors": (_only_bin, (SINGLE, "pickled .bin weights are not read")),
    "config of another size": (
        _json("config.json", intermediate_size=128),
        (SINGLE, "gate_proj", "(96, 64)", "(128, 64)"),
    ),
    "config of fewer layers": (
        _json("config.json", num_hidden_layers=3),
        ("config.json", "num_hidden_layers", "3"),
    ),
    "NaN": (_tensors(_nan), (SINGLE, Q_PROJ, "NaN")),
    "infinity": (_tensors(_infinite), (SINGLE, "model.layers.1.mlp.up_proj.weight", "infinite")),
    "tokenizer larger than the embedding": (
        lambda folder: add_tokenizer(folder, 161),
        ("tokenizer.json", "160", EMBED),
    ),
    "tied, but another head": (
        _json("config.json", tie_word_embeddings=True),
        (SINGLE, "lm_head.weight", "tie_word_embeddings"),
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json", "not found")),
    "torn config": (lambda f: (f / "config.json").write_text('{"mod'), ("config.json", "JSON")),
    "no folder": (shutil.rmtree, ("no such folder",)),
    "index: parent": (_point("../outside.safetensors"), (INDEX, Q_PROJ, "../outside")),
    "index: absolute": (_point("/etc/passwd"), (INDEX, Q_PROJ, "/etc/passwd")),
    "index: NUL": (_point("a.safetensors\0"), (INDEX, Q_PROJ, "x00")),
    "index: backslash": (_point("..\\a.safetensors"), (INDEX, Q_PROJ, "..\\")),
    "index: number": (_point(3), (INDEX, Q_PROJ, "3")),
    "index: null": (_point(None), (INDEX, Q_PROJ, "None")),
    "index: list": (_point(["a.safetensors"]), (INDEX, Q_PROJ, "[")),
    "index: dot": (_point(".."), (INDEX, Q_PROJ, "'..'")),
    "index: a list of pairs": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": [1]}'),
        (INDEX, "weight_map"),
    ),
    "link leading out": (_link_out, (SINGLE, "link", "outside.safetensors")),
    "link to another model of the cache": (_other_model_in_the_cache, (SINGLE, "link")),
    "config linked out": (
        lambda f: (
            shutil.move(f / "config.json", f.parent / "c"),
            os.symlink("../c", f / "config.json"),
        ),
        ("config.json", "link"),
    ),
    "code and auto_map": (_code("config.json"), ("modeling_evil.py", "never run")),
    "code of a tokenizer": (_code("tokenizer_config.json"), ("modeling_evil.py", "never run")),
    "auto_map in config.json": (_auto_map_alone("config.json"), ("config.json", "auto_map")),
    "auto_map in tokenizer_config.json": (
        _auto_map_alone("tokenizer_config.json"),
        ("tokenizer_config.json", "auto_map"),
    ),
}


def _stored(change: Callable[[dict[str, StoredTensor]], object], signed: bool = False) -> Damage:
    """Change the index of a checkpoint; its manifest goes, so that nothing else notices."""

    def damage(folder: Path) -> None:
        tensors = read_index(folder)
        change(tensors)
        (folder / ".metadata").write_bytes(index_bytes(tensors))
        if not signed:
            (folder / "manifest.json").unlink()

    return damage


def _place(**changes: Any) -> Damage:
    def change(tensors: dict[str, StoredTensor]) -> None:
        first, *rest = tensors[QKV].chunks
        tensors[QKV] = replace(tensors[QKV], chunks=(replace(first, **changes), *rest))

    return _stored(change)


def _flip(with_manifest: bool) -> Damage:
    """Change one bit of one weight."""

    def damage(folder: Path) -> None:
        chunk = read_index(folder)[QKV].chunks[1]
        with open(folder / chunk.file, "r+b") as file:
            file.seek(chunk.start + chunk.length // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
        if not with_manifest:
            (folder / "manifest.json").unlink()

    return damage


def unsigned(damage: Damage) -> Damage:
    """Remove the manifest first, whose hashes would stop everything else."""

    def both(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        damage(folder)

    return both


def _evil_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(folder)))


def _evil_inside_index(folder: Path) -> None:
    """Put a call into a field of a sound index that nobody needs."""
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = Evil(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def object_entry(folder: Path) -> None:
    """Add an object entry, whose bytes in the .distcp file megatron-core would unpickle."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    path = folder / "__0_0.distcp"
    start, buffer = path.stat().st_size, io.BytesIO()
    torch.save(Evil(folder), buffer)
    with open(path, "ab") as file:
        file.write(buffer.getvalue())
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    key = "decoder.hostile/shard_0_1"
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    place = _StorageInfo("__0_0.distcp", start, len(buffer.getvalue()))
    metadata.storage_data[MetadataIndex(key)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _evil_chunk(folder: Path) -> None:
    """Write a chunk whose pickled header calls a command."""
    tensors = read_index(folder)
    first, *rest = tensors[QKV].chunks
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(folder)))
        archive.writestr("archive/data/0", bytes(100))
    path = folder / first.file
    chunk = replace(first, start=path.stat().st_size, length=len(buffer.getvalue()))
    with open(path, "ab") as file:
        file.write(buffer.getvalue())
    tensors[QKV] = replace(tensors[QKV], chunks=(chunk, *rest))
    (folder / ".metadata").write_bytes(index_bytes(tensors))


def evil_common(folder: Path) -> None:
    torch.save({"args": Evil(folder)}, folder / "common.pt")


def evil_raw_common(folder: Path) -> None:
    (folder / "common.pt").write_bytes(pickle.dumps(Evil(folder)))


def _link_chunks(folder: Path) -> None:
    shutil.move(folder / "__0_0.distcp", folder.parent / "moved.distcp")
    os.symlink("../moved.distcp", folder / "__0_0.distcp")


CHECKPOINT_CASES: dict[str, Case] = {
    "missing tensor": (_stored(lambda t: t.pop(QKV)), (".metadata", QKV, "missing")),
    "extra tensor": (
        _stored(lambda t: t.update({"decoder.extra": t["decoder.final_layernorm.weight"]})),
        (".metadata", "decoder.extra", "unexpected"),
    ),
    "wrong type": (
        _stored(lambda t: t.update({QKV: replace(t[QKV], dtype="bfloat16")})),
        (".metadata", QKV, "bfloat16", "float32"),
    ),
    "chunk missing": (
        _stored(lambda t: t.update({QKV: replace(t[QKV], chunks=t[QKV].chunks[1:])})),
        (".metadata", QKV, "values"),
    ),
    "chunk of another tensor": (
        _place(start=0, length=3000),
        ("__0_0.distcp", QKV, "restore"),
    ),
    "truncated file": (unsigned(_cut("__0_0.distcp")), ("__0_0.distcp", "ends at byte")),
    "truncated file, hashes known": (_cut("__0_0.distcp"), ("__0_0.distcp", "manifest.json")),
    "absent file": (
        unsigned(lambda f: (f / "__0_0.distcp").unlink()),
        ("__0_0.distcp", "missing"),
    ),
    "flipped bit": (_flip(with_manifest=False), ("__0_0.distcp", QKV, "checksum")),
    "flipped bit, hashes known": (_flip(with_manifest=True), ("__0_0.distcp", "manifest.json")),
    "changed config": (
        unsigned(_json("hf/config.json", rms_norm_eps=1e-5)),
        ("hf/config.json", "norm_eps", "1e-06"),
    ),
    "smaller vocabulary": (
        unsigned(_json("hf/config.json", vocab_size=156)),
        ("hf/config.json", "vocab_size", "160"),
    ),
    "no config": (unsigned(lambda f: shutil.rmtree(f / "hf")), ("hf", "--hf-config")),
    "another format": (
        unsigned(_json("metadata.json", sharded_backend="zarr")),
        ("metadata.json", "torch_dist"),
    ),
    "no checkpoint": (
        lambda f: [p.unlink() for p in f.iterdir() if p.is_file()],
        ("metadata.json", "not found"),
    ),
    "hostile .metadata": (unsigned(_evil_index), (".metadata", "posix.system")),
    "hostile call inside .metadata": (unsigned(_evil_inside_index), (".metadata", "posix.system")),
    "object bytes in .distcp": (
        unsigned(object_entry),
        (".metadata", "decoder.hostile", "pickled object"),
    ),
    "hostile chunk header": (unsigned(_evil_chunk), ("__0_0.distcp", QKV, "posix.system")),
    "hostile common.pt": (unsigned(evil_common), ("common.pt", "posix.system")),
    "hostile bare common.pt": (unsigned(evil_raw_common), ("common.pt", "zip")),
    "no pickle in .metadata": (
        unsigned(lambda f: (f / ".metadata").write_bytes(b"\x80\x04garbage")),
        (".metadata", "pickle"),
    ),
    "chunk in the parent": (_place(file="../moved.distcp"), (".metadata", QKV, "../moved")),
    "chunk at an absolute path": (_place(file="/etc/x.distcp"), (".metadata", QKV, "/etc")),
    "chunk with NUL": (_place(file="a\0.distcp"), (".metadata", QKV, "x00")),
    "chunk with a number": (_place(file=7), (".metadata", QKV, "7")),
    "chunk beyond the file": (_place(start=10**12), ("__0_0.distcp", QKV, "ends at byte")),
    "chunk file linked": (unsigned(_link_chunks), ("__0_0.distcp", "link")),
    "code beside the config": (
        unsigned(lambda f: _code("config.json")(f / "hf")),
        ("modeling_evil.py", "never run"),
    ),
}
