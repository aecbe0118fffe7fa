"""Folders that appear whole or not at all.

A folder is written beside its final place as `NAME.tmp-*`. Every file is flushed to the disk, its
size and hash are recorded; then `manifest.json` lists them, and one rename makes the folder
visible. Whoever is killed on the way leaves a temporary folder, which the next writer of the same
name removes: a lock on the folder tells a dead writer from one that still runs.

`verify_manifest` reads such a folder back and names the file that is not what was written. The hash
is xxh3 with 128 bits: it finds damage, which is what it is for, and is no signature. Manifests of
format 1 hold sha256, and are read as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import xxhash

from megatron_vopd.errors import shown
from megatron_vopd.files.atomic_file import (
    FileError,
    naming,
    regular_size,
    sync_folder,
    write_all,
)

MANIFEST_NAME = "manifest.json"
FORMAT = 2
HASH_NAME = "xxh3_128"
_HASH_OF_FORMAT = {1: "sha256", FORMAT: HASH_NAME}
_HASHES: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, HASH_NAME: xxhash.xxh3_128}
# Bytes that are hashed and written, or read and hashed, at a time: what a core's cache holds.
_PIECE = 2**20
_MAX_MANIFEST_BYTES = 2**28


@dataclass(frozen=True)
class FileRecord:
    """One published file: name below the folder, size in bytes, hash in hexadecimal, its kind."""

    name: str
    size: int
    digest: str
    hash_name: str = HASH_NAME


# Raises FileError for a file of the folder that has not the hash of its record.
CheckHashes = Callable[[Path, Sequence[FileRecord]], None]


class OutputFile:
    """A new file, hashed as it is written. A context manager: a clean exit flushes and records it.

    Small writes are gathered, as archives consist of many.
    """

    def __init__(self, staging: Staging, name: str) -> None:
        self.name = name
        self.size = 0
        self._staging = staging
        self._path = staging.path / name
        self._hash = _HASHES[HASH_NAME]()
        self._small = bytearray()
        self._written = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with naming(self._path):
            self._fd = os.open(self._path, flags, 0o644)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._write_small()
                with naming(self._path):
                    os.fsync(self._fd)
        finally:
            os.close(self._fd)
        if kind is None:
            record = FileRecord(self.name, self.size, self._hash.hexdigest())
            self._staging.records.append(record)

    def write(self, data: Any) -> int:
        """Append bytes, or anything that exposes its bytes in one piece."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if len(view) < _PIECE:
            self._small += view
            if len(self._small) >= _PIECE:
                self._write_small()
        else:
            self._write_small()
            for start in range(0, len(view), _PIECE):
                self._write_piece(view[start : start + _PIECE])
        return len(view)

    def flush(self) -> None:
        """Leave the flushing to the exit. Writers of archives call it after each one."""

    def _write_small(self) -> None:
        if self._small:
            self._write_piece(bytes(self._small))
            self._small.clear()

    def _write_piece(self, piece: memoryview | bytes) -> None:
        self._hash.update(piece)
        outcome = f"{self._written:,} bytes of it were written, and nothing was published"
        with naming(self._path, f"{outcome}; make room or choose another disk"):
            write_all(self._fd, piece)
        # Makes Linux begin to write these bytes out: the flush at the end waits less.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, self._written, len(piece), os.POSIX_FADV_DONTNEED)
        self._written += len(piece)


class Staging:
    """The temporary folder of one destination. Rank 0 begins and publishes, others attach."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[FileRecord] = []

    def create(self, name: str) -> OutputFile:
        """Open a new file below the folder; the folders of its name are made."""
        parents = list((self.path / name).relative_to(self.path).parents)[:-1]
        for parent in reversed(parents):
            if not (self.path / parent).is_dir():
                with naming(self.path / parent):
                    os.mkdir(self.path / parent)
        return OutputFile(self, name)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file at once."""
        with self.create(name) as file:
            file.write(content)

    def publish(self, out_dir: Path, records: Sequence[FileRecord], info: dict[str, Any]) -> None:
        """Write the manifest over `records` of all ranks, then make the folder visible."""
        listed = [
            {"name": record.name, "size": record.size, record.hash_name: record.digest}
            for record in sorted(records, key=lambda record: record.name)
        ]
        manifest = {"format": FORMAT, **info, "files": listed}
        self.write(MANIFEST_NAME, (json.dumps(manifest, indent=1) + "\n").encode("ascii"))
        for folder in [*(path for path in self.path.rglob("*") if path.is_dir()), self.path]:
            sync_folder(folder)
        if os.path.lexists(out_dir):
            raise FileError(f"{out_dir}: appeared meanwhile; choose a new folder")
        with naming(out_dir):
            os.rename(self.path, out_dir)
        sync_folder(
            out_dir.parent, f"{out_dir.name} is complete, but may not outlive a power failure"
        )


