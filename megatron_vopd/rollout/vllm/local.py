"""vLLM in a child of a data-parallel leader, started from inside torchrun.

Three processes: this one (the trainer), the supervisor, and the child with vLLM's core in it;
workers of a tensor-parallel engine below that. The child gets an environment without torchrun's
variables, and a pipe. Every answer has a deadline, and a death is seen at once; either way the
whole session of the engine is ended, and the next `update_weights` starts another.

On the CPU weights travel through shared memory (`weights.send`), on a GPU by CUDA IPC
(`weights.ipc`), and the engine sleeps while the trainer needs the GPU (`sleep`).
The engine starts with random weights and samples only from what was pushed. Its own log goes to a
file in the run folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vopd.errors import EngineError, UserError
from megatron_vopd.hf.folder import read_facts
from megatron_vopd.hf.push_buffers import ipc_buffer_bytes
from megatron_vopd.rollout.engine import (
    GenerationReport,
    Progress,
    PushReport,
    Sampling,
    generation_report,
    response_seed,
)
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.rollout.vllm.sleep import (
    CACHE,
    WEIGHTS,
    Sleeper,
    give_back_gpu_memory,
    nothing_to_give_back,
)
from megatron_vopd.rollout.vllm.supervisor import mapped_shared_memory, reap_session, session_pids
from megatron_vopd.rollout.weights.send import send_weights
from megatron_vopd.types import Prompt, Rollout

SUPERVISOR_MODULE = "megatron_vopd.rollout.vllm.supervisor"
LOG_TAIL_BYTES = 20000
GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class _PipeClient:
    """A `WeightClient` whose calls go through the pipe to the child."""

    call: Callable[..., Any]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("init", init_info)

    def start_weight_update(self) -> None:
        self.call("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.call("update", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("finish", weight_version)


class LocalEngine:
    """An `Engine` of processes of its own, which the first push starts.

    Args:
        make_room: gives the trainer's spare memory back, before the engine takes some; None: what
            torch keeps of the GPU, for an engine on a GPU.
    """

    num_replicas = 1
    child_module = "megatron_vopd.rollout.vllm.child"

    def __init__(
        self, settings: LocalSettings, make_room: Callable[[], None] | None = None
    ) -> None:
        self.settings = settings
        self.policy_version: int | None = None
        self.generation: GenerationReport | None = None
        self.num_starts = 0
        self._process: subprocess.Popen | None = None
        self._connection: Any = None  # multiprocessing's Connection
        by_device = nothing_to_give_back if settings.device == "cpu" else give_back_gpu_memory
        self._sleeper = Sleeper(self._call, make_room or by_device)
        self._ipc: Any = None  # rollout.weights.ipc.IpcSender, which keeps its buffer
        self._log_start = 0
        self._shared_memory: set[str] = set()

    # -- the child ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the child if there is none.

        Raises:
            EngineError: it did not come up within `start_seconds`.
        """
        if self._process is not None:
            return
        settings = self.settings
        self._sleeper.reset()
        ours, theirs = Pipe()
        child = [sys.executable, "-m", self.child_module, f"fd={theirs.fileno()}"]
        supervisor = [sys.executable, "-m", SUPERVISOR_MODULE, str(os.getpid())]
        Path(settings.log_path).parent.mkdir(parents=True, exist_ok=True)
        with open(settings.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [*supervisor, *child],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=settings.environment(os.environ),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self._connection = ours
        self._shared_memory = set()
        self.num_starts += 1
        self._log_start = os.path.getsize(settings.log_path)
        self._call("load", settings.engine_arguments(), seconds=settings.start_seconds)
        self._shared_memory = mapped_shared_memory(self.processes())
        # vLLM logs failures of parts that are not used here while it starts.
        self._log_start = os.path.getsize(settings.log_path)

    @property
    def shared_dtype(self) -> torch.dtype | None:
        """The weights' type where they come through shared memory, on the CPU; else None."""
        settings = self.settings
        return getattr(torch, settings.dtype) if settings.device == "cpu" else None

    def processes(self) -> list[int]:
        """Return the process ids of the supervisor, the child and its workers."""
        return [] if self._process is None else session_pids(self._process.pid)

    def _call(
        self,
        command: str,
        *arguments: Any,
        seconds: float | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Any:
        """Send one command to the child and return its answer.

        Raises:
            EngineError: no answer in time, no process, or a refusal. The engine is ended.
        """
        if self._connection is None or self._process is None:
            raise EngineError(f"engine, {command}: not running; push weights first")
        if self._process.poll() is not None:
            self._fail(command, "its supervisor is gone, and nobody would end it after the trainer")
        begin = moved = time.monotonic()
        limit = seconds or self.settings.push_seconds
        deadline = begin + limit
        # A process that stops in the middle of a message leaves the pipe's other end waiting.
        alarm = threading.Timer(limit + GRACE_SECONDS, reap_session, (self._process.pid,))
        alarm.daemon = True
        alarm.start()
        try:
            self._connection.send((command, arguments))
            while True:
                until = deadline
                if on_progress is not None:
                    until = min(deadline, moved + self.settings.stall_seconds)
                if not self._connection.poll(max(0.0, until - time.monotonic())):
                    waited = time.monotonic() - begin
                    self._fail(command, f"no answer for {waited:.1f} s: it hangs or is stopped")
                kind, value = self._connection.recv()
                moved = time.monotonic()
                if kind == "ok":
                    return value
                if kind == "error":
                    self._fail(command, value, is_known=True)
                if on_progress is not None:
                    on_progress(value)
        except (EOFError, ConnectionError):
            late = time.monotonic() > deadline
            self._fail(command, "no answer in time" if late else "its process died")
        finally:
            alarm.cancel()

    def _fail(self, command: str, seen: str, is_known: bool = False) -> None:
        """End the engine, then raise, with the log's last error unless the cause is known."""
        last_words = "" if is_known else self._last_error()
        self._end()
        raise EngineError(
            f"engine, {command}: {seen}{last_words} (log: {self.settings.log_path})"
        ) from None

    def _last_error(self) -> str:
        """Find the last line of the engine's log that looks like a cause."""
        with suppress(OSError), open(self.settings.log_path, "rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, log.tell() - LOG_TAIL_BYTES))
            lines = log.read().decode("ascii", "replace").splitlines()
            causes = [line.strip() for line in lines if "Error: " in line]
            return f"; last error: {causes[-1][:300]}" if causes else ""
        return ""

    def _end(self) -> None:
        """End all processes of the engine, whatever state they are in."""
        self.policy_version = None
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if process is not None:
            gone = reap_session(process.pid, self._shared_memory)
            process.wait()
            if not gone:
                raise EngineError(f"engine: processes {session_pids(process.pid)} cannot be ended")
            if self._ipc is not None:
                self._ipc.take_back()

    # -- the protocol ------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """Sample, as `Engine.generate` says.

        Raises:
            EngineError: it died, hung or refused; its weights are gone.
            UserError: a prompt that leaves no room for the longest response.
        """
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        if longest + sampling.max_tokens > self.settings.max_model_len:
            raise UserError(
                f"engine: a prompt of {longest} tokens and a response of {sampling.max_tokens} "
                f"exceed max_model_len={self.settings.max_model_len}; filter long prompts, shorten "
                "the response, or raise the engine's context"
            )
        version = self._usable_version("generate")
        self.wake()
        begin = time.monotonic()
        places = [(p, sample) for p in range(len(prompts)) for sample in range(sampling.samples)]
        requests = [
            (p, response_seed(sampling.seed, prompts[p].prompt_id, sample)) for p, sample in places
        ]
        options = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(sampling.stop_ids),
        }
        responses = self._call(
            "generate",
            [list(prompt.ids) for prompt in prompts],
            requests,
            options,
            seconds=self.settings.deadline_seconds,
            on_progress=lambda done: progress(done, len(places)) if progress else None,
        )
        if progress is not None:
            progress(len(places), len(places))
        rollouts = [
            Rollout(prompts[p], sample, tuple(ids), tuple(logprobs), reason, version)
            for (p, sample), (ids, logprobs, reason) in zip(places, responses, strict=True)
        ]
        self.generation = generation_report(rollouts, time.monotonic() - begin)
        return rollouts

    def _usable_version(self, phase: str) -> int:
        """Return the version of the weights that the engine itself reports.

        Raises:
            EngineError: no weights, or others than were pushed last.
        """
        if self.policy_version is None:
            raise EngineError(f"engine, {phase}: it has no weights; push them first")
        found = self._call("version")
        if found != str(self.policy_version):
            self._fail(phase, f"it has weights {found!r}, expected {self.policy_version}")
        return self.policy_version

    def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]], policy_version: int
    ) -> PushReport:
        """Replace all weights, as `Engine.update_weights` says; start the child if there is none.

        Raises:
            EngineError: a tensor that does not fit, or a child that died or hung; it is ended.
        """
        self.start()
        self.policy_version = None
        self._sleeper.wake(WEIGHTS)
        begin = time.monotonic()
        try:
            sent = self._send(tensors, str(policy_version))
            self._reset_cache()
        except BaseException:
            # Half-loaded weights must not survive, whoever failed: the engine or the sender.
            self._end()
            raise
        self.policy_version = policy_version
        self._usable_version("push")
        seconds = time.monotonic() - begin
        return PushReport(policy_version, sent.num_bytes, seconds, sent.num_tensors)

    def _send(self, tensors: Iterable[tuple[str, Tensor]], weight_version: str) -> Any:
        dtype = getattr(torch, self.settings.dtype)
        if self.settings.device == "cpu":
            return send_weights(tensors, _PipeClient(self._call), dtype, weight_version)
        if self._ipc is None:
            from megatron_vopd.rollout.weights.ipc import IpcSender

            facts, _ = read_facts(f"{self.settings.model_dir}/config.json")
            self._ipc = IpcSender(ipc_buffer_bytes(facts, dtype.itemsize))
        return self._ipc.send(tensors, _PipeClient(self._call), dtype, weight_version)

    def _reset_cache(self) -> None:
        if not self._call("reset_cache"):
            self._fail("push", "the cache of the old weights' keys and values is still in use")

    def probe_logprobs(
        self, sequences: Sequence[Sequence[int]], replica: int = 0
    ) -> list[list[float]]:
        """Score sequences of two ids at least, as `Engine.probe_logprobs` says."""
        self._usable_version("probe")
        self.wake()
        return self._call("probe", [list(ids) for ids in sequences])

    def refuse_weights(self, reason: str) -> None:
        """End the child; the next push starts another."""
        self._end()

    def sleep(self, keeps_weights: bool) -> None:
        """Drop the cache, and move or drop the weights; an engine on the CPU stays awake."""
        if self.settings.device != "cpu" and self._process is not None:
            self._sleeper.sleep(keeps_weights)
            if self._sleeper.dropped:
                self.policy_version = None

    def wake(self) -> None:
        """Undo `sleep`; a push has woken the weights already."""
        self._sleeper.wake(WEIGHTS, CACHE)

    def close(self) -> None:
        """Ask the child to end, then end it."""
        if self._process is not None and self._connection is not None:
            with suppress(OSError):
                self._connection.send(("close", ()))
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        self._end()


class FrozenEngine(LocalEngine):
    """A `LocalEngine` with the weights of its folder, for settings with `reads_weights`.

    The first `generate` starts it.
    """

    policy_version: int | None

    def _usable_version(self, phase: str) -> int:
        """Start the child, which reads its weights; there is one version of them."""
        self.start()
        version = 0
        self.policy_version = version
        return version
