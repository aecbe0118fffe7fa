"""Pushes to servers on GPUs, by a communicator that is made again whenever it may be broken.

vLLM says of its trainer that the communicator is unusable after any failure. It is as unusable when
a server was started again, which then has none, while the trainer would wait for it in NCCL. A
server that was started again reports other weights than were pushed last, so that is asked before
each push.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.errors import EngineError
from megatron_vopd.hf.folder import read_facts
from megatron_vopd.rollout.vllm.client import AllServersClient, Server
from megatron_vopd.rollout.weights.send import Sent, expected_weights

RELEASE_SECONDS = 10.0


class Communicator:
    """The connection over NCCL between this process and all workers of the servers.

    Args:
        push_seconds: for all workers to join, and for one whole push.
        model_dir: HF folder that the servers were started with.
        dtype: the servers' --dtype, as torch names it.
    """

    def __init__(
        self, servers: Sequence[Server], push_seconds: float, model_dir: str, dtype: str
    ) -> None:
        self._servers, self._seconds = servers, push_seconds
        self._model_dir, self._dtype = model_dir, dtype
        self._sender: Any = None
        self._pushed = ""  # version that all servers had after the last push

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> Sent:
        """Push the tensors and set their version; join the servers first where that is needed.

        Raises:
            EngineError: a server refused or is gone, or time is up. The communicator is gone.
        """
        client = AllServersClient(self._servers, self._seconds)
        facts, _ = read_facts(f"{self._model_dir}/config.json")
        try:
            if self._sender is not None and client.weight_versions() != {self._pushed}:
                self.drop()
            if self._sender is None:
                self._sender = self._joined()
            dtype = getattr(torch, self._dtype)
            sent = self._sender.send(tensors, expected_weights(facts), dtype, self._seconds)
            client.post("/update_weight_version", {"new_version": version})
        except BaseException:
            self.drop()
            raise
        self._pushed = version
        return sent

    def _joined(self) -> Any:
        """Make a communicator with all workers; the servers leave the one they may still have."""
        from megatron_vopd.rollout.weights.nccl import NcclSender

        quick = AllServersClient(self._servers, min(RELEASE_SECONDS, self._seconds))
        with suppress(EngineError):
            quick.post("/shutdown_weight_transfer_engine")
        client = AllServersClient(self._servers, self._seconds)
        address, port = self._servers[0].own_address()
        num_workers = sum(client.world_sizes())
        return NcclSender(client, address, port, num_workers, self._seconds)

    def drop(self) -> None:
        """End the communicator, if there is one; the next push makes another."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()
