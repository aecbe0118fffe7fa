"""The types of weights, by every name that they go by.

Nothing heavy is imported: `vopd check` looks up sizes here and does without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dtype:
    """One type of weights.

    Attributes:
        name: of torch, vLLM and config.json.
        config: in a configuration and on a command line; empty: not to be chosen.
        code: in a safetensors file.
        storage: the class that `torch.save` names.
        num_bytes: of a value.
    """

    name: str
    config: str
    code: str
    storage: str
    num_bytes: int

    @property
    def torch_dtype(self) -> Any:
        """Return the `torch.dtype`."""
        import torch

        return getattr(torch, self.name)


_ROWS = (
    Dtype("float32", "fp32", "F32", "FloatStorage", 4),
    Dtype("bfloat16", "bf16", "BF16", "BFloat16Storage", 2),
    Dtype("float16", "", "F16", "HalfStorage", 2),
)
DTYPES = {row.name: row for row in _ROWS}
CONFIG_DTYPES = {row.config: row for row in _ROWS if row.config}
SAFETENSORS_DTYPES = {row.code: row for row in _ROWS}
