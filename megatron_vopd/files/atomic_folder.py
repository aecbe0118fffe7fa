"""Folders that appear whole or not at all.

A folder is written beside its final place as `NAME.tmp-*`. Every file is flushed to the disk, its
size and sha256 are recorded; then `manifest.json` lists them, and one rename makes the folder
visible. Whoever is killed on the way leaves a temporary folder, which the next writer of the same
name removes: a lock on the folder tells a dead writer from one that still runs.

`verify_manifest` reads such a folder back and names the file that is not what was written.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vopd.errors import shown
from megatron_vopd.files.atomic_file import PublishError, naming, regular_size, sync_folder

MANIFEST_NAME = "manifest.json"
FORMAT = 1
_LARGE = 2**18
_READ = 2**20
_WRITTEN = 2**25
_UNDER_WAY = 2**27
_LIBC = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2
_MAX_MANIFEST_BYTES = 2**28


@dataclass(frozen=True)
class FileRecord:
    """One published file: name below the folder, size in bytes, sha256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass
class _Piece:
    """What is being written and hashed, and what keeps its memory alive meanwhile."""

    size: int
    futures: tuple[Future[None], Future[None]]
    owner: Any = None


class OutputFile:
    """A new file, written and hashed by two threads beside the caller; on a clean exit on the disk.

    Pieces are under way while the caller prepares the next ones: one of any size, or several small
    ones.
    """

    def __init__(self, staging: Staging, name: str) -> None:
        self.name = name
        self.size = 0
        self._staging = staging
        self._path = staging.path / name
        self._hash = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with naming(self._path):
            self._fd = os.open(self._path, flags, 0o644)
        self._threads = (ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        self._small = bytearray()
        self._under_way: deque[_Piece] = deque()
        self._lacks_owner = False
        self._written = 0

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._submit_small()
                self._settle(0)
                with naming(self._path):
                    os.fsync(self._fd)
        finally:
            for thread in self._threads:
                thread.shutdown(cancel_futures=True)
            os.close(self._fd)
        if kind is None:
            record = FileRecord(self.name, self.size, self._hash.hexdigest())
            self._staging.records.append(record)

    def write(self, data: Any) -> int:
        """Append bytes, or anything that exposes its bytes in one piece and does not change."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if len(view) < _LARGE:
            self._small += view
            if len(self._small) >= _LARGE:
                self._submit_small()
        else:
            self._submit_small()
            self._submit(view)
            self._lacks_owner = True
        return len(view)

    def hold(self, owner: Any) -> None:
        """Keep the owner of what was just written alive until that has left its memory."""
        if self._lacks_owner:
            self._under_way[-1].owner, self._lacks_owner = owner, False

    def flush(self) -> None:
        """Nothing: the exit flushes. Writers of archives call it after each one."""

    def _submit_small(self) -> None:
        if self._small:
            self._submit(memoryview(bytes(self._small)))
            self._small.clear()

    def _submit(self, view: memoryview) -> None:
        self._settle(max(0, _UNDER_WAY - len(view)))
        writing, hashing = self._threads
        futures = (writing.submit(self._write_all, view), hashing.submit(self._hash.update, view))
        self._under_way.append(_Piece(len(view), futures))

    def _settle(self, num_bytes: int) -> None:
        """Wait until at most `num_bytes` are under way; raise what went wrong with the others."""
        while sum(piece.size for piece in self._under_way) > num_bytes:
            piece = self._under_way.popleft()
            wait(piece.futures)
            for future in piece.futures:
                future.result()

    def _write_all(self, view: memoryview) -> None:
        while view:
            outcome = f"{self._written:,} bytes of it were written, and nothing was published"
            with naming(self._path, f"{outcome}; make room or choose another disk"):
                done = os.write(self._fd, view[:_WRITTEN])
            _start_writing_out(self._fd, self._written, done)
            self._written += done
            view = view[done:]


def _start_writing_out(descriptor: int, start: int, size: int) -> None:
    """Let Linux write these bytes to the disk meanwhile: the flush at the end waits less."""
    begin = getattr(_LIBC, "sync_file_range", None)
    if begin is not None:
        begin(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


class Staging:
    """The temporary folder of one destination. Rank 0 begins and publishes, others attach."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[FileRecord] = []

    def create(self, name: str) -> OutputFile:
        """A new file below the folder; the folders of its name are made."""
        parents = list((self.path / name).relative_to(self.path).parents)[:-1]
        for parent in reversed(parents):
            if not (self.path / parent).is_dir():
                with naming(self.path / parent):
                    os.mkdir(self.path / parent)
        return OutputFile(self, name)

    def write(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(content)

    def publish(self, out_dir: Path, records: Sequence[FileRecord], info: dict[str, Any]) -> None:
        """Write the manifest over `records` of all ranks, then make the folder visible."""
        listed = sorted((asdict(record) for record in records), key=lambda entry: entry["name"])
        manifest = {"format": FORMAT, **info, "files": listed}
        self.write(MANIFEST_NAME, (json.dumps(manifest, indent=1) + "\n").encode("ascii"))
        for folder in [*(path for path in self.path.rglob("*") if path.is_dir()), self.path]:
            sync_folder(folder)
        if os.path.lexists(out_dir):
            raise PublishError(f"{out_dir}: appeared meanwhile; choose a new folder")
        with naming(out_dir):
            os.rename(self.path, out_dir)
        sync_folder(
            out_dir.parent, f"{out_dir.name} is complete, but may not outlive a power failure"
        )


def check_destination(out_dir: Path, source: Path, required_bytes: int) -> None:
    """Refuse a destination that cannot take the result, before anything is written.

    Raises:
        PublishError: it exists, is or lies in the source, cannot be written, or is too full.
    """
    parent = out_dir.absolute().parent
    own, origin = os.path.realpath(out_dir), os.path.realpath(source)
    if own == origin:
        raise PublishError(f"{out_dir}: is the source folder itself; choose a new folder")
    if os.path.lexists(out_dir):
        raise PublishError(f"{out_dir}: exists already; choose a new folder or remove it")
    if Path(own).is_relative_to(origin):
        raise PublishError(f"{out_dir}: lies inside the source folder; choose another place")
    if not parent.is_dir():
        raise PublishError(f"{parent}: no such folder; make it first")
    status = os.statvfs(parent)
    if status.f_flag & os.ST_RDONLY or not os.access(parent, os.W_OK | os.X_OK):
        raise PublishError(f"{parent}: cannot be written; choose a folder that can be")
    free = status.f_bavail * status.f_frsize
    if free < required_bytes:
        raise PublishError(
            f"{parent}: {free:,} bytes free, {required_bytes:,} needed; make room or choose "
            "another disk"
        )


@contextlib.contextmanager
def staging_folder(out_dir: Path) -> Iterator[Staging]:
    """A locked temporary folder beside `out_dir`; gone again unless it was published."""
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
    """The manifest of a published folder, its file list checked; None where there is none."""
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise PublishError(f"{path}: not a manifest of ours; restore the folder")
    try:
        manifest = json.loads(path.read_bytes())
        its_format = manifest["format"]
        files = manifest["files"] if its_format == FORMAT else []
        listed = [FileRecord(entry["name"], entry["size"], entry["sha256"]) for entry in files]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PublishError(f"{path}: not a readable manifest; restore the folder") from None
    if its_format != FORMAT:
        raise PublishError(
            f"{path}: got format {shown(its_format)}, expected {FORMAT}: another version of "
            "megatron_vopd wrote it; use that one"
        )
    for record in listed:
        if not _is_inner_name(record.name):
            raise PublishError(f"{path}: lists {shown(record.name)}; expected names inside")
    manifest["files"] = listed
    return manifest


def verify_manifest(
    folder: Path, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Any] | None:
    """Compare every listed file with its size and sha256; returns the manifest, or None without.

    Raises:
        PublishError: the first file that is missing, a link, or not what was written.
    """
    manifest = verify_sizes(folder)
    if manifest:
        verify_hashes(folder, manifest["files"], advance)
    return manifest


def verify_sizes(folder: Path) -> dict[str, Any] | None:
    """The quick half of `verify_manifest`: every listed file is there and has its size."""
    manifest = read_manifest(folder)
    for record in manifest["files"] if manifest else []:
        path = folder / record.name
        size = regular_size(path)
        if size is None:
            raise PublishError(f"{path}: missing, but listed in {MANIFEST_NAME}; restore it")
        if size != record.size:
            raise PublishError(
                f"{path}: {size:,} bytes, {MANIFEST_NAME} says {record.size:,}; restore it"
            )
    return manifest


def verify_hashes(
    folder: Path, records: Sequence[FileRecord], advance: Callable[[int], None] = lambda _: None
) -> None:
    """The thorough half: every listed file has its sha256."""
    for record in records:
        path = folder / record.name
        if file_sha256(path, advance) != record.sha256:
            raise PublishError(f"{path}: content is not what {MANIFEST_NAME} says; restore it")


class HashCheck:
    """`verify_hashes` on a thread beside other work. A context manager; leaving it stops it."""

    def __init__(
        self, folder: Path, records: Sequence[FileRecord], advance: Callable[[int], None]
    ) -> None:
        self._stopped = False
        self._advance = advance
        self._thread = ThreadPoolExecutor(1)
        self._result = self._thread.submit(verify_hashes, folder, records, self._count)

    def __enter__(self) -> HashCheck:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped = True
        self._thread.shutdown()

    def _count(self, done: int) -> None:
        if self._stopped:
            raise InterruptedError
        self._advance(done)

    def require(self) -> None:
        """Wait for the end; raise PublishError for a file that is not what was written."""
        self._result.result()


def file_sha256(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    digest = hashlib.sha256()
    # One buffer for the whole file: fresh memory for each block would cost more than the hash.
    block = memoryview(bytearray(_READ))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            advance(size)
    return digest.hexdigest()


def _is_inner_name(name: Any) -> bool:
    """A relative path of at most three plain parts."""
    if not isinstance(name, str) or "\\" in name or not name.isprintable():
        return False
    parts = name.split("/")
    return len(parts) <= 3 and all(part not in ("", ".", "..") for part in parts)
