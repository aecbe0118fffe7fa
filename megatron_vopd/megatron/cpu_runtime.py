"""The replacements that megatron-core needs where there is no CUDA device.

megatron-core names CUDA in places where any device would do: `torch.cuda.current_device()` as a
device argument, literal `device="cuda"`, `.cuda()`, CUDA random states, streams that order copies.
`activate` answers those on the CPU, for the process and for the thread that calls it:

- functions of `torch.cuda` that megatron-core calls are replaced by their CPU meaning;
- a `TorchFunctionMode` turns CUDA devices into the CPU one. Function modes are local to a thread,
  so megatron-core must be driven from the thread that activated the runtime;
- three places of megatron-core itself are mended that assume TransformerEngine, Apex or CUDA:
  random states, expert routing, loading the distributed optimizer.

Nothing here runs unless `activate` is called, which the device setting `cpu` does and `cuda` never
does.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_active_mode: TorchFunctionMode | None = None


class _Stream:
    """A stream or event of a device that runs every operation to its end at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _stream: Any) -> None:
        pass

    def wait_event(self, _event: Any) -> None:
        pass

    def wait(self, _stream: Any = None) -> None:
        pass

    def record(self, _stream: Any = None) -> None:
        pass

    def record_event(self, _event: Any = None) -> _Stream:
        return _Stream()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


_ONLY_STREAM = _Stream()


def _get_rng_state(_device: Any = "cpu", **_: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, _device: Any = "cpu", **_: Any) -> None:
    torch.set_rng_state(new_state)


_STAND_INS: dict[str, Any] = {
    "current_device": lambda: "cpu",
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "manual_seed": torch.manual_seed,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "Stream": _Stream,
    "Event": _Stream,
    "stream": lambda _stream: contextlib.nullcontext(),
    "current_stream": lambda *_, **__: _ONLY_STREAM,
    "default_stream": lambda *_, **__: _ONLY_STREAM,
}


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class _CudaIsCpu(TorchFunctionMode):
    """A mode in which every torch function runs with CUDA devices replaced by the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core sorts parameters by comparing this string with "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def _all_to_all_with_lists(original: Any) -> Any:
    """Wrap all_to_all_single: gloo takes split sizes as lists, megatron-core gives CPU tensors."""

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        splits = [
            sizes.tolist() if hasattr(sizes, "tolist") else sizes
            for sizes in (output_split_sizes, input_split_sizes)
        ]
        return original(output, input, *splits, **kwargs)

    return all_to_all_single


def _load_states_with_own_steps(original: Any) -> Any:
    """Wrap the loading of optimizer state so that each parameter has its own count of steps.

    torch's Adam counts per parameter; megatron-core loads one count for all. Shared, the count
    would rise once per parameter in every step. In 0.16.1 loading even fails, for want of the key.
    """

    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    return set_main_param_and_optimizer_states


def _mend_megatron() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils

    setattr(megatron_random, "_set_cuda_rng_state", _set_rng_state)  # noqa: B010
    name = "_set_main_param_and_optimizer_states"
    mended = _load_states_with_own_steps(getattr(DistributedOptimizer, name))
    setattr(DistributedOptimizer, name, mended)
    if not hasattr(moe_utils, "te_general_gemm"):
        # Read by the router without a guard when TransformerEngine is not installed.
        setattr(moe_utils, "te_general_gemm", None)  # noqa: B010


def is_active() -> bool:
    """Return whether `activate` has run in this process."""
    return _active_mode is not None


def activate() -> None:
    """Let megatron-core run on the CPU in this process, driven from the calling thread. Idempotent.

    Must run before the first import of megatron-core, which copies some of the replaced functions.
    """
    global _active_mode
    if _active_mode is not None:
        return
    for name, stand_in in _STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.random.set_rng_state = _set_rng_state
    dist.all_to_all_single = _all_to_all_with_lists(dist.all_to_all_single)
    _active_mode = _CudaIsCpu()
    _active_mode.__enter__()
    _mend_megatron()
