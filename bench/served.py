"""The servers that are compared: ours as `make serve` starts it, and the Flask server of a YOLOv5 checkout."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.load import BenchError, Question
from bench.pipelines import CORES
from serving.contract import PREDICT_ROUTE
from serving.torchserve import free_ports

START_SECONDS = 120


class ServerProcess(ABC):
    """A server on a port of loopback. Raises BenchError if it does not start."""

    name: str
    ready: tuple[int, str]  # the status and path of the answer that says that it serves

    def __init__(self, port: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.port, began = port, time.perf_counter()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() > began + START_SECONDS:
                self.close()
                raise BenchError(f"{self.name} did not start; {log} says why")
            time.sleep(0.05)
        self.started_after = time.perf_counter() - began

    def _answers(self) -> bool:
        status, path = self.ready
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status == status
        return False

    @abstractmethod
    def question(self, picture: bytes, expected: int) -> Question:
        """The request that counts people in a JPEG."""

    def tree(self) -> dict[str, list[int]]:
        """Process ids by role."""
        return {self.name: [self.process.pid, *children(self.process.pid)]}

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by role."""
        return {role: sum(cpu_seconds(pid) for pid in pids) for role, pids in self.tree().items()}

    def memory(self) -> float:
        """Resident megabytes of all processes, a shared page counted once."""
        return sum(resident_megabytes(pid) for pids in self.tree().values() for pid in pids)

    def close(self) -> None:
        """End it with all that it started."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class HeadcountServer(ServerProcess):
    """The server as `make serve` starts it, with a worker for each core of the comparison."""

    name, ready = "server", (200, "/ping")

    def __init__(self, archive: Path, log: Path) -> None:
        port, grpc = free_ports(2)
        command = [
            sys.executable, "-m", "serving.launcher", "--archive", str(archive), "--port", str(port),
            "--grpc", f"127.0.0.1:{grpc}",
        ]  # fmt: skip
        super().__init__(port, command, {"HEADCOUNT_WORKERS": str(CORES)}, log)

    def question(self, picture: bytes, expected: int) -> Question:
        return Question(
            self.name, self.port, PREDICT_ROUTE, "image/jpeg", picture, expected,
            lambda content: int(json.loads(content)["count"]),
        )  # fmt: skip

    def tree(self) -> dict[str, list[int]]:
        java = children(self.process.pid)
        return {"front": [self.process.pid], "java": java, "workers": [pid for one in java for pid in children(one)]}


class FlaskServer(ServerProcess):
    """The Flask REST server of a YOLOv5 checkout, see flask_peer.py. python: an interpreter with its packages."""

    name, ready = "flask", (404, "/")

    def __init__(self, checkout: Path, python: Path, checkpoint: Path, scratch: Path) -> None:
        (port,) = free_ports(1)
        driver = Path(__file__).with_name("flask_peer.py")
        command = [str(python), str(driver), str(checkout.absolute()), str(checkpoint.absolute()), str(port)]
        # It installs nothing and writes its settings elsewhere than into the user's home.
        environment = {"YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
        super().__init__(port, command, environment, scratch / "flask.log")

    def question(self, picture: bytes, expected: int) -> Question:
        boundary = "a-boundary-that-is-in-no-picture"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="picture.jpg"\r\n'
        body = head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + picture + f"\r\n--{boundary}--\r\n".encode()
        return Question(
            self.name, self.port, "/v1/object-detection/people", f"multipart/form-data; boundary={boundary}", body,
            expected, lambda content: sum(found["name"] == "person" for found in json.loads(content)),
        )  # fmt: skip


def flask_python(checkout: Path) -> Path:
    """The interpreter of a checkout's virtual environment. Raises BenchError."""
    if not (checkout / "utils" / "flask_rest_api" / "restapi.py").exists():
        raise BenchError(
            f"{checkout} is no checkout of YOLOv5, because it has no utils/flask_rest_api/restapi.py; make one with "
            f"git clone https://github.com/ultralytics/yolov5 {checkout}"
        )
    for name in (".venv", "venv"):
        if (python := checkout / name / "bin" / "python").exists():
            return python.absolute()
    raise BenchError(
        f"{checkout} has no virtual environment; make one with python3 -m venv {checkout}/.venv && "
        f"{checkout}/.venv/bin/pip install -r {checkout}/requirements.txt flask, or name one with --flask-python"
    )


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
