"""Models by hub id: their folders in the local hub cache, downloaded first where they are missing.

Only files that a model needs are fetched: no Python, nothing pickled. Under `HF_HUB_OFFLINE=1`
nothing is downloaded. Of the ranks of a node one downloads, then the others look (`cached`).
"""

from __future__ import annotations

import os

from megatron_vopd.errors import Problem, UserError, shown
from megatron_vopd.types import is_local_path

_ABOUT = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE", "NOTICE"]
_WEIGHTS = ["*.safetensors"]


def local_model_folder(path: str, key: str, weights: bool = True, cached: bool = False) -> str:
    """Return the folder of a model: `path` itself if it is local, else that of the hub id.

    Args:
        path: local path (`~` is expanded) or hub id.
        key: the setting that holds `path`, for messages.
        cached: look into the local cache alone, without asking the hub.
        weights: False leaves the weights out (config, tokenizer, templates only).

    Raises:
        UserError: the hub, or the cache when offline, does not have it.
    """
    if is_local_path(path):
        return os.path.expanduser(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = _ABOUT + (_WEIGHTS if weights else [])
        return snapshot_download(path, allow_patterns=patterns, local_files_only=cached)
    except (OSError, HFValidationError) as error:
        problem = Problem(
            key,
            f"{shown(path)} ({shown(str(error))})",
            "a model that the hub has, and a connection to it",
            "check the id, or download it and give its folder as ./path",
        )
        raise UserError(str(problem)) from None
