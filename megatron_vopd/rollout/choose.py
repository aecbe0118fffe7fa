"""The engine that a configuration asks for, for one data-parallel leader."""

from __future__ import annotations

from pathlib import Path

from megatron_vopd.config import Config
from megatron_vopd.rollout.engine import Engine
from megatron_vopd.rollout.local_settings import LocalSettings
from megatron_vopd.rollout.vllm_local import LocalEngine
from megatron_vopd.rollout.vllm_server import ServerEngine, ServerSettings, shares

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def make_engine(
    config: Config,
    model_dir: str,
    run_dir: str | Path,
    leader: int,
    num_leaders: int,
    max_model_len: int,
    device: str,
    gpu: str | None = None,
) -> Engine:
    """Not started yet: the first push does that.

    Args:
        model_dir: HF folder of the student; its config is read.
        run_dir: engine logs go into its folder `engines`.
        leader, num_leaders: which data-parallel replica this rank leads, of how many.
        max_model_len: longest prompt and response together.
        device: "cpu" or "cuda", already resolved.
        gpu: the leader's own, for CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: too large an engine.
    """
    rollout = config.rollout
    dtype = _DTYPES[rollout.dtype]
    if rollout.engine == "server":
        urls, push_urls = shares(rollout.urls, leader, num_leaders)
        return ServerEngine(
            ServerSettings(
                urls,
                push_urls,
                dtype=dtype,
                transport="shm" if device == "cpu" else "nccl",
                model_dir=model_dir,
                allow_remote=rollout.allow_remote,
                deadline_seconds=rollout.deadline_seconds,
            )
        )
    return LocalEngine(
        LocalSettings(
            model_dir,
            log_path=str(Path(run_dir) / "engines" / f"engine_{leader}.log"),
            max_model_len=max_model_len,
            dtype=dtype,
            device=device,
            tp=rollout.tp,
            gpu=gpu,
            seed=config.run.seed,
            deadline_seconds=rollout.deadline_seconds,
            memory_fraction=rollout.memory_fraction,
            cpu_threads=rollout.cpu_threads,
        )
    )
