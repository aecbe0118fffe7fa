"""Memory that vLLM adds to a GPU: its share, buffers of a push, and what it keeps asleep.

A local engine takes its share of the GPU of a replica's first rank, and gives back its weights and
its cache while it sleeps (level 2: nothing is kept in host memory, since a push follows). Two parts
are assumptions, not yet measured on a GPU, and are marked so wherever they are shown: what its
process holds asleep (CUDA context, CUDA graphs, workspaces), and the context that comes on top of
its share.

A push to it passes through one buffer for CUDA IPC. To servers, NCCL sends chunks of whole tensors,
two of them under way, each closed by the tensor with which it exceeds its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import hf_shape, hf_tensors, layer_units

ASSUMED = "(assumed)"
# Between 1.5 and 3 GiB, and about half a GiB, by experience with such processes.
ASLEEP_BYTES, CONTEXT_BYTES = 2 * 2**30, 2**29
IPC_BYTES, NCCL_CHUNK_BYTES, NCCL_CHUNKS = 2**29, 2**30, 2


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

    def buffers(self, facts: ModelFacts) -> dict[str, float]:
        """Return part -> bytes through which a push of the student's weights passes."""
        if not self.share and not self.by_nccl:
            return {}
        if self.share:
            largest = max(math.prod(shape) for shape in hf_tensors(facts).values())
            return {"IPC buffer": max(IPC_BYTES, largest * self.item_size)}
        # Packing copies a chunk's tensors before they are dropped.
        chunk = _largest_chunk(facts, self.item_size)
        return {"NCCL chunks": NCCL_CHUNKS * chunk, "tensors of a chunk": chunk}


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
    return {"rollout": engine.awake, "push": groups | engine.buffers(facts) | engine.awake}


@cache
def _largest_chunk(facts: ModelFacts, item_size: int) -> int:
    """Return the bytes of the largest chunk of whole tensors, taken in the order of the push."""
    chunk = largest = 0
    for shape in hf_tensors(facts).values():
        chunk += math.prod(shape) * item_size
        largest = max(largest, chunk)
        chunk = 0 if chunk > NCCL_CHUNK_BYTES else chunk
    return largest
