"""Which files of a model folder are read: inside it, no code, nothing pickled.

A model folder may come from anywhere. Files are opened by plain names only, and a link must stay in
the folder, or, in a hub cache (`models--*/snapshots/x`), in the blobs of the same model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vopd.model_facts import ModelError
from megatron_vopd.problems import shown

# Carried along by a conversion: text about the model. Weights, and anything else, are not.
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_CARRIED_NAMES = ("LICENSE", "NOTICE", "merges.txt", "vocab.txt")
_NOT_CARRIED = ("manifest.json", "common.json", "metadata.json")
_INNER_FOLDER = "additional_chat_templates"
_MAX_TEXT_BYTES = 2**28


def is_plain_name(name: Any) -> bool:
    """A file name without folders, control characters or anything that a path may do."""
    return (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not name.startswith(".")
        and not any(letter in name for letter in "/\\:")
    )


def model_file(folder: Path, name: str) -> Path:
    """`folder/name`, for reading.

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
    """Where links of a model folder may lead: into itself, or to the blobs of its hub cache."""
    snapshots = folder.parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return [folder, snapshots.parent / "blobs"]
    return [folder]


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for `json.loads`: an object that names a key twice is refused, by KeyError."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(f"{key} twice")
        result[key] = value
    return result


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size in which no key occurs twice."""
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise ModelError(f"{path}: more than {_MAX_TEXT_BYTES // 2**20} MiB; use the real file")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: no valid JSON; copy the model folder again") from None
    except KeyError as error:
        raise ModelError(f"{path}: {shown(error.args[0])}; copy the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: no JSON object; copy the model folder again")
    return value


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
    """Names of config, tokenizer, generation config, templates and licence, checked for links."""
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
    """The largest id in tokenizer.json, added tokens included; -1 without one."""
    from megatron_vopd.hf_folder import tokenizer_vocabulary

    vocabulary = tokenizer_vocabulary(str(folder / "tokenizer.json"))
    return max((vocabulary or {}).values(), default=-1)
