"""The connection of a pipeline job's process with the sandbox, and the cache behind it."""

import json
import os
import threading
from multiprocessing.connection import Connection
from typing import Any

from kfp.local import cache

from sandbox.pipelines.values import JSON


class Sandbox:
    """The other end of the connection. Several threads may ask at once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._answers: dict[int, JSON] = {}
        self._arrived = threading.Condition()
        self._last = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                answer = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(1)  # the sandbox has ended
            with self._arrived:
                self._answers[answer["id"]] = answer
                self._arrived.notify_all()

    def tell(self, kind: str, **fields: Any) -> None:
        with self._lock:
            self._connection.send_bytes(json.dumps({"kind": kind, **fields}).encode())

    def ask(self, kind: str, **fields: Any) -> JSON:
        with self._lock:
            self._last += 1
            number = self._last
        self.tell(kind, id=number, **fields)
        with self._arrived:
            self._arrived.wait_for(lambda: number in self._answers)
            return self._answers.pop(number)


class Outputs(cache.LocalCache):  # type: ignore[misc]
    """KFP's cache, with its keys, in the sandbox's state: a folder would outlive `--fresh`."""

    def __init__(self, sandbox: Sandbox, here: threading.local) -> None:
        self._sandbox = sandbox
        self._here = here

    def get(self, key: str) -> JSON | None:
        found = self._sandbox.ask("cached", key=key, task=self._here.task.unique)["outputs"]
        return None if found is None else self._deserialize_outputs(found)

    def put(self, key: str, outputs: JSON) -> None:
        self._sandbox.tell("cache", key=key, outputs=self._serialize_outputs(outputs))
