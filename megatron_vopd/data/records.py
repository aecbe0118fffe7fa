"""Records of a data set, each with a name that says where it stands: `train.jsonl:17`.

A .jsonl file is read here, line by line, so that a mistake has its line and no value is guessed
into another type. Everything else goes through `datasets`: .parquet, folders that `save_to_disk`
wrote, folders of files with their splits, and hub ids. No code of a data set is ever run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vopd.errors import Problem, UserError, shown
from megatron_vopd.types import is_local_path

TRAINING_SPLITS = ("train",)
EVALUATION_SPLITS = ("test", "validation", "train")
_CODE_OF_A_DATA_SET = ("*.py", "*.pkl", "*.pickle", "*.pt", "*.bin")


class DataError(UserError):
    """A data set that cannot be used: file, line or field, what was got, and the remedy."""

    def __init__(self, where: str, got: str, expected: str, remedy: str) -> None:
        self.problem = Problem(where, got, expected, remedy)
        super().__init__(str(self.problem))


@dataclass(frozen=True)
class Record:
    """One record; `name` is its file (relative to the data set) and 1-based line or row."""

    name: str
    fields: dict[str, Any]


def read_records(path: str, key: str, splits: Sequence[str] = TRAINING_SPLITS) -> Iterator[Record]:
    """The records of a .jsonl or .parquet file, a folder, or a hub id, in their stored order.

    Args:
        key: the setting that holds `path`, for messages.
        splits: the first of these that the data set has is read (a lone split has no choice).

    Raises:
        DataError: naming the file and line, on iteration too.
    """
    if not is_local_path(path):
        return _read_folder(_downloaded(path, key), path.split("/")[-1], key, splits)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _read_folder(Path(path), Path(path).resolve().name, key, splits)
    if not os.path.isfile(path):
        raise DataError(key, shown(path), "an existing file or folder", "check the spelling")
    if path.endswith(".jsonl"):
        return _read_jsonl(Path(path), Path(path).name)
    if path.endswith(".parquet"):
        return _read_parquet(Path(path), key)
    raise DataError(
        key, shown(path), "a .jsonl or .parquet file, or a folder", "convert it to .jsonl"
    )


def _read_jsonl(path: Path, name: str) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\u" in line:
                    # Halves of surrogate pairs can be escaped, and are no text.
                    json.dumps(value, ensure_ascii=False).encode()
            except json.JSONDecodeError as error:
                got = f"{error.msg} at column {error.colno}"
                raise _bad_line(where, got) from None
            except (ValueError, RecursionError):
                raise _bad_line(where, "text that is not readable") from None
            if not isinstance(value, dict):
                raise DataError(
                    where, shown(value), "a JSON object", 'write {"prompt": ...} on each line'
                )
            yield Record(where, value)


def _bad_line(where: str, got: str) -> DataError:
    return DataError(where, got, "one JSON object a line, in UTF-8", "correct this line")


def _read_parquet(path: Path, key: str) -> Iterator[Record]:
    return _rows(lambda: _streamed("parquet", "train", data_files=str(path)), path.name, key)


def _streamed(source: str, split: str, **options: Any) -> Any:
    """Rows read from the files themselves: nothing is copied into a cache of the user's."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(
            source, split=split, streaming=True, cache_dir=cache, **options
        )


