"""Shared by several test files: places, ports, waiting, load, and pictures."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# At the default parameters, and with both checkpoints and both encodings that headcount.data may fetch. At a confidence
# of 0.6 three people of the bus are left.
PEOPLE = {"bus.jpg": 4, "zidane.jpg": 2}


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def eventually(holds: Callable[[], Any], seconds: float = 60) -> bool:
    """Whether a condition becomes true. The limit only ends a test that would wait for ever."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Load:
    """Asks an endpoint without a pause from several threads while its block runs.

    body: an object to send as JSON, or bytes. says: the field of the answer to note. answers: how often each (status,
    that field) came; a request without an answer counts as its exception.
    """

    def __init__(self, url: str, body: object, says: str = "deployedModelId", threads: int = 3) -> None:
        self.url, self.says = url, says
        self.request = {"content": body} if isinstance(body, bytes) else {"json": body}
        self.answers: Counter[tuple[Any, Any]] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self.url, **self.request)
                    said: tuple[Any, Any] = answer.status_code, answer.json().get(self.says)
                except Exception as error:
                    said = type(error).__name__, str(error)
                self.answers[said] += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def instance(picture: bytes) -> dict[str, Any]:
    """A picture as an instance of a JSON request."""
    return {"image": {"b64": base64.b64encode(picture).decode()}}
