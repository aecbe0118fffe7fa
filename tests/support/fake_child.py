"""A process in the place of vLLM's: it answers the same commands, or fails by its model's name."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection
from typing import Any


class FakeChild:
    """An engine's process without an engine; `mode`, the model's folder name, says what fails."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.mode, self.weights = "", "default"
        self.updates: list[dict[str, Any]] = []

    def load(self, settings: dict[str, Any]) -> None:
        self.mode = settings["model"]
        print("ValueError: a warning while it starts", file=sys.stderr, flush=True)
        if self.mode == "hangs at start":
            time.sleep(60)
        if self.mode == "dies at start":
            print("OSError: no such model", file=sys.stderr, flush=True)
            os._exit(1)

    def init(self, info: dict[str, Any]) -> None:
        pass

    def start(self) -> None:
        self.updates = []

    def update(self, info: dict[str, Any]) -> None:
        self.updates.append(info)
        if self.mode == "refuses":
            raise ValueError("weight a has shape [2]")
        if self.mode == "dies in a push":
            os._exit(1)

    def finish(self, version: str) -> None:
        self.weights = "0" if self.mode == "keeps old weights" else version

    def reset_cache(self) -> bool:
        return self.mode != "cache in use"

    def version(self) -> str:
        return self.weights

    def received(self) -> list[dict[str, Any]]:
        return self.updates

    def sleep(self, level: int) -> None:
        pass

    def wake(self, tags: list[str]) -> None:
        pass

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def generate(self, prompts: list, requests: list, options: dict[str, Any]) -> Any:
        for done in range(len(requests)):
            self._connection.send(("progress", done))
            if self.mode == "slow":
                time.sleep(0.5)
        if self.mode == "hangs":
            time.sleep(60)
        if self.mode == "dies":
            os._exit(1)
        length = options["max_tokens"]
        return [([seed % 99] * length, [-1.0] * length, "length") for _, seed in requests]

    def probe(self, sequences: list[list[int]]) -> list[list[float]]:
        return [[-1.0] * (len(ids) - 1) for ids in sequences]


def main() -> None:
    connection = Connection(int(sys.argv[1].removeprefix("fd=")))
    child = FakeChild(connection)
    while True:
        command, arguments = connection.recv()
        if command == "close":
            return
        try:
            connection.send(("ok", getattr(child, command)(*arguments)))
        except ValueError as error:
            connection.send(("error", f"ValueError: {error}"))


if __name__ == "__main__":
    main()