def _rows(load: Any, name: str, key: str) -> Iterator[Record]:
    """The rows of `load()`, a data set of `datasets`; its errors become one line."""
    from datasets.exceptions import DatasetsError
    from pyarrow.lib import ArrowException

    number = 0
    try:
        for fields in load():
            number += 1
            yield Record(f"{name}:{number}", dict(fields))
    except (OSError, ValueError, ArrowException, DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        got = f"{shown(str(error))} after row {number} of {name}"
        raise DataError(key, got, "readable data", "check the files, or save them again") from None


def _read_folder(folder: Path, name: str, key: str, splits: Sequence[str]) -> Iterator[Record]:
    import datasets

    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        split = _chosen(names, splits, key)
        return _rows(lambda: datasets.load_from_disk(str(folder / split)), f"{name}/{split}", key)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _rows(lambda: datasets.load_from_disk(str(folder)), name, key)
    files = _files_by_split(folder, key)
    split = _chosen(list(files), splits, key)
    if all(str(file).endswith(".jsonl") for file in files[split]):
        return _read_several(folder, files[split])

    return _rows(lambda: _streamed(str(folder), split), f"{name}/{split}", key)


def _read_several(folder: Path, files: Sequence[str]) -> Iterator[Record]:
    for file in files:
        relative = os.path.relpath(file, folder)
        yield from _read_jsonl(Path(file), relative)


def _files_by_split(folder: Path, key: str) -> dict[str, list[str]]:
    """Split -> its files, by the naming rules of `datasets` and the folder's README."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(str(folder), cache_dir=cache)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            key,
            shown(str(error)),
            "a folder with .jsonl or .parquet files",
            "give one of its files, or a folder that holds one data set",
        ) from None
    root = str(folder.resolve()) + os.sep
    result: dict[str, list[str]] = {}
    for split, files in (builder.config.data_files or {}).items():
        for file in files:
            absolute = os.path.abspath(file) if os.path.exists(file) else str(file)
            if not absolute.startswith((root, str(folder.absolute()) + os.sep)):
                raise DataError(
                    key, shown(file), f"files inside {folder}", "copy the file into the folder"
                )
        result[str(split)] = [str(file) for file in files]
    return result


def _chosen(names: Sequence[str], splits: Sequence[str], key: str) -> str:
    for split in splits:
        if split in names:
            return split
    if len(names) == 1:
        return names[0]
    got = f"the splits {', '.join(sorted(names))}" if names else "no data files"
    raise DataError(key, got, f"a split named {splits[0]}", "give the file of one split")


def _downloaded(hub_id: str, key: str) -> Path:
    """The data set `org/name` in the local hub cache, downloaded unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            hub_id, repo_type="dataset", ignore_patterns=list(_CODE_OF_A_DATA_SET)
        )
    except (OSError, HFValidationError) as error:
        raise DataError(
            key,
            f"{shown(hub_id)} ({shown(str(error))})",
            "a data set that the hub has, and a connection to it",
            "check the id, or download it and give its folder as ./path",
        ) from None
    return Path(folder)


Conversation = str | list[dict[str, Any]]


def conversation_of(record: Record, field: str) -> Conversation:
    """The prompt: text, or chat messages with role and content; raises DataError."""
    where = f"{record.name} {field}"
    value = record.fields.get(field)
    if value is None:
        known = ", ".join(shown(name)[1:-1] for name in list(record.fields)[:10])
        raise DataError(
            where,
            f"no such field (there are: {known})",
            "text or a list of chat messages",
            "add it, or set data.prompt_field to one of these",
        )
    if isinstance(value, str):
        if not value.strip():
            raise DataError(where, "blank text", "a prompt", "remove the record")
        return value
    return [_message(message, where) for message in _messages(value, where)]


def _messages(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(
            where,
            shown(value),
            "text or a list of chat messages",
            'write text, or [{"role": "user", "content": "..."}]',
        )
    last = value[-1]
    if isinstance(last, dict) and last.get("role") == "assistant":
        raise DataError(
            where,
            "a chat that ends with the assistant",
            "one that ends before the response",
            "remove the last message; ready responses belong in data.responses",
        )
    return value


def _message(message: Any, where: str) -> dict[str, Any]:
    texts = isinstance(message, dict) and all(
        isinstance(message.get(part), str) for part in ("role", "content")
    )
    if not texts:
        raise DataError(
            where, shown(message), "messages with role and content as text", "correct the record"
        )
    # Tables fill a field that only some messages have with nulls.
    return {name: value for name, value in message.items() if value is not None}


def answer_of(record: Record, field: str, needed: bool) -> str | None:
    """The reference answer; None when nothing needs it and the field holds none.

    Raises:
        DataError: it is needed, and missing, blank, or neither text nor a number.
    """
    value = record.fields.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.strip():
        return value
    if not needed:
        return None
    where = f"{record.name} {field}"
    if value is None:
        remedy = "add it, or set data.answer_field"
        raise DataError(where, "no such field", "the reference answer", remedy)
    expected = "the reference answer as text or a number"
    raise DataError(where, shown(value), expected, "correct the record")


def teacher_of(record: Record, field: str | None, keys: Sequence[str]) -> str:
    """Return the key of the teacher that scores the record.

    Args:
        field: `data.teacher_field`, which names the teacher where there are several.
        keys: of the configured teachers.

    Raises:
        DataError: an unknown name.
    """
    if len(keys) < 2 or field is None:
        return keys[0] if keys else "teacher"
    name = record.fields.get(field)
    if f"teachers.{name}" not in keys:
        names = ", ".join(key.removeprefix("teachers.") for key in keys)
        where = f"{record.name} {field}"
        raise DataError(where, shown(name), f"one of {names}", "correct it, or add the teacher")
    return f"teachers.{name}"
