"""Requests to vLLM's HTTP servers: to one, to all of them, or many spread over several.

Only the standard library: no HTTP client comes with every version of what this package depends on.
A connection per request: a response takes seconds, a local connection a millisecond.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from megatron_vopd.errors import EngineError, UserError

HEALTH_SECONDS = 5.0
RETRY_SECONDS = 0.5
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RefusedByServerError(EngineError):
    """A server's refusal of a request that it understood: another attempt would not help."""


class Server:
    """One server, by its URL http://host:port."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"engine server {url!r}: expected http://host:port")
        self.url = url.rstrip("/")
        self.host, self.port = parts.hostname, parts.port
        self._secure = parts.scheme == "https"
        self._open: set[http.client.HTTPConnection] = set()

    @property
    def is_local(self) -> bool:
        """True if its address is this machine's own."""
        return self.host in LOOPBACK

    def call(self, method: str, path: str, body: Any = None, seconds: float = 60.0) -> Any:
        """Make one request; return its JSON answer, None where the answer is empty.

        Raises:
            RefusedByServerError: status 4xx.
            EngineError: no answer within `seconds` of silence, another status, no JSON.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=max(0.01, seconds))
        self._open.add(connection)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"server {self.url}, {path}: {error or type(error).__name__}"
            ) from None
        finally:
            self._open.discard(connection)
            connection.close()
        if response.status != 200:
            refused = 400 <= response.status < 500
            kind_of_error = RefusedByServerError if refused else EngineError
            shown = text[:300].decode("ascii", "replace")
            raise kind_of_error(f"server {self.url}, {path}: status {response.status}: {shown}")
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise EngineError(f"server {self.url}, {path}: its answer is not JSON") from None

    def own_address(self) -> tuple[str, int]:
        """Return the address at which the server can reach this process, and a free port of it."""
        with socket.create_connection((self.host, self.port), timeout=HEALTH_SECONDS) as used:
            address = used.getsockname()[0]
        with socket.socket() as free:
            free.bind((address, 0))
            return address, free.getsockname()[1]

    def is_healthy(self) -> bool:
        """Return whether it answers now."""
        try:
            self.call("GET", "/health", seconds=HEALTH_SECONDS)
        except EngineError:
            return False
        return True

    def abandon(self) -> None:
        """Make every request under way fail."""
        for connection in list(self._open):
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)


class AllServersClient:
    """A `WeightClient` whose calls go to several servers at once.

    Attributes:
        on_failure: called with the error of a server, from any thread, while others still answer.

    Args:
        seconds: for one answer.
    """

    def __init__(self, servers: Sequence[Server], seconds: float) -> None:
        self._servers = servers
        self._seconds = seconds
        self.on_failure: Callable[[EngineError], None] = lambda error: None

    def post(self, path: str, body: Any = None) -> None:
        """POST to every server, wait for all answers, then raise the first failure."""
        self._post_each(path, [body] * len(self._servers))

    def _post_each(self, path: str, bodies: Sequence[Any]) -> None:
        with ThreadPoolExecutor(max_workers=max(1, len(self._servers))) as pool:
            pairs = zip(self._servers, bodies, strict=True)
            waiting = [pool.submit(self._post_one, server, path, body) for server, body in pairs]
            for done in waiting:
                done.result()

    def _post_one(self, server: Server, path: str, body: Any) -> None:
        try:
            server.call("POST", path, body, self._seconds)
        except EngineError as error:
            self.on_failure(error)
            raise

    def abandon(self) -> None:
        """Make every request under way fail."""
        for server in self._servers:
            server.abandon()

    def world_sizes(self) -> list[int]:
        """Ask each server for the number of its workers."""
        answers = [s.call("GET", "/get_world_size", seconds=self._seconds) for s in self._servers]
        return [answer["world_size"] for answer in answers]

    def weight_versions(self) -> set[str]:
        """Ask each server for the version of its weights."""
        answers = [s.call("GET", "/weight_info", seconds=self._seconds) for s in self._servers]
        return {answer["weight_version"] for answer in answers}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the workers of all servers to one communicator, ranks server after server."""
        sizes = self.world_sizes()
        infos = [
            init_info | {"rank_offset": init_info["rank_offset"] + sum(sizes[:number])}
            for number in range(len(sizes))
        ]
        self._post_each("/init_weight_transfer_engine", [{"init_info": info} for info in infos])

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", {"weight_version": weight_version})


