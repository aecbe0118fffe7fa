"""The models of a run: hub ids resolved, folders read, once for everybody who asks.

Config, tokenizer and templates come first; weights are fetched when the data has been read, because
they take longest.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vopd.errors import refusal, shown
from megatron_vopd.hf.facts import ModelError
from megatron_vopd.hf.folder import ModelFolder, read_model_folder
from megatron_vopd.hf.hub import local_model_folder


def read_models(
    paths: Mapping[str, str], known: Mapping[str, ModelFolder] | None = None
) -> dict[str, ModelFolder]:
    """Resolve every model's path or hub id and read what its folder says of itself.

    Args:
        paths: key of the model (`student`, `teacher`, `teachers.<name>`) -> path or hub id.
        known: models that were read already; they are not read again.

    Returns:
        Models by key, in the order of `paths`; `path` of each is a local folder.

    Raises:
        UserError: naming the setting `<key>.path`: the hub does not give it, or it is no model.
    """
    return {key: (known or {}).get(key) or _read(key, path) for key, path in paths.items()}


def _read(key: str, path: str) -> ModelFolder:
    folder = local_model_folder(path, f"{key}.path", weights=False)
    try:
        return read_model_folder(folder)
    except ModelError as error:
        expected = "a supported model folder"
        raise refusal(f"{key}.path", shown(path), expected, str(error)) from None


def fetch_weights(paths: Mapping[str, str], models: Mapping[str, ModelFolder]) -> None:
    """Download the weights of the models that are hub ids; local folders are left as they are.

    Raises:
        UserError: the hub does not give them, or its model has changed since it was read.
    """
    for key, path in paths.items():
        folder = local_model_folder(path, f"{key}.path")
        if folder != models[key].path:
            got, expected = f"{folder} for {shown(path)}", f"{models[key].path}, which was read"
            remedy = "the model changed on the hub meanwhile: start again"
            raise refusal(f"{key}.path", got, expected, remedy)
