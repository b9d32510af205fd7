"""A model server of a hundred lines with the contract of the serving image, for the tests' tiny image.

Standard library only. It answers JSON instances with the container's circumstances, application/x-text with the text
reversed, and anything else with COUNT people. Its environment: TINY_EXIT ends it at once, TINY_SECONDS is the time
until it is healthy. A request's parameters: sleep (seconds), status (to answer with), exit.
"""

import http.server
import json
import os
import pathlib
import signal
import sys
import threading
import time
import urllib.request
from typing import Any

COUNT = 4

if os.environ.get("TINY_EXIT"):
    print("loading\nno weights", flush=True)
    sys.exit(3)
STARTED = time.monotonic()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        early = time.monotonic() - STARTED < float(os.environ.get("TINY_SECONDS", 0))
        sick = early or self.path != os.environ["AIP_HEALTH_ROUTE"] or pathlib.Path("/tmp/sick").exists()
        self.answer(503 if sick else 200, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        kind = self.headers.get("content-type", "")
        if self.path != os.environ["AIP_PREDICT_ROUTE"]:
            self.answer(404, b"not here")
        elif kind == "application/x-text":
            self.answer(200, body[::-1], kind)
        elif body.startswith(b"{"):
            self.predict(json.loads(body))
        else:
            self.answer(200, json.dumps(counted(body)).encode())

    def predict(self, request: dict[str, Any]) -> None:
        parameters = request.get("parameters") or {}
        if parameters.get("sleep"):
            pathlib.Path("/tmp/asleep").touch()
            time.sleep(parameters["sleep"])
        if parameters.get("status"):
            self.answer(parameters["status"], b'{"error": "no such picture"}')
            return
        if parameters.get("exit"):
            os._exit(9)
        shm = os.statvfs("/dev/shm")
        circumstances = {
            "host": os.uname().nodename,
            "argv": sys.argv[1:],
            "env": dict(os.environ),
            "shm": shm.f_blocks * shm.f_frsize,
        }
        predictions = [counted(content(one)) | circumstances for one in request["instances"]]
        self.answer(200, json.dumps({"predictions": predictions}).encode())

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def content(instance: Any) -> bytes:
    """The address of an instance that is in a bucket; b"" of any other."""
    image = instance.get("image") if isinstance(instance, dict) else None
    return str(image["uri"]).encode() if isinstance(image, dict) and "uri" in image else b""


def counted(body: bytes) -> dict[str, Any]:
    """The answer for one picture; of an object in a bucket also its content."""
    answer: dict[str, Any] = {
        "count": COUNT,
        "people": [],
        "image": {"width": 810, "height": 1080},
        "model": {"name": "tiny", "version": "1"},
    }
    if body.startswith(b"gs://"):
        bucket, _, name = body[5:].decode().partition("/")
        host = os.environ["STORAGE_EMULATOR_HOST"]
        with urllib.request.urlopen(f"{host}/storage/v1/b/{bucket}/o/{name}?alt=media") as read:
            answer["read"] = read.read().decode()
    return answer


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["AIP_HTTP_PORT"])), Handler)
    # Requests in flight are answered before the end.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print("tiny model listens", flush=True)
    server.serve_forever()
    server.server_close()
