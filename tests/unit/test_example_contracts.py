"""Examples as contracts: what their scripts start, against what their configurations need.

Slurm, torchrun and vLLM are stand-ins that write down how they were called; `vopd`, the scripts and
the configurations are real. vLLM's own parser reads the same flags in
`tests/integration/rollout/test_example_contracts.py`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_vopd.cli import main
from megatron_vopd.config import Config, load_config
from megatron_vopd.demo.models import save_model
from megatron_vopd.hf.folder import read_model_folder
from megatron_vopd.run.engines import make_engine
from tests.support import ROOT
from tests.support.examples import DEMO, EXAMPLES, MODELS, ON_GPU, example

# Programs on PATH, which write their arguments to a file each; `python` is what has vLLM.
RECORD = """#!/bin/bash
[ "$2" != megatron_vopd.cli ] || exec {python} "$@"
"""
PYTHON = (
    RECORD
    + """
[[ "$*" =~ --port\\ ([0-9]+) ]]
printf '%s\\n' "$CUDA_VISIBLE_DEVICES" "$@" >"$RECORDS/part_$$" && mv "$RECORDS/part_$$" \\
  "$RECORDS/server_${BASH_REMATCH[1]}"
exec sleep 60
"""
)
VOPD = '#!/bin/bash\nexec {python} -m megatron_vopd.cli "$@"\n'
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$RECORDS/srun_$$"
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
"""
TORCHRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$RECORDS/torchrun"
deadline=$((SECONDS + 60))
while [ "$(ls "$RECORDS" | grep -c server_)" -lt "$SERVERS" ] && [ $SECONDS -lt $deadline ]; do
  sleep 0.1
done
"""
SCONTROL = "#!/bin/bash\n[ \"$1\" != show ] || printf 'node1\\nnode2\\n'\n"


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put stand-ins on PATH; return the folder that they write to."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "records").mkdir()
    programs = {"python": PYTHON, "vopd": VOPD, "srun": SRUN, "torchrun": TORCHRUN}
    for name, text in (programs | {"scontrol": SCONTROL, "scancel": "#!/bin/bash\n"}).items():
        path = tmp_path / "bin" / name
        path.write_text(text.replace("{python}", sys.executable))
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "8"}
    variables = slurm | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "bin" / "python"),
        "PYTHONPATH": str(ROOT),
        "RECORDS": str(tmp_path / "records"),
        "LOG_DIR": str(tmp_path),
        "SERVER_HEAD_START": "0",
        "SLURM_CPUS_ON_NODE": "96",
        "SERVERS": "0",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "HOST", "VLLM_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "records"


def run_script(tmp_path: Path, script: Path, *arguments: str) -> None:
    """Run a script to its end, and end what it leaves."""
    process = subprocess.Popen(
        ["bash", str(script), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        process.wait(90)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def flag(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def arguments_of_training(records: Path) -> list[str]:
    """Return what torchrun was given after the name of the training command."""
    given = (records / "torchrun").read_text().splitlines()
    return given[given.index("megatron_vopd.train") + 1 :]


def test_servers_of_the_two_node_example_suit_its_run(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were started for 4096 tokens, before: too few for its own evaluation."""
    monkeypatch.setenv("SERVERS", "8")
    script = ROOT / "examples" / "qwen3_8b_from_32b" / "launch.sbatch"
    model, teacher = MODELS / "Qwen3-8B", MODELS / "Qwen3-32B"
    where = f"run.dir={tmp_path / 'runs'}"
    run_script(tmp_path, script, str(model), f"teacher.path={teacher}", where)
    path, *overrides = arguments_of_training(records)
    config = load_config(path, overrides)
    assert config.max_engine_tokens == 5120
    servers = {one.name: one.read_text().splitlines() for one in records.glob("server_*")}
    assert servers.keys() == {f"server_{port}" for port in range(8000, 8008)}
    for number, (name, (gpu, *arguments)) in enumerate(sorted(servers.items())):
        assert gpu == str(number), "a GPU twice"
        assert f"http://{flag(arguments, '--host')}:{name[7:]}" == config.rollout.urls[number]
        assert int(flag(arguments, "--max-model-len")) >= config.max_engine_tokens
        assert flag(arguments, "--model") == config.student.path == str(model)
        assert flag(arguments, "--dtype") == "bfloat16" and config.rollout.dtype == "bf16"
        assert flag(arguments, "--tensor-parallel-size") == str(config.rollout.tp)
        assert flag(arguments, "--load-format") == "dummy"
        assert '"nccl"' in flag(arguments, "--weight-transfer-config")


@pytest.mark.parametrize("name", [n for n in EXAMPLES if (ROOT / "examples" / n).exists()])
def test_scripts_start_the_ranks_of_the_example(
    name: str, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script,) = (ROOT / "examples" / name).glob("launch.*")
    model = [str(MODELS / "Qwen3-8B")] if "32b" in name else []
    monkeypatch.setenv("SERVERS", "8" if model else "0")
    run_script(tmp_path, script, *model, f"run.dir={tmp_path / 'runs'}")
    given = (records / "torchrun").read_text().splitlines()
    nodes = int(flag(given, "--nnodes")) if "--nnodes" in given else 1
    assert nodes * int(flag(given, "--nproc-per-node")) == EXAMPLES[name]
    assert arguments_of_training(records)[0].endswith("config.yaml")
    steps = [one.read_text().splitlines() for one in records.glob("srun_*")]
    assert len(steps) == {".sbatch": 2 if model else 1, ".sh": 0}[script.suffix]
    for step in steps:
        # One task starts eight ranks: without these it may get one core, and share it out.
        assert "--cpu-bind=none" in step and "--cpus-per-task=96" in step
    if script.suffix == ".sbatch":
        (asked,) = re.findall(r"--nodes=(\d+)", script.read_text().splitlines()[1])
        assert int(asked) == nodes + (1 if model else 0)
        assert "--ntasks-per-node=1 --gpus-per-node=8" in script.read_text()


