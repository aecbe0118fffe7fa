"""vLLM servers that suit a run: the context they need, and the commands that start them.

The commands come from the run's own settings, so that servers and run cannot differ in model, type,
context or ports. Servers start with random weights and sample what is pushed to them; they have the
routes for token ids, which vLLM calls scale-out, and those for weights, which its development mode
opens; their log-probs are those of the distribution that is sampled.
"""

from __future__ import annotations

import json
import shlex
from urllib.parse import urlsplit

from megatron_vopd.config.schema import RolloutSection
from megatron_vopd.errors import refusal, shown
from megatron_vopd.hf.dtypes import CONFIG_DTYPES

# Engine and trainer are compared on sequences of this length, at the end of which one id is
# sampled.
PROBE_TOKENS = 48
LOOPBACK = ("127.0.0.1", "localhost", "::1")
API_SERVER = "vllm.entrypoints.openai.api_server"


def context_needed(longest: int) -> int:
    """Return the context that an engine needs, in tokens, the probe of a push included.

    Args:
        longest: `Config.max_engine_tokens`.
    """
    return max(longest, PROBE_TOKENS + 1)


def server_line(rollout: RolloutSection, longest: int) -> str:
    """Say what servers have to be started with, for `vopd check`.

    Args:
        longest: `Config.max_engine_tokens`.
    """
    return (
        f"servers: each needs --max-model-len {context_needed(longest)} and --dtype "
        f"{CONFIG_DTYPES[rollout.dtype].name}; `vopd server-commands CONFIG` prints their commands"
    )


def server_commands(
    rollout: RolloutSection,
    model: str,
    longest: int,
    on_gpu: bool,
    host: str,
    visible: str | None,
) -> list[str]:
    """Return the shell command that starts each server of `rollout.urls` at `host`, in that order.

    Args:
        model: path or hub id of the student, of which only the architecture is read.
        longest: `Config.max_engine_tokens`.
        on_gpu: servers run on GPUs; `rollout.tp` of them each, in order.
        host: address that the servers listen on; names of loopback are one.
        visible: CUDA_VISIBLE_DEVICES of the machine; None: all GPUs, numbered from 0.

    Raises:
        ConfigError: no server of `rollout.urls` is at `host`, or `visible` has too few GPUs.
    """
    parts = [urlsplit(url) for url in rollout.urls]
    ports = [one.port or 80 for one in parts if _place(one.hostname) == _place(host)]
    if rollout.engine != "server":
        remedy = f"set rollout.engine=server and rollout.urls=[http://{host}:8000]"
        raise refusal("rollout.engine", rollout.engine, "server", remedy)
    if not ports:
        remedy = "correct it, or give --host (HOST for examples/servers/start.sh)"
        raise refusal("rollout.urls", shown(list(rollout.urls)), f"a URL at {host}", remedy)
    flags = _flags(rollout, model, context_needed(longest), on_gpu)
    variables = _variables(on_gpu)
    start = f"${{PYTHON:-python}} -m {API_SERVER}"
    commands = []
    for number, port in enumerate(ports):
        own = f" CUDA_VISIBLE_DEVICES={_gpus(rollout.tp, number, visible)}" if on_gpu else ""
        place = shlex.join(["--host", host, "--port", str(port)])
        commands.append(f"env {variables}{own} {start} {place} {shlex.join(flags)}")
    return commands


def _place(host: str | None) -> str | None:
    return LOOPBACK[0] if host in LOOPBACK else host


def _flags(rollout: RolloutSection, model: str, context: int, on_gpu: bool) -> list[str]:
    flags = ["--model", model, "--dtype", CONFIG_DTYPES[rollout.dtype].name]
    flags += ["--max-model-len", str(context), "--tensor-parallel-size", str(rollout.tp)]
    flags += ["--load-format", "dummy", "--skip-tokenizer-init", "--generation-config", "vllm"]
    flags += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
    flags += ["--disable-uvicorn-access-log"]
    backend = {"backend": "nccl" if on_gpu else "megatron_vopd_shm"}
    flags += ["--weight-transfer-config", json.dumps(backend)]
    if on_gpu:
        return [*flags, "--hf-overrides", json.dumps({"head_dtype": "float32"})]
    # Seeded samples need prompts read whole here: vLLM cannot set a CPU's random state back.
    return [*flags, "--enforce-eager", "--no-enable-chunked-prefill"]


def _variables(on_gpu: bool) -> str:
    """Return assignments for the shell; what is inherited goes before defaults of the machine."""
    found = "VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1"
    found += " VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1}"
    if on_gpu:
        return found
    found += " GLOO_SOCKET_IFNAME=lo"
    found += " VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
    return f"{found} VLLM_CPU_KVCACHE_SPACE=${{VLLM_CPU_KVCACHE_SPACE:-4}}"


def _gpus(tp: int, number: int, visible: str | None) -> str:
    """Return the GPUs of server `number`, as CUDA_VISIBLE_DEVICES names them."""
    own = range(number * tp, number * tp + tp)
    names = [name for name in (visible or "").split(",") if name]
    if names and own.stop > len(names):
        got = f"{len(names)} GPUs for server {number + 1} of rollout.tp={tp}"
        remedy = "give fewer URLs or more GPUs"
        raise refusal("CUDA_VISIBLE_DEVICES", got, f"{own.stop} GPUs", remedy)
    return ",".join(names[own.start : own.stop] if names else map(str, own))
