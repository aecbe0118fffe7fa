"""The models of a run: hub ids resolved and folders read, once for all of the package.

Config, tokenizer and templates are fetched first; weights follow when the data has been read,
because they take longest.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vopd.errors import refusal, shown
from megatron_vopd.hf.facts import ModelError
from megatron_vopd.hf.folder import ModelFolder, read_model_folder
from megatron_vopd.hf.hub import local_model_folder


def read_models(
    paths: Mapping[str, str],
    known: Mapping[str, ModelFolder] | None = None,
    cached: bool = False,
) -> dict[str, ModelFolder]:
    """Resolve every model's path or hub id, and read the folder's config and tokenizer.

    Args:
        paths: key of the model (`student`, `teacher`, `teachers.<name>`) -> path or hub id.
        known: models that were read before, by key; they are not read again.
        cached: ask no hub: everything is in this node's cache, where another rank left it.

    Returns:
        Models by key, in the order of `paths`; `path` of each is a local folder.

    Raises:
        UserError: naming the setting `<key>.path`: the hub does not have it, or the folder is no
            supported model.
    """
    return {key: (known or {}).get(key) or _read(key, path, cached) for key, path in paths.items()}


def _read(key: str, path: str, cached: bool) -> ModelFolder:
    folder = local_model_folder(path, f"{key}.path", weights=False, cached=cached)
    try:
        return read_model_folder(folder)
    except ModelError as error:
        expected = "a supported model folder"
        raise refusal(f"{key}.path", shown(path), expected, str(error)) from None


def fetch_weights(
    paths: Mapping[str, str], models: Mapping[str, ModelFolder], cached: bool = False
) -> None:
    """Download the weights of the models that are hub ids; local folders are left as they are.

    Args:
        paths: key of the model -> path or hub id, as given to `read_models`.
        models: result of `read_models`.
        cached: as in `read_models`.

    Raises:
        UserError: the hub does not have them, or its model has changed since it was read.
    """
    for key, path in paths.items():
        folder = local_model_folder(path, f"{key}.path", cached=cached)
        if folder != models[key].path:
            got, expected = f"{folder} for {shown(path)}", f"{models[key].path}, which was read"
            remedy = "the model changed on the hub meanwhile: start again"
            raise refusal(f"{key}.path", got, expected, remedy)
