"""A local engine that samples from the weights of its folder: those of a teacher, never pushed."""

from __future__ import annotations

from megatron_vopd.rollout.vllm_local import LocalEngine


class FrozenEngine(LocalEngine):
    """`LocalEngine` under settings with `reads_weights`; started by its first `generate`."""

    policy_version: int | None

    def _usable_version(self, phase: str) -> int:
        """vLLM read the weights when it started; there is one version of them."""
        self.start()
        version = 0
        self.policy_version = version
        return version
