"""Weights through shared memory: bit-equal on arrival, two layers at a time, faults refused."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
import torch

from megatron_vopd.errors import EngineError
from megatron_vopd.rollout.weights import send
from megatron_vopd.rollout.weights.memory_file import (
    MappedSegment,
    MemoryFile,
    Segment,
    read_tensors,
)
from megatron_vopd.rollout.weights.send import WeightSource, send_weights

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
        segment = MappedSegment(update_info["path"], update_info["size"])
        assert segment.data is not None
        try:
            for name, tensor in read_tensors(
                segment.data, update_info["tensors"], self.missing, self.dtype
            ):
                self.received[name] = tensor.clone()
        except ValueError as error:
            raise EngineError(str(error)) from error
        del tensor
        segment.release()
        self.parts.append([entry[0] for entry in update_info["tensors"]])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self.missing:
            raise EngineError(f"{len(self.missing)} weights did not come")
        self.version = weight_version


def _mapped(info: dict[str, Any]) -> torch.Tensor:
    data = MappedSegment(info["path"], info["size"]).data
    assert data is not None
    return data


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
        def __init__(self, *args: Any) -> None:
            nonlocal most
            super().__init__(*args)
            alive.add(id(self))
            most = max(most, len(alive))

        def close(self) -> None:
            super().close()
            alive.discard(id(self))

    monkeypatch.setattr(send, "Segment", Watched)
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
    data = _mapped(info)
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
    with pytest.raises(ValueError, match="truncated: 416 bytes of 9999"):
        MappedSegment(info["path"], 9999)
    data = _mapped(info)
    data[100] ^= 1
    with pytest.raises(ValueError, match="changed on its way"):
        list(read_tensors(data, info["tensors"], expected, "float32"))
    info["tensors"][0][3] = 128
    with pytest.raises(ValueError, match="outside its segment"):
        list(read_tensors(data, info["tensors"], expected, "float32"))
    with pytest.raises(ValueError, match="cannot be opened"):
        MappedSegment("/proc/1/fd/99999", 10)
    segment.close()


def test_a_source_that_fails_leaves_nothing_behind() -> None:
    def failing() -> Any:
        yield from _tensors()[:4]
        raise RuntimeError("a rank is gone")

    receiver = Receiver()
    with pytest.raises(RuntimeError, match="a rank is gone"):
        send_weights(failing(), receiver, torch.float32, "1")
    assert receiver.version is None and _open_segments() == 0


class Built:
    """A source whose layers lie in memory files from the start, as `SharedGather` builds them."""

    def __init__(self) -> None:
        self.spare: list[MemoryFile] = []
        self.segment: Segment | None = None
        self.built: list[str] = []
        self.num_reused = 0

    def take(self) -> Segment | None:
        segment, self.segment = self.segment, None
        return segment

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for _, pairs in groupby(_tensors(), key=lambda pair: send.layer_key(pair[0])):
            layer = dict(pairs)
            file = self.spare.pop() if self.spare else None
            self.num_reused += file is not None
            self.segment = Segment(file, self.spare)
            shapes = {name: tuple(tensor.shape) for name, tensor in layer.items()}
            rooms = self.segment.make_room(shapes, torch.float32)
            self.built.append(next(iter(layer)))
            for name in layer:
                yield name, rooms.pop(name).copy_(layer[name])


class Holding(Receiver):
    """A receiver that keeps a tensor of layer 0, as vLLM does until a layer is whole."""

    kept: torch.Tensor | None = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "model.layers.0" in update_info["tensors"][0][0]:
            segment = MappedSegment(update_info["path"], update_info["size"])
            assert segment.data is not None
            _, _, shape, offset, _ = update_info["tensors"][0]
            self.kept = segment.data[offset : offset + 4 * 64].view(torch.float32).view(shape)
            segment.release()
        super().update_weights(update_info)


def test_layers_built_in_memory_files_are_sent_without_a_copy() -> None:
    built, receiver = Built(), Receiver()
    in_flight: list[int] = []
    update = receiver.update_weights

    def watched(info: dict[str, Any]) -> None:
        in_flight.append(len(built.built))
        update(info)

    receiver.update_weights = watched  # type: ignore[method-assign]
    sent = send_weights(WeightSource(built, built.take), receiver, torch.float32, "3")
    assert receiver.version == "3" and sent.num_tensors == len(SHAPES)
    for name, tensor in _tensors():
        assert torch.equal(receiver.received[name], tensor)
    # No layer but the one after it is built before a layer is on its way.
    assert all(number <= at + 2 for at, number in enumerate(in_flight)), in_flight
    assert built.num_reused == 3, "five layers in two files"
    for file in built.spare:
        file.close()
    assert _open_segments() == 0


def test_a_file_that_the_engine_still_reads_is_left_alone() -> None:
    built, receiver = Built(), Holding()
    send_weights(WeightSource(built, built.take), receiver, torch.float32, "3")
    assert receiver.kept is not None
    assert torch.equal(receiver.kept, dict(_tensors())["model.layers.0.q.weight"])
    assert built.num_reused == 2, "one of the files was the engine's from then on"
    for file in built.spare:
        file.close()


def test_finite_check_sees_every_place() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 50, 99):
            tensor = torch.zeros(100)
            assert send.is_finite(tensor)
            tensor[place] = value
            assert not send.is_finite(tensor)
    assert send.is_finite(torch.zeros(0))
