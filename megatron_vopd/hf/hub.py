"""Models by hub id: the folder in the local hub cache, downloaded first where it is not there.

Only files that a model needs are fetched: no Python, nothing pickled. `HF_HUB_OFFLINE=1` keeps to
what the cache has. Ranks of one machine may call at once: the hub client locks each file.
"""

from __future__ import annotations

import os

from megatron_vopd.errors import Problem, UserError, shown
from megatron_vopd.types import is_local_path

_ABOUT = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE", "NOTICE"]
_WEIGHTS = ["*.safetensors"]


def local_model_folder(path: str, key: str, weights: bool = True) -> str:
    """Return `path` itself when it is local, else the folder of the hub id.

    Args:
        key: the setting that holds `path`, for messages.
        weights: False leaves the weights out (config, tokenizer, templates only).

    Raises:
        UserError: the hub, or the cache when offline, does not give it.
    """
    if is_local_path(path):
        return os.path.expanduser(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return snapshot_download(path, allow_patterns=_ABOUT + (_WEIGHTS if weights else []))
    except (OSError, HFValidationError) as error:
        problem = Problem(
            key,
            f"{shown(path)} ({shown(str(error))})",
            "a model that the hub has, and a connection to it",
            "check the id, or download it and give its folder as ./path",
        )
        raise UserError(str(problem)) from None
