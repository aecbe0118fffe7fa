"""Real vLLM servers for tests, started by the script of the examples."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_vopd.rollout.vllm.supervisor import reap_session
from tests.support import ROOT

ENTRY_POINT_GROUP = "vllm.general_plugins"
ENTRY_POINT = "megatron_vopd.rollout.weights.vllm_plugin:register"
CONTEXT = 256  # tokens of prompt and response together
METADATA = "Metadata-Version: 2.1\nName: megatron-vopd-plugin\nVersion: 0\n"


def free_ports(number: int) -> int:
    """Return the first of `number` consecutive free ports."""
    while True:
        sockets = [socket.socket() for _ in range(number)]
        try:
            sockets[0].bind(("127.0.0.1", 0))
            first = sockets[0].getsockname()[1]
            for offset, other in enumerate(sockets[1:], 1):
                other.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()


def with_plugin(folder: Path) -> dict[str, str]:
    """Return an environment in which vLLM finds our entry point, however old the installation."""
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    paths = [str(ROOT)]
    if ENTRY_POINT not in {entry.value for entry in found}:
        info = folder / "megatron_vopd_plugin-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(METADATA)
        (info / "entry_points.txt").write_text(
            f"[{ENTRY_POINT_GROUP}]\nmegatron_vopd = {ENTRY_POINT}\n"
        )
        paths.append(str(folder))
    return {"PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class Servers:
    """Running servers; `session` is the script's, and theirs."""

    urls: tuple[str, ...]
    session: int
    log_dir: Path

    def pids(self) -> list[int]:
        """Return the process ids of the API servers, in the order of `urls`."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and os.getsid(int(entry.name)) == self.session:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
                if "--port" in command:
                    found[int(command[command.index("--port") + 1])] = int(entry.name)
        return [found[port] for port in sorted(found)]


@contextmanager
def running_servers(model_dir: Path, folder: Path, number: int = 2) -> Iterator[Servers]:
    """Run examples/servers/start.sh, as a user calls it; end everything afterwards."""
    first = free_ports(number)
    urls = tuple(f"http://127.0.0.1:{first + i}" for i in range(number))
    config = folder / "served.yaml"
    settings = {
        "student": {"path": str(model_dir)},
        "teacher": {"path": "org/unused"},
        "parallel": {"device": "cpu"},
        "rollout": {"engine": "server", "urls": list(urls), "dtype": "fp32"},
        "curriculum": {"kind": "fixed", "ladder": [CONTEXT - 64]},
        "data": {"train": "org/unused", "max_prompt_tokens": 64},
    }
    config.write_text(json.dumps(settings))
    environment = {
        **os.environ,
        **with_plugin(folder / "plugin"),
        "PYTHON": sys.executable,
        "LOG_DIR": str(folder),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = subprocess.Popen(
        [str(ROOT / "examples/servers/start.sh"), str(config)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield Servers(urls, script.pid, folder)
    finally:
        script.send_signal(signal.SIGTERM)
        try:
            script.wait(timeout=30)
        except subprocess.TimeoutExpired:
            script.kill()
        assert reap_session(script.pid)
        script.wait()
