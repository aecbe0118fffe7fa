"""How a local engine is started: vLLM's arguments, and the environment of its processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vopd.errors import UserError
from megatron_vopd.rollout.weights.send import BACKEND

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_TORCHRUN += ("ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")
# Chosen for the trainer's exchanges, not for an engine's streams.
_TRAINERS_OWN = ("CUDA_DEVICE_MAX_CONNECTIONS",)


@dataclass(frozen=True)
class LocalSettings:
    """The settings that a local engine is started with.

    Attributes:
        model_dir: HF folder; its config is read, and with `reads_weights` its weights are.
        log_path: vLLM's output is appended here.
        max_model_len: longest prompt and response together.
        dtype: of weights and activations, as torch names it.
        device: "cpu" or "cuda".
        tp: tensor-parallel size of the engine; on GPUs 1 when weights come from one GPU by IPC.
        gpu: for CUDA_VISIBLE_DEVICES, the trainer's own; None: as inherited.
        seed: of the engine itself; responses have seeds of their own.
        start_seconds: until the engine has started (on a GPU minutes); less than the timeout of the
            world's collectives, in which the other ranks wait meanwhile.
        push_seconds: for one part of a push, a probe, or any other short command.
        deadline_seconds: for one call of `generate`.
        stall_seconds: without any progress while generating.
        memory_fraction: of the GPU's memory.
        cpu_cache_gib: memory for keys and values of a CPU engine.
        cpu_threads: of a CPU engine, per worker; 0: all cores over the workers.
        prefix_caching: keep keys and values of prompts between requests.
        block_size: tokens per block of the cache; None: vLLM's choice.
        reads_weights: vLLM reads the folder's weights and takes no pushes (`FrozenEngine`).
    """

    model_dir: str
    log_path: str
    max_model_len: int
    dtype: str = "float32"
    device: str = "cpu"
    tp: int = 1
    gpu: str | None = None
    seed: int = 0
    start_seconds: float = 480.0
    push_seconds: float = 120.0
    deadline_seconds: float = 1800.0
    stall_seconds: float = 300.0
    memory_fraction: float = 0.4
    cpu_cache_gib: int = 1
    cpu_threads: int = 0
    prefix_caching: bool = True
    block_size: int | None = None
    reads_weights: bool = False

    def __post_init__(self) -> None:
        if self.device != "cpu" and self.tp > 1 and not self.reads_weights:
            raise UserError(
                f"rollout.tp: got {self.tp}, expected 1 for rollout.engine=local on GPUs, where "
                "an engine shares its trainer's GPU; set rollout.tp=1 or rollout.engine=server"
            )

    def engine_arguments(self) -> dict[str, Any]:
        """Return the arguments of vLLM's LLM."""
        on_gpu = self.device != "cpu"
        arguments: dict[str, Any] = {
            "model": self.model_dir,
            "dtype": self.dtype,
            "seed": self.seed,
            "tensor_parallel_size": self.tp,
            "max_model_len": self.max_model_len,
            "load_format": "auto" if self.reads_weights else "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": self.prefix_caching,
            "enforce_eager": not on_gpu,
            "disable_log_stats": True,
            "trust_remote_code": False,
        }
        if not self.reads_weights:
            arguments["transfer_backend"] = "ipc" if on_gpu else BACKEND
        if self.block_size is not None:
            arguments["block_size"] = self.block_size
        if on_gpu:
            arguments["gpu_memory_utilization"] = self.memory_fraction
            arguments["enable_sleep_mode"] = True
            arguments["hf_overrides"] = {"head_dtype": "float32"}
        else:
            # Read in parts, a prompt samples after each part, and vLLM then sets the random state
            # back, which it cannot do on a CPU: prompts are read whole.
            arguments["enable_chunked_prefill"] = False
        return arguments

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of the engine's processes: no torchrun, loopback only, quiet."""
        kept = {
            key: value
            for key, value in inherited.items()
            if key not in (*_TORCHRUN, *_TRAINERS_OWN) and not key.startswith("TORCHELASTIC_")
        }
        threads = self.cpu_threads or max(1, (os.cpu_count() or 1) // self.tp)
        kept |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CONFIGURE_LOGGING": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if self.gpu is not None:
            kept["CUDA_VISIBLE_DEVICES"] = self.gpu
        if self.device == "cpu":
            kept |= {
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": str(threads),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": str(self.cpu_cache_gib),
            }
        return kept
