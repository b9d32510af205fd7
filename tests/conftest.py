"""What tests share: real data, the checkpoint, and a running server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent

# One thread of arithmetic: two that spin for each other on a busy machine are slower by far.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data() -> Path:
    """Real pictures and tables, beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip(f"no pictures at {folder}")
    return folder


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """yolov5n.pt as `make` fetched it."""
    path = ROOT / ".headcount" / "weights" / "yolov5n.pt"
    if not path.exists():
        pytest.fail(f"{path} is missing; run the tests with `make test`")
    return path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass
class Server:
    """A launcher with everything it started, on free ports."""

    archive: Path
    environment: dict[str, str] = field(default_factory=dict)
    log: Path = Path(os.devnull)
    process: subprocess.Popen[bytes] | None = None
    program: tuple[str, ...] = ("-m", "serving.launcher")

    def start(self) -> Server:
        """Start without waiting for it to be ready."""
        self.port, self.grpc = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.predict = f"{self.url}/predictions/people"
        self.process = subprocess.Popen(
            [sys.executable, *self.program, "--archive", str(self.archive)],
            stdout=self.log.open("wb"), stderr=subprocess.STDOUT, cwd=self.log.parent,
            env=os.environ | {
                "HEADCOUNT_WORKERS": "2", "AIP_HTTP_PORT": str(self.port), "HEADCOUNT_GRPC": f"127.0.0.1:{self.grpc}",
            } | self.environment,
        )  # fmt: skip
        return self

    def wait(self, status: int = 200, seconds: float = 60) -> float:
        """Seconds until /ping answers with the status."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            assert self.process is not None
            if self.process.poll() is not None:
                pytest.fail(f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ping", timeout=2).status_code == status:
                    return time.monotonic() - began
            time.sleep(0.05)
        pytest.fail(f"/ping did not answer {status} in {seconds} s:\n{self.log.read_text()[-3000:]}")

    def workers(self) -> list[int]:
        """Process ids of TorchServe's workers."""
        return [pid for pid in self.processes() if "model_service_worker" in _command(pid)]

    def processes(self) -> list[int]:
        """Process ids of everything below the launcher."""
        assert self.process is not None
        parents: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(stat.parent.name))
        found, todo = [], [self.process.pid]
        while todo:
            children = parents.get(todo.pop(), [])
            found += children
            todo += children
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def log_lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


@pytest.fixture(scope="session")
def archive(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model archive, without compiled networks."""
    from serving.archive import make_archive

    folder = tmp_path_factory.mktemp("archive") / "people"
    make_archive(checkpoint, folder)
    return folder


@contextlib.contextmanager
def running(archive: Path, log: Path, **environment: str) -> Iterator[Server]:
    """A server of one test's own."""
    server = Server(archive, environment, log).start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share; none of them may leave it broken."""
    with running(archive, tmp_path_factory.mktemp("server") / "log") as one:
        yield one
