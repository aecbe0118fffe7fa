"""Checks of a server before a run samples from it, over its own routes."""

from __future__ import annotations

from megatron_vopd.errors import EngineError, UserError, shown
from megatron_vopd.rollout.vllm.client import Server


def require_context(server: Server, wanted: int, seconds: float) -> None:
    """Require that a server takes the longest prompt and response of the run together.

    vLLM ends a response at its own limit and calls that an end by length: without this check,
    responses would be cut short in the middle of a run.

    Args:
        wanted: tokens of the longest prompt and response together.
        seconds: longest silence before the server is given up.

    Raises:
        UserError: it was started with a shorter `--max-model-len`.
        EngineError: no answer, or none that says it.
    """
    answer = server.call("GET", "/v1/models", seconds=seconds)
    models = answer.get("data") if isinstance(answer, dict) else None
    entries = [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []
    found = [one.get("max_model_len") for one in entries]
    limits = [limit for limit in found if isinstance(limit, int)]
    if not limits or limits != found:
        raise EngineError(f"server {server.url}, /v1/models: no max_model_len in {shown(answer)}")
    if min(limits) < wanted:
        raise UserError(
            f"server {server.url}: got --max-model-len {min(limits)}, expected {wanted} or more "
            "for the longest prompt and response of this run; start it again with the command "
            "that `vopd server-commands CONFIG` prints"
        )
