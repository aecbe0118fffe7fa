"""One rank of a large world, in one process: torch's fake process group answers collectives."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vopd.megatron import groups


@contextlib.contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """Be rank `rank` of `size`; the world that this process is in is left for good."""
    from megatron.core import parallel_state

    timeout = groups._world_timeout
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    groups._world_timeout = lambda: datetime.timedelta(seconds=60)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        groups._world_timeout = timeout
