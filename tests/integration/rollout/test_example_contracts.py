# pyright: reportMissingImports=false
# vLLM is there only after `make engine`; the file is slow, as all that needs it.
"""vLLM's own parser and classes read what the examples would start; nothing is started.

The fast part, without vLLM, is `tests/unit/test_example_contracts.py`.
"""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.config import Config, load_config
from megatron_vopd.demo.models import save_model
from megatron_vopd.preflight.servers import API_SERVER, server_commands
from megatron_vopd.rollout.vllm.child import Child
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.run.engines import make_engine
from tests.support import ROOT
from tests.support.examples import DEMO, EXAMPLES, ON_GPU, example

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM: make engine"),
]
SERVED = ["rollout.engine=server", "rollout.urls=[http://127.0.0.1:8000, http://127.0.0.1:8001]"]


def demo(folder: Path) -> Config:
    """Load the demo's last run, moved to a GPU, on random models."""
    for key in ("student", "teacher"):
        save_model(folder / key, "0123456789+=\n ", 0, 64, 4, 128)
    (folder / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    settings = [f"{key}.path={folder / key}" for key in ("student", "teacher")]
    settings += [f"data.{key}={folder / 'data.jsonl'}" for key in ("train", "evaluation")]
    return load_config(ROOT / "examples" / DEMO, [*settings, *ON_GPU])


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("name", EXAMPLES)
def test_flags_of_servers_are_vllms(name: str, on_gpu: bool) -> None:
    """Every example, also those that start their engines themselves, with servers instead."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from megatron_vopd.rollout.weights.vllm_plugin import register

    register()
    config = example(name, *SERVED)
    known = (config.student.path, config.max_engine_tokens, on_gpu, "127.0.0.1", None)
    for number, command in enumerate(server_commands(config.rollout, *known)):
        words = shlex.split(command)
        flags = words[words.index(API_SERVER) + 1 :]
        parsed: Any = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
        validate_parsed_serve_args(parsed)
        assert (parsed.host, parsed.port) == ("127.0.0.1", 8000 + number)
        assert parsed.enable_scale_out and parsed.generation_config == "vllm"
        arguments = AsyncEngineArgs.from_cli_args(parsed)
        model = arguments.create_model_config()
        assert model.max_model_len == config.max_engine_tokens == 5120
        assert str(model.dtype) == "torch.bfloat16"
        assert (str(model.head_dtype) == "torch.float32") == on_gpu
        assert model.logprobs_mode == "processed_logprobs" and model.skip_tokenizer_init
        assert arguments.load_format == "dummy"
        backend = "nccl" if on_gpu else "megatron_vopd_shm"
        transfer: Any = arguments.weight_transfer_config
        assert transfer.backend == backend
        assert arguments.enable_chunked_prefill is (None if on_gpu else False)


@pytest.mark.parametrize("name", [*EXAMPLES, "demo"])
def test_arguments_of_engines_are_vllms(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's own code builds vLLM's LLM, up to the engine, which is caught instead."""
    from vllm.entrypoints.llm import LLMEngine  # pyright: ignore[reportPrivateImportUsage]
    from vllm.platforms import current_platform

    config = demo(tmp_path) if name == "demo" else example(name)
    if config.rollout.engine == "server":
        rollout = config.rollout.model_copy(update={"engine": "local", "urls": ()})
        config = config.model_copy(update={"rollout": rollout})
    known = (0, 1, config.max_engine_tokens, "cuda", config.run.seed, "0")
    engine: Any = make_engine(config.rollout, config.student.path, tmp_path, *known)
    assert isinstance(engine.settings, LocalSettings)

    caught: list[Any] = []

    class CaughtError(Exception):
        pass

    def from_engine_args(engine_args: Any, **_: Any) -> None:
        caught.append(engine_args)
        raise CaughtError

    monkeypatch.setattr(LLMEngine, "from_engine_args", from_engine_args)
    # This vLLM may be the one for CPUs, which has no sleep mode.
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda _: True)
    connection: Any = None
    with pytest.raises(CaughtError):
        Child(connection, engine.settings.engine_arguments())
    (arguments,) = caught
    model = arguments.create_model_config()
    assert model.max_model_len == config.max_engine_tokens
    assert str(model.dtype) == "torch.bfloat16" and str(model.head_dtype) == "torch.float32"
    assert model.enable_sleep_mode and model.logprobs_mode == "processed_logprobs"
    assert arguments.gpu_memory_utilization == config.rollout.memory_fraction
    assert arguments.tensor_parallel_size == 1 and not arguments.enforce_eager
    assert arguments.weight_transfer_config.backend == "ipc"


def test_a_flag_that_vllm_does_not_have_would_be_seen() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.raises(SystemExit):
        make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scaling-out"])
    arguments: Any = {"model": "m", "enable_sleeping_mode": True}
    with pytest.raises(TypeError):
        EngineArgs(**arguments)
