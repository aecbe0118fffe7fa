"""The engine's own process: vLLM's LLM behind a pipe.

`python -m megatron_vopd.rollout.vllm.child fd=N` is started by `local`, never by hand. It reads
(command, arguments) from the pipe, answers ("ok", result) or ("error", message), and while it
generates also ("progress", finished). The core of vLLM runs in this process, not in a further one
that could hang by itself; only tensor-parallel workers are processes of their own.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PROGRESS_SECONDS = 0.2


class Child:
    """vLLM's LLM and the commands that the trainer gives it, by their names."""

    def __init__(self, connection: Connection, settings: dict[str, Any]) -> None:
        try:
            # Without vLLM a checker takes the folder beside this file for it.
            from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
            from vllm.config import WeightTransferConfig  # pyright: ignore[reportMissingImports]
        except Exception as error:  # of a vLLM for another torch or CUDA, whatever that raises
            reason = f"{type(error).__name__}: {error}"
            remedy = "install it again, for the torch that is here"
            raise ImportError(f"vLLM does not import ({reason}); {remedy}") from error

        from megatron_vopd.rollout.weights.vllm_plugin import register

        register()
        self._connection = connection
        backend = settings.pop("transfer_backend", None)  # None: its weights come from a folder
        transfer = None if backend is None else WeightTransferConfig(backend=backend)
        self._llm: Any = LLM(weight_transfer_config=transfer, **settings)
        self._next_request = 0

    def init(self, init_info: dict[str, Any]) -> None:
        """Connect, and agree on how weights are packed."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start(self) -> None:
        """Begin a push. The cache of keys and values of the old weights is void from here on."""
        self._llm.start_weight_update()

    def update(self, update_info: dict[str, Any]) -> None:
        """Load a part of the weights."""
        self._llm.update_weights({"update_info": update_info})

    def finish(self, weight_version: str | None) -> None:
        """End a push: all parts have come; the weights get their version."""
        self._llm.finish_weight_update(weight_version)

    def reset_cache(self) -> bool:
        """Drop cached keys and values; return False if some are in use."""
        return bool(self._llm.reset_prefix_cache())

    def version(self) -> str:
        """Return the version of the weights that `finish` was called with."""
        return self._llm.get_weight_version()

    def sleep(self, level: int) -> None:
        """Give device memory back."""
        self._llm.sleep(level=level)

    def wake(self, tags: list[str]) -> None:
        """Take device memory again for what the tags name: weights, kv_cache."""
        self._llm.wake_up(tags=tags)

    def shut_down(self) -> None:
        """End the workers of a tensor-parallel engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def generate(
        self, prompts: list[list[int]], requests: list[tuple[int, int]], options: dict[str, Any]
    ) -> list[tuple[list[int], list[float], str]]:
        """Sample one response to each request (prompt number, seed).

        Returns:
            (ids, log-probs, finish reason) of each.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        # Exactly the given ids end a response: vLLM adds those of the model's folder otherwise.
        jobs = [
            (prompts[p], SamplingParams(seed=seed, logprobs=0, ignore_eos=True, **options))
            for p, seed in requests
        ]
        found = []
        for output in self._run(jobs):
            response = output.outputs[0]
            ids = list(response.token_ids)
            pairs = zip(ids, response.logprobs, strict=True)
            logprobs = [step[token].logprob for token, step in pairs]
            found.append((ids, logprobs, str(response.finish_reason)))
        return found

    def probe(self, sequences: list[list[int]]) -> list[list[float]]:
        """Score sequences, as `Engine.probe_logprobs` says.

        The last id is scored first and by sampling, which reads the cache. Scoring a whole prompt
        computes everything again, and leaves in the cache what it computed.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        last_jobs, whole_jobs = [], []
        for ids in sequences:
            last = SamplingParams(max_tokens=1, logprob_token_ids=[ids[-1]], ignore_eos=True)
            last_jobs.append((ids[:-1], last))
            whole_jobs.append((ids, SamplingParams(max_tokens=1, prompt_logprobs=0)))
        last_outputs, whole_outputs = self._run(last_jobs), self._run(whole_jobs)
        found = []
        for ids, last, whole in zip(sequences, last_outputs, whole_outputs, strict=True):
            steps = zip(ids[1:-1], whole.prompt_logprobs[1:-1], strict=True)
            scored = [step[token].logprob for token, step in steps]
            scored.append(last.outputs[0].logprobs[0][ids[-1]].logprob)
            found.append(scored)
        return found

    def _run(self, jobs: list[tuple[list[int], Any]]) -> list[Any]:
        """Run the jobs; return vLLM's outputs in their order, and send progress meanwhile."""
        from vllm.inputs.engine import tokens_input  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        engine = self._llm.llm_engine
        numbers = {}
        for number, (ids, params) in enumerate(jobs):
            params.detokenize = False
            params.output_kind = RequestOutputKind.FINAL_ONLY
            request = engine.add_request(str(self._next_request), tokens_input(ids), params)
            numbers[request] = numbers[str(self._next_request)] = number
            self._next_request += 1
        outputs: dict[int, Any] = {}
        reported = time.monotonic()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    outputs[numbers[output.request_id]] = output
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                self._connection.send(("progress", len(outputs)))
        return [outputs[number] for number in range(len(jobs))]


def serve(connection: Connection) -> None:
    """Answer commands until the pipe closes or `close` comes."""
    child: Child | None = None
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        if command == "close":
            if child is not None:
                child.shut_down()
            return
        try:
            if command == "load":
                child = Child(connection, *arguments)
                answer = ("ok", None)
            else:
                call: Callable[..., Any] = getattr(child, command)
                answer = ("ok", call(*arguments))
        # The only place that must answer whatever happened: the trainer waits at the other end.
        except Exception as error:
            traceback.print_exc()
            answer = ("error", f"{type(error).__name__}: {error}")
        connection.send(answer)


def main(arguments: list[str]) -> int:
    number = int(arguments[0].removeprefix("fd="))
    os.set_inheritable(number, False)
    connection = Connection(number)
    serve(connection)
    # The rest of vLLM's teardown has nothing to save; the supervisor ends what is left.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
