"""The start of a run on disk: what it goes on from, its folder, its configuration in it.

Nothing in the folder of an earlier run changes before that run's checkpoint was loaded: a start
that is refused loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vopd.config import Config
from megatron_vopd.config.table import resolved_yaml
from megatron_vopd.hub import local_model_folder
from megatron_vopd.model_facts import ModelFacts
from megatron_vopd.parallel import in_step, in_step_all
from megatron_vopd.problems import ConfigError, Problem
from megatron_vopd.publish_together import on_rank_0
from megatron_vopd.random_state import seed_random_states
from megatron_vopd.run_checkpoint import choose_resume
from megatron_vopd.run_folder import STATUS_NAME
from megatron_vopd.run_identity import identity
from megatron_vopd.run_resume import Resume

_HEADER = "# The resolved configuration of a run of megatron_vopd.train.\n"


def begin(run_dir: Path, config: Config) -> Resume:
    """Choose what to go on from, make the folder, seed. Every rank of the world calls it.

    Raises:
        UserError: on every rank: nothing to go on from where there should be, another run's
            folder, or one that cannot be written.
    """
    in_step(lambda: _require_vllm(config))
    in_step(lambda: on_rank_0(lambda: _make_folder(run_dir)))
    resume = choose_resume(run_dir, config.checkpoint.resume)
    # How an earlier process ended; should this one be killed, there must be no status.
    in_step(lambda: on_rank_0(lambda: (run_dir / STATUS_NAME).unlink(missing_ok=True)))
    seed_random_states(config.run.seed)
    return resume


def _require_vllm(config: Config) -> None:
    """Looked for before the models are loaded, which takes minutes."""
    asks = config.has_rollouts or config.evaluates
    if asks and config.rollout.engine == "local" and find_spec("vllm") is None:
        remedy = "install it (CPU: make engine), or set rollout.engine=server"
        raise _refused("rollout.engine", "local", "vLLM installed beside this package", remedy)


def _make_folder(run_dir: Path) -> None:
    remedy = "choose another run.name or run.dir"
    own = run_dir / "config.yaml"
    try:
        if own.exists() and _HEADER not in own.read_text("utf-8", "replace"):
            got = f"{own}, which is not of a run"
            raise _refused("run.name", got, "a folder for this run alone", remedy)
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{error.filename} ({error.strerror})"
        raise _refused("run.dir", got, "a folder that can be written", remedy) from None


def record_config(run_dir: Path, config: Config) -> None:
    """Put the resolved configuration into the folder. Every rank of the world calls it."""

    def write() -> None:
        (run_dir / "config.yaml").write_text(_HEADER + resolved_yaml(config), encoding="utf-8")

    in_step(lambda: on_rank_0(write))


def run_identity(config: Config, facts: ModelFacts) -> Mapping[str, Any]:
    """What checkpoints of this run are known by; rank 0 looks at the teachers' files."""

    def of_files() -> Mapping[str, Any] | None:
        if dist.get_rank() != 0:
            return None
        teachers = config.named_teachers.items() if config.scores_with_teacher else ()
        folders = {
            key: Path(local_model_folder(section.path, f"{key}.path")) for key, section in teachers
        }
        return identity(config, facts, folders)

    found = in_step_all(of_files)[0]
    assert found is not None
    return found


def _refused(key: str, got: str, expected: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(key, got, expected, remedy)])
