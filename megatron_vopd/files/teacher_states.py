"""A frozen teacher's hidden states of given responses, kept on disk between epochs and runs.

A folder belongs to one teacher in one type:

    cache.json             whose states these are; name -> digest of every text they belong to
    states-*.safetensors   what one rank computed in one step: key -> [T, D], mapped, never copied;
                           its metadata has a hash of every tensor

The key is a digest of the token ids of prompt and response, so that states are never taken for
another text. Names are there to tell the user which text changed. Files are written beside their
place and renamed, so any number of ranks and runs may write; a file is checked against its size
when it is found, and a tensor against its hash when it is read.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_vopd.errors import ConfigError, refusal, shown
from megatron_vopd.files.atomic_file import replace, replacing

FORMAT = "1"
INFO_NAME = "cache.json"
_SETTING = "teacher.cache_dir"
# A writer takes seconds; what is older was left by one that was killed.
_TEMPORARY, _STALE_SECONDS = ".tmp-", 86400.0


class StateCache:
    """One teacher's cache, as this rank sees it.

    Args:
        folder: made when absent.
        identity: whose states these are, by names that mean something to the user.
        hidden_size, dtype: of the states.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, str], hidden_size: int, dtype: torch.dtype
    ) -> None:
        self.folder, self.dtype, self.hidden_size = folder, dtype, hidden_size
        self._identity = {"format": FORMAT, **identity, "hidden size": str(hidden_size)}
        self._identity["type"] = str(dtype).removeprefix("torch.")
        self._files: set[str] = set()
        self._place: dict[str, str] = {}

    def prepare(self, texts: Mapping[str, str]) -> None:
        """Claim the folder, or find that it is of the same teacher and texts. By one rank.

        Args:
            texts: `text_name` -> `text_digest` of every given response; others that the folder
                knows stay.

        Raises:
            ConfigError: another teacher, a text that changed, a folder of something else.
        """
        info = self.folder / INFO_NAME
        with self._naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            found = os.listdir(self.folder)
        known: dict[str, str] = {}
        if INFO_NAME in found:
            known = self._known(info)
        elif any(_TEMPORARY not in name for name in found):
            got = f"{self.folder}, which holds {shown(sorted(found)[0])} and no {INFO_NAME}"
            raise refusal(_SETTING, got, "an empty folder, or a cache", "give an empty folder")
        for name, digest in texts.items():
            if known.get(name, digest) != digest:
                raise refusal(
                    "data.responses",
                    f"{name} with another text than {self.folder} has states of",
                    "the same prompt and response",
                    f"restore it, or give another {_SETTING}",
                )
        self._remove_stale(found)
        if INFO_NAME not in found or not texts.keys() <= known.keys():
            content = {"identity": self._identity, "texts": known | dict(texts)}
            replace(info, json.dumps(content) + "\n")

    def _known(self, info: Path) -> dict[str, str]:
        try:
            content = json.loads(info.read_bytes())
            identity, texts = dict(content["identity"]), dict(content["texts"])
        except (OSError, ValueError, KeyError, TypeError):
            remedy = f"remove the folder, or give another {_SETTING}"
            raise refusal(_SETTING, f"{info}, which is torn", "a whole file", remedy) from None
        for key, value in self._identity.items():
            if identity.get(key) != value:
                before = shown(identity.get(key))
                got = f"{self.folder}, which holds states of another {key} ({before})"
                raise refusal(_SETTING, got, shown(value), "give another folder, or empty it")
        return texts

    def _remove_stale(self, names: list[str]) -> None:
        for name in names:
            path = self.folder / name
            with suppress(OSError):
                if _TEMPORARY in name and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def scan(self) -> None:
        """Look for files that were not there before.

        Raises:
            ConfigError: a torn file.
        """
        with self._naming(self.folder):
            names = sorted(os.listdir(self.folder))
        for name in names:
            if name.endswith(".safetensors") and name not in self._files:
                with self._opened(name) as file:
                    keys = list(file.keys())
                self._files.add(name)
                for key in keys:
                    self._place.setdefault(key, name)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def read(self, key: str) -> Tensor:
        """Map the states [T, D] of a key from their file, on the host.

        Raises:
            ConfigError: they are not what was written.
        """
        name = self._place[key]
        with self._opened(name) as file:
            states, expected = file.get_tensor(key), (file.metadata() or {}).get(key)
        fits = states.dtype == self.dtype and states.shape[1:] == (self.hidden_size,)
        if not fits or _content_hash(states) != expected:
            raise self._torn(name, "its content is not what was written")
        return states

    def write(self, states: Mapping[str, Tensor]) -> None:
        """Keep the states [T, D] of these keys; they are on the disk when this returns.

        Raises:
            UserError: they cannot be written.
        """
        if not states:
            return
        held = {key: value.detach().cpu().clone() for key, value in states.items()}
        hashes = {key: _content_hash(value) for key, value in held.items()}
        path = self.folder / f"states-{secrets.token_hex(8)}.safetensors"
        with self._naming(path), replacing(path) as part:
            save_file(held, part, metadata=hashes)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise self._torn(name, str(error)) from None

    def _torn(self, name: str, why: str) -> ConfigError:
        got = f"{self.folder / name}, which is torn ({shown(why)})"
        remedy = "remove it: its states will be computed again"
        return refusal(_SETTING, got, "a whole file", remedy)

    @contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            got = f"{path} ({shown(reason)})"
            raise refusal(_SETTING, got, "a folder that can be written", "see to it") from None


def _content_hash(states: Tensor) -> str:
    flat = states.contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(flat.numpy().data)