def check_destination(out_dir: Path, source: Path, required_bytes: int) -> None:
    """Refuse a destination that cannot take the result, before anything is written.

    Raises:
        FileError: it exists, is or lies in the source, cannot be written, or is too full.
    """
    parent = out_dir.absolute().parent
    own, origin = os.path.realpath(out_dir), os.path.realpath(source)
    if own == origin:
        raise FileError(f"{out_dir}: is the source folder itself; choose a new folder")
    if os.path.lexists(out_dir):
        raise FileError(f"{out_dir}: exists already; choose a new folder or remove it")
    if Path(own).is_relative_to(origin):
        raise FileError(f"{out_dir}: lies inside the source folder; choose another place")
    if not parent.is_dir():
        raise FileError(f"{parent}: no such folder; make it first")
    status = os.statvfs(parent)
    if status.f_flag & os.ST_RDONLY or not os.access(parent, os.W_OK | os.X_OK):
        raise FileError(f"{parent}: cannot be written; choose a folder that can be")
    free = status.f_bavail * status.f_frsize
    if free < required_bytes:
        raise FileError(
            f"{parent}: {free:,} bytes free, {required_bytes:,} needed; make room or choose "
            "another disk"
        )


@contextlib.contextmanager
def staging_folder(out_dir: Path) -> Iterator[Staging]:
    """Make a locked temporary folder beside `out_dir`; it is gone again unless it was published."""
    remove_leftovers(out_dir)
    path = out_dir.absolute().parent / f"{out_dir.name}.tmp-{secrets.token_hex(6)}"
    with naming(path):
        os.mkdir(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield Staging(path)
    finally:
        os.close(descriptor)
        if path.is_dir():
            shutil.rmtree(path)


def remove_leftovers(out_dir: Path) -> None:
    """Remove temporary folders of the same destination whose writers have ended."""
    for path in out_dir.absolute().parent.glob(f"{out_dir.name}.tmp-*"):
        if path.is_symlink() or not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
        shutil.rmtree(path)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a published folder, its file list checked; None where there is none."""
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise FileError(f"{path}: not a manifest of ours; restore the folder")
    try:
        manifest = json.loads(path.read_bytes())
        its_format = manifest["format"]
        hash_name = _HASH_OF_FORMAT.get(its_format, "")
        files = manifest["files"] if hash_name else []
        listed = [FileRecord(f["name"], index(f["size"]), f[hash_name], hash_name) for f in files]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileError(f"{path}: not a readable manifest; restore the folder") from None
    if not hash_name:
        raise FileError(
            f"{path}: got format {shown(its_format)}, expected {FORMAT}: another version of "
            "megatron_vopd wrote it; use that one"
        )
    for record in listed:
        if not _is_inner_name(record.name):
            raise FileError(f"{path}: lists {shown(record.name)}; expected names inside")
    manifest["files"] = listed
    return manifest


def verify_manifest(folder: Path, check: CheckHashes | None = None) -> dict[str, Any] | None:
    """Compare every listed file with its size and hash; returns the manifest, or None without.

    Args:
        check: checks the hashes; None: `verify_hashes`, here.

    Raises:
        FileError: the first file that is missing, a link, or not what was written.
    """
    manifest = verify_sizes(folder)
    if manifest:
        (check or verify_hashes)(folder, manifest["files"])
    return manifest


def verify_sizes(folder: Path) -> dict[str, Any] | None:
    """Check the quick half of `verify_manifest`: every listed file is there and has its size."""
    manifest = read_manifest(folder)
    for record in manifest["files"] if manifest else []:
        path = folder / record.name
        size = regular_size(path)
        if size is None:
            raise FileError(f"{path}: missing, but listed in {MANIFEST_NAME}; restore it")
        if size != record.size:
            raise FileError(
                f"{path}: {size:,} bytes, {MANIFEST_NAME} says {record.size:,}; restore it"
            )
    return manifest


def verify_hashes(
    folder: Path, records: Sequence[FileRecord], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Check the thorough half: every one of these files has its hash.

    Args:
        advance: takes the number of bytes read, piece by piece.
    """
    for record in records:
        path = folder / record.name
        if _file_digest(path, record.hash_name, advance) != record.digest:
            raise FileError(f"{path}: content is not what {MANIFEST_NAME} says; restore it")


def _file_digest(path: Path, hash_name: str, advance: Callable[[int], None]) -> str:
    digest = _HASHES[hash_name]()
    # One buffer for the whole file: fresh memory for each block would cost more than the hash.
    block = memoryview(bytearray(_PIECE))
    with naming(path, "restore it"), open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            advance(size)
    return digest.hexdigest()


def _is_inner_name(name: Any) -> bool:
    """Return whether `name` is a relative path of at most three plain parts."""
    if not isinstance(name, str) or "\\" in name or not name.isprintable():
        return False
    parts = name.split("/")
    return len(parts) <= 3 and all(part not in ("", ".", "..") for part in parts)
