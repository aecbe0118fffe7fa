"""Operations after which a host that drives a GPU waits for it, counted on the CPU."""

from __future__ import annotations

import collections
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Their results, or the shapes of these, are values that only the device knows.
_READS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.equal,
    _aten.bincount,
    _aten._unique2,
    _aten.repeat_interleave,
}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_}
_PASSED_ON = ("/torch/", "cpu_runtime.py", "host_syncs.py")


class HostSyncs(TorchDispatchMode):
    """A mode that counts such operations.

    Attributes:
        found: (name of the operation, file of the code that called it) -> number of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        masks = packet in _INDEXED and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if packet in _READS or masks:
            self.found[str(packet), _caller()] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not any(part in frame.filename for part in _PASSED_ON):
            return "/".join(Path(frame.filename).parts[-2:])
    return ""