LOCAL = ["rollout.engine=local", "rollout.urls=[]", "rollout.max_staleness=0"]


class TestStartScript:
    """examples/servers/start.sh by itself."""

    CONFIG = str(ROOT / "examples" / "qwen3_8b_from_32b" / "config.yaml")

    def start(self, records: Path, number: int, *settings: str) -> dict[str, list[str]]:
        script = ROOT / "examples" / "servers" / "start.sh"
        process = subprocess.Popen(
            ["bash", str(script), self.CONFIG, *settings],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        try:
            while len(list(records.glob("server_*"))) < number:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 143
            left = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True)
            assert not left.stdout, "a server that outlives the script"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return {one.name: one.read_text().splitlines() for one in records.glob("server_*")}

    def test_gpus_of_the_machine_are_dealt_out(
        self, records: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,GPU-a,GPU-b")
        urls = "rollout.urls=[http://localhost:8000, http://10.1.1.1:8000, http://127.0.0.1:8002]"
        servers = self.start(records, 2, urls, "rollout.tp=2")
        assert {name: lines[0] for name, lines in servers.items()} == {
            "server_8000": "2,3",
            "server_8002": "GPU-a,GPU-b",
        }

    def test_servers_on_a_cpu(self, records: Path) -> None:
        (arguments,) = self.start(
            records, 1, "parallel.device=cpu", "rollout.urls=[http://127.0.0.1:81]"
        ).values()
        assert arguments[0] == "" and "--enforce-eager" in arguments
        assert "megatron_vopd_shm" in flag(arguments, "--weight-transfer-config")
        assert "--no-enable-chunked-prefill" in arguments and "--hf-overrides" not in arguments

    @pytest.mark.parametrize(
        ("settings", "line"),
        [
            (["rollout.urls=[http://10.0.0.7:8000]"], "rollout.urls: got ['http://10.0.0.7:8000'"),
            (LOCAL, "rollout.engine: got local, expected server; set rollout.engine=server"),
            (["rollout.tp=4"], "CUDA_VISIBLE_DEVICES: got 4 GPUs for server 2 of rollout.tp=4"),
            (["rollout.tpp=4"], "rollout.tpp: got an unknown key"),
        ],
    )
    def test_mistakes_are_one_line(
        self,
        settings: list[str],
        line: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        assert main(["server-commands", self.CONFIG, *settings]) == 2
        seen = capsys.readouterr()
        assert not seen.out and seen.err.startswith(line) and len(seen.err.splitlines()) == 2

    def test_paths_with_spaces_stay_one_word(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "my model").mkdir()
        assert main(["server-commands", self.CONFIG, f"student.path={tmp_path / 'my model'}"]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert flag(shlex.split(first), "--model") == str(tmp_path / "my model")


def engine_arguments(config: Config, model: str) -> dict[str, Any]:
    """Return what the first leader's engine would be started with on a GPU."""
    known = (0, 1, config.max_engine_tokens, "cuda", config.run.seed, "0")
    return make_engine(config.rollout, model, "run/engines", *known).settings.engine_arguments()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", EXAMPLES)
def test_engines_take_the_longest_sequence_and_their_share(name: str) -> None:
    config = example(name)
    context = read_model_folder(config.student.path).context
    assert config.max_engine_tokens == 1024 + 4096 <= context
    if config.rollout.engine == "local":
        arguments = engine_arguments(config, config.student.path)
        assert arguments["max_model_len"] == config.max_engine_tokens
        assert arguments["gpu_memory_utilization"] == config.rollout.memory_fraction <= 0.4
        assert arguments["enable_sleep_mode"] and arguments["transfer_backend"] == "ipc"
        assert arguments["tensor_parallel_size"] == 1


def test_the_demo_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last run, moved to a GPU: a sound configuration, and an engine that shares it."""
    for key in ("student", "teacher"):
        save_model(tmp_path / key, "0123456789+=\n ", 0, 64, 4, 128)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    settings = [f"{key}.path={tmp_path / key}" for key in ("student", "teacher")]
    settings += [f"data.{key}={tmp_path / 'data.jsonl'}" for key in ("train", "evaluation")]
    settings += [f"run.dir={tmp_path}", *ON_GPU]
    path = str(ROOT / "examples" / DEMO)
    assert main(["check", path, *settings, "--gpu-memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "no problems found" in out and "note: memory" not in out
    assert "rollout.engine: on GPUs 1 of 4 sample" in out
    config = load_config(path, settings)
    arguments = engine_arguments(config, config.student.path)
    assert arguments["dtype"] == "bfloat16" and arguments["max_model_len"] == 50
    one = ["parallel.tp=1", "parallel.pp=1", "teacher.tp=1"]
    assert main(["check", path, *settings, *one]) == 0
    assert "of 1 sample" not in capsys.readouterr().out
