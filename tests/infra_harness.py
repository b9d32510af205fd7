"""A tiny image with the contract of the serving image, for tests that deploy."""

import shutil
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = """\
FROM python:3.11-slim-bookworm
ARG SOURCES=
LABEL headcount.sources="${SOURCES}"
COPY serving/server.py /server.py
ENTRYPOINT ["python", "/server.py"]
"""
SERVER = """\
import http.server, json, os, signal, threading, urllib.request

COUNT = 4


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({"status": "Healthy"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        model = {"name": "tiny", "version": "1"}
        one = {"count": COUNT, "people": [], "image": {"width": 810, "height": 1080}, "model": model}
        if body.startswith(b"gs://"):
            bucket, _, name = body[5:].decode().partition("/")
            host = os.environ["STORAGE_EMULATOR_HOST"]
            with urllib.request.urlopen(f"{host}/storage/v1/b/{bucket}/o/{name}?alt=media") as answer:
                one["read"] = answer.read().decode()
        self.answer({"predictions": [one]} if body[:1] == b"{" else one)

    def answer(self, what):
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["AIP_HTTP_PORT"])), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def write_tiny_sources(folder: Path) -> None:
    """What a build context needs: a Dockerfile, its .dockerignore, a server, and weights that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / ".dockerignore", folder)
    for name, text in (
        ("Dockerfile", DOCKERFILE),
        ("serving/server.py", SERVER),
        (".headcount/weights/yolov5n.pt", "weights"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def forget_images(registry: str) -> None:
    """Removes what Docker pulled from a test's registry."""
    listed = subprocess.run(["docker", "images", "--format", "{{.ID}} {{.Repository}}"], capture_output=True, text=True)
    ids = [line.split()[0] for line in listed.stdout.splitlines() if line.split()[1].startswith(registry + "/")]
    if ids:
        subprocess.run(["docker", "rmi", "-f", *ids], capture_output=True)
