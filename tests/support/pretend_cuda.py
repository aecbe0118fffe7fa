"""CPU tensors that say they are on a GPU, so that the CUDA branches of plain torch code really run.

Inside `PretendCuda`, tensors that are made on "cuda" live on the CPU, and a product with
`out_dtype`, which only CUDA has, is computed in fp32. The kernels are those of `cuda_emulation`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PRODUCTS = ("mm", "addmm")


class Context:
    """What autograd gives a Function, for one whose forward and backward are called directly.

    The engine itself leaves modes of torch behind, and needs a device where tensors say so.
    """

    needs_input_grad = (True, True, False, False, False, False)
    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        """Keep the tensors."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        """Ignore it: there is no graph."""

    def set_materialize_grads(self, value: bool) -> None:
        """Ignore it: the caller gives every gradient."""


class OnCuda(torch.Tensor):
    """A CPU tensor whose `device` is cuda; results of operations on it are of its kind."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the device that it is said to be on."""
        return torch.device("cuda")


class PretendCuda(TorchFunctionMode):
    """The mode, with a record of what a GPU would have done.

    Attributes:
        products: calls of each product with `out_dtype`.
        copied: elements of every tensor that was written by a copy or a change of dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.copied: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation of torch on the CPU."""
        kwargs = dict(kwargs or {})
        made = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if made:
            kwargs["device"] = "cpu"
        name = getattr(func, "__name__", "")
        if kwargs.pop("out_dtype", None) is not None:
            self.products[name] += 1
            *target, a, b = args
            assert a.dtype == b.dtype == torch.bfloat16, (a.dtype, b.dtype)
            args = (*target, a.float(), b.float())
        elif name in PRODUCTS:
            self.products[f"plain {name}"] += 1
        result = func(*args, **kwargs)
        if name in ("to", "copy_", "bfloat16") and (name == "copy_" or result is not args[0]):
            self.copied.append(result.numel())
        return result.as_subclass(OnCuda) if made else result
