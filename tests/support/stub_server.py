"""A small HTTP server in the place of vLLM's, which misbehaves on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub(ThreadingHTTPServer):
    """A server that answers like vLLM; `mode` says how it misbehaves.

    Attributes:
        hooks: path -> what else a POST to it does with its body; an exception is a status of 500.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "sound"
        self.version = "default"
        self.context: Any = 4096
        self.calls: list[str] = []
        self.last_body: Any = None
        self.hang_after = 10**9
        self.gone = threading.Event()
        self.num_workers = 2
        self.hooks: dict[str, Callable[[Any], None]] = {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def end(self) -> None:
        """Stop answering, and let go of everybody who waits."""
        self.gone.set()
        self.shutdown()
        self.server_close()

    @property
    def num_generated(self) -> int:
        return sum(path.endswith("/generate") for path in self.calls)


class Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.server.mode == "hung":
            self.server.gone.wait(20)
        if self.path == "/get_world_size":
            self.answer({"world_size": self.server.num_workers})
        elif self.path == "/v1/models":
            self.answer({"data": [{"id": "model", "max_model_len": self.server.context}]})
        elif self.path == "/weight_info":
            self.answer({"weight_version": self.server.version})
        else:
            self.answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
        self.server.calls.append(self.path)
        self.server.last_body = body
        if self.server.num_generated > self.server.hang_after:
            self.server.mode = "hung"
        mode = self.server.mode
        if mode == "hung":
            self.server.gone.wait(20)
        if self.path == "/finish_weight_update":
            self.server.version = body["weight_version"] or self.server.version
        if self.path == "/update_weight_version":
            self.server.version = body["new_version"]
        try:
            self.server.hooks.get(self.path, lambda body: None)(body)
        except Exception as error:  # as vLLM answers whatever a worker raised
            self.answer({"error": str(error)}, 500)
            return
        if not self.path.endswith("/generate"):
            self.answer({}, 500 if mode == "no push" and self.path == "/update_weights" else 200)
        elif mode in ("failing", "refusing"):
            self.answer({"error": mode}, 500 if mode == "failing" else 400)
        else:
            self.answer(self.response(body["sampling_params"], mode))

    def response(self, params: dict[str, Any], mode: str) -> dict[str, Any]:
        length = params["max_tokens"]
        logprob = -9999.0 if mode == "nan" else -1.5
        if params.get("top_k") == 1:
            logprob = -0.3 if mode == "raw log-probs" else 0.0
        version = "0" if mode == "restarted" else self.server.version
        ids = [params["seed"] % 50 + i for i in range(length)]
        choice = {
            "token_ids": ids,
            "finish_reason": "length",
            "logprobs": {"content": [{"token_id": i, "logprob": logprob} for i in ids]},
            "weight_versions": [{"version": version, "start": 0, "end": length}],
        }
        return {"choices": [choice]}

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
