"""Weights through shared memory: bit-equal on arrival, two layers at a time, faults refused."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch

from megatron_vopd.rollout import transfer
from megatron_vopd.rollout.engine import EngineError
from megatron_vopd.rollout.transfer import Segment, map_segment, read_tensors, send_weights

SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    "model.layers.0.q.weight": (8, 8),
    "model.layers.0.norm.weight": (8,),
    "model.layers.1.q.weight": (8, 8),
    "model.layers.1.norm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}


def _tensors(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    ]


class Receiver:
    """An engine's side in this process: verifies as vLLM's workers do, keeps what it was sent."""

    def __init__(self, dtype: str = "float32") -> None:
        self.missing = dict(SHAPES)
        self.dtype = dtype
        self.received: dict[str, torch.Tensor] = {}
        self.parts: list[list[str]] = []
        self.version: str | None = None

    def start_weight_update(self) -> None:
        assert not self.received

    def update_weights(self, update_info: dict[str, Any]) -> None:
        data = map_segment(update_info["path"], update_info["size"])
        try:
            for name, tensor in read_tensors(
                data, update_info["tensors"], self.missing, self.dtype
            ):
                self.received[name] = tensor.clone()
                del self.missing[name]
        except ValueError as error:
            raise EngineError(str(error)) from error
        self.parts.append([entry[0] for entry in update_info["tensors"]])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self.missing:
            raise EngineError(f"{len(self.missing)} weights did not come")
        self.version = weight_version


def _open_segments() -> int:
    gc.collect()
    links = [f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.islink(link)]
    return sum("megatron_vopd_weights" in name for name in names)


def test_weights_arrive_bit_equal_layer_by_layer() -> None:
    receiver = Receiver()
    sent = send_weights(_tensors(), receiver, torch.float32, "7")
    assert receiver.version == "7" and sent.num_tensors == len(SHAPES)
    assert sent.num_bytes == sum(tensor.nbytes for _, tensor in _tensors())
    assert [len(part) for part in receiver.parts] == [1, 2, 2, 1, 1]
    for name, tensor in _tensors():
        assert torch.equal(receiver.received[name], tensor)


def test_never_more_than_two_layers_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = 0

    class Watched(Segment):
        def __init__(self) -> None:
            nonlocal most
            super().__init__()
            alive.add(id(self))
            most = max(most, len(alive))

        def close(self) -> None:
            super().close()
            alive.discard(id(self))

    monkeypatch.setattr(transfer, "Segment", Watched)
    send_weights(_tensors(), Receiver(), torch.float32, "1")
    assert most == 2 and not alive


def test_weights_are_converted_to_the_engines_type() -> None:
    receiver = Receiver("bfloat16")
    sent = send_weights(_tensors(), receiver, torch.bfloat16, "1")
    assert sent.num_bytes == sum(tensor.nbytes for _, tensor in _tensors()) // 2
    for name, tensor in _tensors():
        assert torch.equal(receiver.received[name], tensor.bfloat16())


def test_views_and_scalars_are_sent_as_they_are() -> None:
    segment = Segment()
    view = torch.arange(12.0).view(3, 4).t()
    segment.add("view", view)
    segment.add("scalar", torch.tensor(3.0))
    info = segment.update_info()
    data = map_segment(info["path"], info["size"])
    found = dict(read_tensors(data, info["tensors"], {"view": (4, 3), "scalar": ()}, "float32"))
    assert torch.equal(found["view"], view) and found["scalar"] == 3.0
    segment.close()
    segment.close()


def _change(name: str, edit: Any) -> Any:
    return [(key, edit(value) if key == name else value) for key, value in _tensors()]


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (_tensors()[:3] + _tensors()[4:], "did not come"),
    "half": (_tensors()[:3], "did not come"),
    "no head": (_tensors()[:-1], "did not come"),
    "extra": ([*_tensors(), ("model.extra.weight", torch.ones(3))], "unknown to the model"),
    "twice": ([*_tensors(), _tensors()[0]], "sent twice"),
    "shape": (_change("lm_head.weight", lambda x: x[:-1]), "has shape"),
    "transposed": (_change("lm_head.weight", lambda x: x.t()), "has shape"),
    "nan": (_change("model.norm.weight", lambda x: x * torch.nan), "not finite"),
    "inf": (_change("model.norm.weight", lambda x: x / 0), "not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_streams_are_refused(fault: str) -> None:
    tensors, reason = FAULTS[fault]
    receiver = Receiver()
    with pytest.raises(EngineError, match=reason) as caught:
        send_weights(tensors, receiver, torch.float32, "1")
    del caught  # its traceback holds the receiver's mapping
    assert receiver.version is None and _open_segments() == 0


def test_wrong_type_is_refused() -> None:
    with pytest.raises(EngineError, match="has type float32; expected bfloat16"):
        send_weights(_tensors(), Receiver("bfloat16"), torch.float32, "1")


def test_truncated_and_changed_segments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment()
    segment.add("lm_head.weight", torch.ones(11, 8))
    info, expected = segment.update_info(), {"lm_head.weight": (11, 8)}
    with pytest.raises(ValueError, match="truncated: 352 bytes of 9999"):
        map_segment(info["path"], 9999)
    data = map_segment(info["path"], info["size"])
    data[100] ^= 1
    with pytest.raises(ValueError, match="changed on its way"):
        list(read_tensors(data, info["tensors"], expected, "float32"))
    info["tensors"][0][3] = 64
    with pytest.raises(ValueError, match="outside its segment"):
        list(read_tensors(data, info["tensors"], expected, "float32"))
    with pytest.raises(ValueError, match="cannot be opened"):
        map_segment("/proc/1/fd/99999", 10)
    segment.close()


def test_a_source_that_fails_leaves_nothing_behind() -> None:
    def failing() -> Any:
        yield from _tensors()[:4]
        raise RuntimeError("a rank is gone")

    receiver = Receiver()
    with pytest.raises(RuntimeError, match="a rank is gone"):
        send_weights(failing(), receiver, torch.float32, "1")
    assert receiver.version is None and _open_segments() == 0


def test_finite_check_sees_every_place() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 50, 99):
            tensor = torch.zeros(100)
            assert transfer.is_finite(tensor)
            tensor[place] = value
            assert not transfer.is_finite(tensor)
    assert transfer.is_finite(torch.zeros(0))
