"""A small server that counts as its pictures say, and misbehaves as it is told."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from headcount import counters


class Stub(ThreadingHTTPServer):
    """Finds as many people in a "picture" as the number in its bytes says.

    refusals: (status, headers, body) of its next answers; None drops the connection. hangs_after: it answers so many
    requests, and no more while it is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refusals: list[tuple[int, dict[str, str], str] | None] = []
        self.hangs_after: int | None = None
        self.requests: list[tuple[str, dict[str, list[str]]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((url.path, query))
        number = len(self.server.requests)
        while self.server.hangs_after is not None and number > self.server.hangs_after:
            time.sleep(0.05)
        if self.server.refusals:
            if refusal := self.server.refusals.pop(0):
                self._send(*refusal)
            else:
                self.close_connection = True
        elif not data.isdigit():
            self._send(400, {}, json.dumps({"error": {"code": 400, "message": "this is not a picture"}}))
        else:
            answer: dict[str, Any] = prediction(int(data))
            if query.get("annotate") == ["true"]:
                answer["annotated"] = {"b64": base64.b64encode(b"drawn " + data).decode()}
            self._send(200, {}, json.dumps(answer))

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the command may end before it is answered
            super().handle()

    def _send(self, status: int, headers: dict[str, str], body: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())


def prediction(count: int) -> dict[str, Any]:
    return {
        "count": count,
        "people": [{"box": [1, 2, 3, 4.5], "confidence": 0.9}] * count,
        "image": {"width": 30, "height": 20},
        "looks": 1,
        "model": {"name": "stub", "version": "1"},
    }


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.hangs_after = None
        server.shutdown()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made."""
    made: list[float] = []
    monkeypatch.setattr(counters.time, "sleep", made.append)  # type: ignore[attr-defined]
    return made


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of "pictures" for the stub: 3 + 2 people, and one that is none."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"3")
    (folder / "b.png").write_bytes(b"no")
    (folder / "below" / "A.JPG").write_bytes(b"2")
    (folder / "notes.txt").write_bytes(b"7")
    return folder
