"""Memory that vLLM adds to a GPU: its share, buffers of a push, and what it keeps asleep.

A local engine takes its share of the GPU of a replica's first rank, and gives back its weights and
its cache while it sleeps (level 2: nothing is kept in host memory, since a push follows). Two parts
are assumptions, not yet measured on a GPU, and are marked so wherever they are shown: what its
process holds asleep (CUDA context, CUDA graphs, workspaces), and the context that comes on top of
its share.

A push to it passes through one buffer for CUDA IPC, which the trainer keeps; to servers, through
chunks that NCCL sends (`hf.push_buffers`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import hf_shape, layer_units
from megatron_vopd.hf.push_buffers import NCCL_NUM_BUFFERS, ipc_buffer_bytes, largest_nccl_chunk

ASSUMED = "(assumed)"
# Between 1.5 and 3 GiB, and about half a GiB, by experience with such processes.
ASLEEP_BYTES, CONTEXT_BYTES = 2 * 2**30, 2**29


@dataclass(frozen=True)
class Engine:
    """The engine of one rank.

    Attributes:
        share: bytes of the GPU that a local engine may take; 0: none is on this rank's GPU.
        by_nccl: this rank pushes to servers on GPUs.
        item_size: bytes of a weight's value in the engine.
    """

    share: float = 0.0
    by_nccl: bool = False
    item_size: int = 2

    @property
    def asleep(self) -> dict[str, float]:
        """Part -> bytes that a local engine holds in the phases in which it sleeps."""
        return {f"sleeping engine {ASSUMED}": ASLEEP_BYTES} if self.share else {}

    @property
    def awake(self) -> dict[str, float]:
        """Part -> bytes that a local engine holds while it samples or loads weights."""
        context = {f"engine context {ASSUMED}": CONTEXT_BYTES} if self.share else {}
        return {"engine": self.share} | context

    def kept(self, facts: ModelFacts) -> dict[str, float]:
        """Return part -> bytes that the trainer keeps, from its first push to a local engine on."""
        size = ipc_buffer_bytes(facts, self.item_size)
        return {"IPC buffer": size} if self.share else {}

    def chunks(self, facts: ModelFacts) -> dict[str, float]:
        """Return part -> bytes that a push to servers packs the student's weights into."""
        if not self.by_nccl:
            return {}
        # Packing copies a chunk's tensors before they are dropped.
        chunk = largest_nccl_chunk(facts, self.item_size)
        return {"NCCL chunks": NCCL_NUM_BUFFERS * chunk, "tensors of a chunk": chunk}


def engine_phases(facts: ModelFacts, item_size: int, engine: Engine) -> dict[str, dict[str, float]]:
    """Return the phases rollout and push.

    Args:
        facts: shape of the student.
        item_size: bytes of a value of its weights.
    """
    names = [name for unit in layer_units(facts, 0) for name in unit.hf_names()]
    layer = sum(math.prod(hf_shape(name, facts)) for name in names)
    embedding = facts.vocab_size * facts.hidden_size
    groups = {"layer groups": 2 * max(layer, embedding) * item_size}
    return {"rollout": engine.awake, "push": groups | engine.chunks(facts) | engine.awake}