class Dispatcher:
    """A queue of jobs for several servers: a server takes the next when it has a slot free.

    A job whose server fails goes back into the queue. A server that has neither answered nor been
    healthy for `stall_seconds` gets no more; when none is left, or time is up, all of it fails.

    Args:
        send: (server, job, seconds left) -> result; called from several threads.
        concurrency: slots of each server, that is jobs under way on it.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        send: Callable[[Server, Any, float], Any],
        concurrency: int,
        deadline_seconds: float,
        stall_seconds: float,
    ) -> None:
        self._servers = servers
        self._send = send
        self._concurrency = concurrency
        self._deadline = time.monotonic() + deadline_seconds
        self._stall_seconds = stall_seconds
        self._changed = threading.Condition()
        self._waiting: deque[int] = deque()
        self._jobs: Sequence[Any] = ()
        self._results: dict[int, Any] = {}
        self._fatal: EngineError | None = None
        self._last_error = ""
        self._last_seen = {server.url: time.monotonic() for server in servers}
        self._dropped: set[str] = set()

    def run(self, jobs: Sequence[Any], on_done: Callable[[int], None]) -> list[Any]:
        """Return results in the order of the jobs.

        Args:
            on_done: called with the number of finished jobs, every 0.2 s at least.

        Raises:
            EngineError: a refusal, no server left, or out of time.
        """
        self._jobs = jobs
        self._waiting.extend(range(len(jobs)))
        workers = min(self._concurrency, len(jobs))
        for server in self._servers:
            threading.Thread(target=self._watch, args=(server,), daemon=True).start()
            for _ in range(workers):
                threading.Thread(target=self._work, args=(server,), daemon=True).start()
        try:
            with self._changed:
                while not self._is_over():
                    self._changed.wait(timeout=0.2)
                    on_done(len(self._results))
        finally:
            self._waiting.clear()
            for server in self._servers:
                server.abandon()
        if self._fatal is not None:
            raise self._fatal
        if len(self._results) < len(jobs):
            late = time.monotonic() >= self._deadline
            why = "out of time" if late else "no server is left"
            raise EngineError(
                f"servers, generate: {why} with {len(self._results)} of {len(jobs)} responses; "
                f"last error: {self._last_error or 'none'}"
            )
        return [self._results[number] for number in range(len(jobs))]

    def _is_over(self) -> bool:
        return (
            len(self._results) == len(self._jobs)
            or self._fatal is not None
            or time.monotonic() >= self._deadline
            or len(self._dropped) == len(self._servers)
        )

    def _work(self, server: Server) -> None:
        while server.url not in self._dropped and not self._is_over():
            try:
                number = self._waiting.popleft()
            except IndexError:
                time.sleep(0.05)
                continue
            try:
                left = self._deadline - time.monotonic()
                result = self._send(server, self._jobs[number], left)
            except EngineError as error:
                with self._changed:
                    self._last_error = str(error)
                    self._waiting.append(number)
                    if isinstance(error, RefusedByServerError):
                        self._fatal = error
                        self._changed.notify_all()
                time.sleep(RETRY_SECONDS)
                continue
            with self._changed:
                self._results[number] = result
                self._last_seen[server.url] = time.monotonic()
                self._changed.notify_all()

    def _watch(self, server: Server) -> None:
        while not self._is_over():
            if server.is_healthy():
                self._last_seen[server.url] = time.monotonic()
            elif time.monotonic() - self._last_seen[server.url] > self._stall_seconds:
                with self._changed:
                    self._dropped.add(server.url)
                    self._last_error = f"server {server.url} does not answer"
                    self._changed.notify_all()
                server.abandon()
                return
            time.sleep(min(1.0, self._stall_seconds / 4))
