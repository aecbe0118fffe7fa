"""All random states of this rank as one tensor of bytes, and back.

Python's, numpy's, torch's on the CPU and on this rank's GPU, and megatron-core's named states. Each
has a fixed size on a given device, so the bytes of all ranks have one length.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_vopd.megatron import cpu_runtime

_PYTHON = struct.Struct("<625I?d")
_NUMPY = struct.Struct("<624IIId")


def seed_random_states(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, in which two starts would else differ."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_bytes() -> Tensor:
    """Return the states as uint8 [n], n the same on every rank."""
    version, words, gauss = random.getstate()
    assert version == 3, f"random state of version {version}"
    python = _PYTHON.pack(*words, gauss is not None, gauss or 0.0)
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy = _NUMPY.pack(*map(int, keys), position, has_gauss, cached)
    parts = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (python, numpy)]
    return torch.cat([*parts, torch.get_rng_state(), *(t.cpu() for t in _device_states())])


def _tracker() -> Any:
    """Return megatron-core's tracker of states, made by `groups.student_groups`."""
    return get_cuda_rng_tracker()


def _device_states() -> list[Tensor]:
    tracker = _tracker().get_states()
    own = [] if cpu_runtime.is_active() else [torch.cuda.get_rng_state()]
    return own + [tracker[name] for name in sorted(tracker)]


def restore_random_bytes(values: Tensor) -> None:
    """Restore what `random_bytes` gave on the same rank of the same layout.

    Raises:
        ValueError: of another length.
    """
    current = random_bytes()
    if values.shape != current.shape:
        raise ValueError(f"random states: expected {len(current)} bytes, got {len(values)}")
    sizes = [_PYTHON.size, _NUMPY.size, len(torch.get_rng_state())]
    sizes += [len(state) for state in _device_states()]
    python, numpy, on_cpu, *rest = [part.clone() for part in values.split(sizes)]
    *words, has_gauss, gauss = _PYTHON.unpack(python.numpy().tobytes())
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    *keys, position, numpy_has_gauss, cached = _NUMPY.unpack(numpy.numpy().tobytes())
    state = ("MT19937", np.array(keys, dtype=np.uint32), position, numpy_has_gauss, cached)
    np.random.set_state(state)
    tracker = _tracker()
    if not cpu_runtime.is_active():
        torch.cuda.set_rng_state(rest.pop(0))
    tracker.set_states(dict(zip(sorted(tracker.get_states()), rest, strict=True)))
    torch.set_rng_state(on_cpu)
