"""Paths in a configuration: local by their first characters, or a hub id `org/name`.

A path that begins with `/`, `./`, `../` or `~` must exist. Anything else must look like a hub id,
and is refused when a folder of that name lies in the current folder: a forgotten `./` would
otherwise become a download.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from megatron_vopd.config.schema import Config
from megatron_vopd.errors import Problem, shown
from megatron_vopd.types import is_local_path

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_FOLDER_NAMES = re.compile(
    "(model|checkpoint|ckpt|weight|data|dataset|run|output)s?|tmp", re.IGNORECASE
)


def _path_problem(key: str, text: str) -> Problem | None:
    """Return a problem unless `text` is an existing path or looks like a hub id org/name."""
    if is_local_path(text):
        if os.path.exists(text):
            return None
        return Problem(
            key, shown(text), "an existing path", "check the spelling and current folder"
        )
    expected = "a path that begins with / or ./, or a hub id org/name"
    first = text.split("/")[0]
    if os.path.exists(text) or (os.path.isdir(first) and first != text):
        return Problem(key, shown(text), expected, f"for the local path write ./{text}")
    if not _HUB_ID.fullmatch(text) or _FOLDER_NAMES.fullmatch(first):
        return Problem(key, shown(text), expected, f"write ./{text} if it is a local path")
    return None


def path_problems(config: Config) -> Iterator[Problem]:
    """Yield a problem for each path of `config` that does not exist and each malformed hub id."""
    data = config.data
    paths = {"student.path": config.student.path, "data.train": data.train}
    paths["data.responses"] = data.responses
    paths |= {f"{key}.path": teacher.path for key, teacher in config.named_teachers.items()}
    if isinstance(data.evaluation, dict):
        paths |= {f"data.evaluation.{task}": path for task, path in data.evaluation.items()}
    else:
        paths["data.evaluation"] = data.evaluation
    for key, path in paths.items():
        problem = _path_problem(key, path) if path is not None else None
        if problem is not None:
            yield problem
    template = config.student.chat_template
    if template not in ("tokenizer", "none") and not os.path.isfile(template):
        yield Problem(
            "student.chat_template",
            shown(template),
            "tokenizer, none, or the path of an existing Jinja file",
            "set student.chat_template=tokenizer",
        )
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and not os.path.isdir(resume):
        yield Problem(
            "checkpoint.resume",
            shown(resume),
            "auto, never, or an existing checkpoint folder",
            "set checkpoint.resume=auto",
        )
