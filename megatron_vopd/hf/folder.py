"""A local HuggingFace folder: its facts, tokenizer and ids, read as bounded plain JSON.

Nothing in the folder is imported or executed, and values are checked before use: a folder may come
from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vopd.errors import shown
from megatron_vopd.hf.facts import ModelError, ModelFacts, facts_from_config

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

_MAX_TEXT_BYTES = 256 * 2**20
_SAMPLE_BYTES = 2**20
_LARGEST = 10**9
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "num_experts", "num_local_experts")
# The rotary types that the model builder takes from transformers.
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_MOE_SIZES = ("moe_intermediate_size", "num_experts_per_tok")

# Carried along by a conversion: text about the model. Weights, and anything else, are not.
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_CARRIED_NAMES = ("LICENSE", "NOTICE", "merges.txt", "vocab.txt")
_NOT_CARRIED = ("manifest.json", "common.json", "metadata.json")
_INNER_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class ModelFolder:
    """One local model: shape, end-of-sequence ids, context, vocabulary, and code it carries.

    `vocabulary` maps token -> id, or is None without a readable tokenizer.json; `special_tokens`
    are those that decoding may skip; `context` is the longest sequence in tokens, RoPE scaling
    included.
    """

    path: str
    facts: ModelFacts
    context: int
    eos_ids: frozenset[int]
    vocabulary: dict[str, int] | None
    special_tokens: frozenset[str]
    chat_template: str | None
    code_files: tuple[str, ...]


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object of bounded size in which no key occurs twice.

    Raises:
        ModelError: it is none.
    """
    if os.path.getsize(path) > _MAX_TEXT_BYTES:
        raise ModelError(f"{path}: more than {_MAX_TEXT_BYTES // 2**20} MiB; use the real file")
    try:
        value = json.loads(Path(path).read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: no valid JSON; copy the model folder again") from None
    except KeyError as error:
        twice = shown(error.args[0])
        raise ModelError(f"{path}: holds {twice} twice; copy the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: no JSON object; copy the model folder again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; raises KeyError for a key that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise KeyError(max(counts, key=counts.__getitem__))
    return found


def read_model_folder(path: str) -> ModelFolder:
    """Read the facts of the model at `path`; raises ModelError naming the file."""
    where = os.path.join(path, "config.json")
    if not os.path.isfile(where):
        raise ModelError(
            f"{path}: no config.json; give a Hugging Face model folder (config.json, "
            "tokenizer.json, *.safetensors)"
        )
    try:
        return _read(path, where)
    except OSError as error:
        name = error.filename or path
        raise ModelError(f"{name}: {error.strerror}; check the file and its permissions") from None


def read_facts(where: str) -> tuple[ModelFacts, dict[str, Any]]:
    """Read facts and raw content of a config.json; raises ModelError naming file and key."""
    config = read_json(where)
    _check_sizes(config, where)
    _check_rope(config, where)
    usual = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
    return facts_from_config({**usual, **config}, where), config


def _read(path: str, where: str) -> ModelFolder:
    facts, config = read_facts(where)
    vocabulary = tokenizer_vocabulary(os.path.join(path, "tokenizer.json"))
    return ModelFolder(
        path=path,
        facts=facts,
        context=_context(config),
        eos_ids=_eos_ids(path, config) or _tokenizer_eos(path, vocabulary),
        vocabulary=vocabulary,
        special_tokens=_special_tokens(path),
        chat_template=_chat_template(path),
        code_files=_code_files(path, config),
    )


def _read_optional(path: str) -> dict[str, Any]:
    return read_json(path) if os.path.isfile(path) else {}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _check_sizes(config: dict[str, Any], where: str) -> None:
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{where}: no model_type; give a Hugging Face model folder")
    required: list[str] = list(_SIZES)
    if config["model_type"].endswith("_moe"):
        required += _MOE_SIZES
        required.append("num_experts" if "num_experts" in config else "num_local_experts")
    present = [key for key in _OPTIONAL_SIZES if config.get(key) is not None]
    for key in [*required, *present]:
        if not _is_size(config.get(key)):
            raise ModelError(
                f"{where}: {key}={shown(config.get(key))}; expected a positive integer: copy the "
                "model's original config.json"
            )


def _rope(config: dict[str, Any]) -> Any:
    return config.get("rope_scaling") or config.get("rope_parameters")


def _check_rope(config: dict[str, Any], where: str) -> None:
    rope = _rope(config)
    if rope is None:
        return
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        raise ModelError(
            f"{where}: {key}={shown(rope)}; expected null, or a mapping with a rope_type of "
            f"{', '.join(_ROPE_TYPES[:4])}: copy the model's original config.json"
        )
    stretched = isinstance(rope.get("factor"), int | float) and rope["factor"] > 1
    if kind == "yarn" and stretched and rope.get("attention_factor") != 1 and "mscale" not in rope:
        raise ModelError(
            f"{where}: rope_type 'yarn' scales attention, which is not supported; use a model of "
            f"rope_type {', '.join(_ROPE_TYPES[:4])}"
        )


def _context(config: dict[str, Any]) -> int:
    """Return max_position_embeddings, or more where RoPE scaling stretches the context."""
    positions = config["max_position_embeddings"]
    rope = _rope(config)
    if not isinstance(rope, dict):
        return positions
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if isinstance(original, int) and isinstance(factor, int | float) and 1 <= factor <= 1e6:
        return max(positions, int(factor * original))
    return positions


def _eos_ids(path: str, config: dict[str, Any]) -> frozenset[int]:
    """Read the ids from generation_config.json, or from config.json where that has none."""
    where = os.path.join(path, "generation_config.json")
    ids = _read_optional(where).get("eos_token_id")
    if ids is None:
        where, ids = os.path.join(path, "config.json"), config.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(_is_size(value) or value == 0 for value in listed):
        raise ModelError(f"{where}: eos_token_id={shown(ids)}; expected token ids")
    return frozenset(listed)


def _tokenizer_eos(path: str, vocabulary: dict[str, int] | None) -> frozenset[int]:
    """Read the tokenizer's own end-of-sequence id: what is left when no config names one."""
    token = _read_optional(os.path.join(path, "tokenizer_config.json")).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if vocabulary is None or not isinstance(token, str) or token not in vocabulary:
        return frozenset()
    return frozenset([vocabulary[token]])


def _special_tokens(path: str) -> frozenset[str]:
    """Read the tokens that tokenizer.json marks as special."""
    added = _read_optional(os.path.join(path, "tokenizer.json")).get("added_tokens")
    tokens = (
        [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    )
    named = [token.get("content") for token in tokens if token.get("special") is True]
    return frozenset(token for token in named if isinstance(token, str))


def tokenizer_vocabulary(tokenizer_path: str) -> dict[str, int] | None:
    """Read token -> id, added tokens included; None where there is no tokenizer.json."""
    if not os.path.isfile(tokenizer_path):
        return None
    tokenizer = read_json(tokenizer_path)
    model = tokenizer.get("model")
    entries = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(entries, list):
        entries = {entry[0]: i for i, entry in enumerate(entries) if _is_piece(entry)}
    if not isinstance(entries, dict):
        raise ModelError(f"{tokenizer_path}: no model.vocab; save the tokenizer again")
    vocabulary: dict[str, Any] = dict(entries)
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            vocabulary[token["content"]] = token.get("id")
    if not all(isinstance(value, int) for value in vocabulary.values()):
        raise ModelError(f"{tokenizer_path}: token ids that are no integers; save it again")
    return vocabulary


def _chat_template(path: str) -> str | None:
    template_path = os.path.join(path, "chat_template.jinja")
    if os.path.isfile(template_path):
        with open(template_path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_TEXT_BYTES)
    template = _read_optional(os.path.join(path, "tokenizer_config.json")).get("chat_template")
    return template if isinstance(template, str) else None


def missing_files(path: str) -> list[str]:
    """List what a run needs and the folder has not: weights by name, a tokenizer in any form.

    Raises:
        ModelError: an index of weights that is no readable JSON.
    """
    names = [SINGLE_NAME]
    index = os.path.join(path, INDEX_NAME)
    if os.path.isfile(index):
        files = read_json(index).get("weight_map")
        names = list(files.values()) if isinstance(files, dict) else []
        names = sorted({name for name in names if is_plain_name(name)}) or [SINGLE_NAME]
    missing = [name for name in names if not os.path.isfile(os.path.join(path, name))]
    if not any(os.path.isfile(os.path.join(path, name)) for name in _TOKENIZERS):
        missing.append(_TOKENIZERS[0])
    return missing


def _is_piece(entry: Any) -> bool:
    return isinstance(entry, list) and bool(entry) and isinstance(entry[0], str)


def _code_files(path: str, config: dict[str, Any]) -> tuple[str, ...]:
    """List Python files in the folder, and `auto_map` where the config asks for code."""
    names = sorted(name for name in os.listdir(path) if name.endswith(".py"))
    return (*(["auto_map"] if "auto_map" in config else []), *names)


def is_plain_name(name: Any) -> bool:
    """Return whether `name` is a file name without folders, control characters or leading dot."""
    return (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not name.startswith(".")
        and not any(letter in name for letter in "/\\:")
    )


def model_file(folder: Path, name: str) -> Path:
    """Return `folder/name`, for reading.

    Raises:
        ModelError: it is missing, no regular file, or a link that leads out of the model's folder.
    """
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{path}: not found, or not a file; copy the model folder again")
    if path.is_symlink():
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in _roots(folder.resolve())):
            raise ModelError(
                f"{path}: a link that leads out of the folder, to {target}; put the file "
                "itself there"
            )
    return path


def _roots(folder: Path) -> list[Path]:
    """Return where links of a model folder may lead: into it, or to the blobs of its hub cache."""
    snapshots = folder.parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return [folder, snapshots.parent / "blobs"]
    return [folder]


def refuse_code(folder: Path) -> None:
    """Raise ModelError for Python files, and for configs that ask for code."""
    for path in sorted(folder.rglob("*.py")):
        raise ModelError(
            f"{path}: code in a model folder is never run; remove it or convert without"
        )
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith("config.json") and "auto_map" in read_json(
            model_file(folder, path.name)
        ):
            raise ModelError(
                f"{path}: auto_map asks for code, which is never run; use a model that "
                "transformers has built in"
            )


def carried_files(folder: Path) -> list[str]:
    """List config, tokenizer, generation config, templates and licence, checked for links."""
    names = []
    for path in sorted(folder.iterdir()):
        is_text = path.name.endswith(_CARRIED_SUFFIXES) or path.name in _CARRIED_NAMES
        is_index = path.name.endswith(".index.json") or path.name in _NOT_CARRIED
        if path.name == _INNER_FOLDER and path.is_dir() and not path.is_symlink():
            inner = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".jinja")
            names += [f"{_INNER_FOLDER}/{name}" for name in inner]
        elif is_text and not is_index and is_plain_name(path.name):
            names.append(path.name)
    for name in names:
        model_file(folder, name)
    return names


def largest_token_id(folder: Path) -> int:
    """Return the largest id in tokenizer.json, added tokens included; -1 without one."""
    vocabulary = tokenizer_vocabulary(str(folder / "tokenizer.json"))
    return max((vocabulary or {}).values(), default=-1)


def fingerprint(folder: Path) -> str:
    """Hash a model folder: config, and size, beginning, middle and end of each weights file."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with open(path, "rb") as file:
            for start in (0, size // 2, max(size - _SAMPLE_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
