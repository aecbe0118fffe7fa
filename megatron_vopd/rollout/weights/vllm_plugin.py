"""vLLM's side of a push through shared memory: a weight-transfer back end for CPU engines.

vLLM finds it through the entry point `vllm.general_plugins` of this package, which calls
`register`, in each of its processes. It runs there, next to the model; only `send` and
`memory_file` are shared with the trainer.

Loading goes through vLLM's layerwise reload, which undoes and redoes the packing of weights for the
CPU. Two things it does not do by itself: mixture-of-experts layers pack only once, unless their
kernel is forgotten first; and a tied head keeps its own packed copy, so the head is sent too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # pyright: ignore[reportMissingImports]

from megatron_vopd.hf.facts import facts_from_config
from megatron_vopd.rollout.weights.memory_file import MappedSegment, read_tensors
from megatron_vopd.rollout.weights.send import BACKEND, expected_weights


def register() -> None:
    """Make the back end known to vLLM; vLLM may call this several times in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        module, name = __name__, "SharedMemoryWeightTransfer"
        WeightTransferEngineFactory.register_engine(BACKEND, module, name)


@dataclass
class NoInit(WeightTransferInitInfo):
    """The empty arguments of `init_transfer_engine`: there is no connection to make."""


@dataclass
class SegmentInfo(WeightTransferUpdateInfo):
    """The manifest of a segment, from `Segment.update_info`."""

    path: str
    size: int
    tensors: list[list[Any]]


class SharedMemoryWeightTransfer(WeightTransferEngine[NoInit, SegmentInfo]):
    """A back end that loads verified segments, and finishes only when every tensor has come."""

    init_info_cls = NoInit
    update_info_cls = SegmentInfo

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Accept the empty arguments: there is no connection to make."""

    def start_weight_update(self) -> None:
        """Forget what is packed; expect every tensor of the model once."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload  # pyright: ignore[reportMissingImports]

        facts = facts_from_config(self.model_config.hf_config.to_dict())
        self._missing = expected_weights(facts)
        for module in self.model.modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SegmentInfo) -> None:
        """Verify all tensors of a segment, then load them.

        Raises:
            ValueError: see `read_tensors`; the model must not be used any more.
        """
        segment = MappedSegment(update_info.path, update_info.size)
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        assert segment.data is not None
        tensors = list(read_tensors(segment.data, update_info.tensors, self._missing, dtype))
        model: Any = self.model
        model.load_weights(iter(tensors))
        # vLLM keeps tensors of a layer that is not whole yet, such as a padded vocabulary.
        del tensors
        segment.release()

    def finish_weight_update(self) -> None:
        """Pack what was loaded.

        Raises:
            ValueError: a tensor did not come.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload  # pyright: ignore[reportMissingImports]

        if self._missing:
            raise ValueError(
                f"{len(self._missing)} weights did not come: {', '.join(list(self._missing)[:3])}"
            )
        with torch.no_grad():
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave all as it is: no memory is held between segments."""
