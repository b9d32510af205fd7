"""The server as `make serve` starts it, under a closed loop of clients."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.pipelines import CORES
from serving.torchserve import free_ports

CONCURRENCY = 4


class Served:
    """The server as `make serve` starts it, and the load on it."""

    def __init__(self, archive: Path, log: Path) -> None:
        self.port, grpc = free_ports(2)
        self.log = log.open("wb")
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving.launcher", "--archive", archive, "--port", str(self.port),
             "--grpc", f"127.0.0.1:{grpc}"],
            env=os.environ | {"HEADCOUNT_WORKERS": str(CORES)},
            stdout=self.log, stderr=self.log,
        )  # fmt: skip
        while True:
            if self.process.poll() is not None or time.perf_counter() > began + 120:
                sys.exit(f"the server did not start; see {log}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{self.port}/ping").status_code == 200:
                    break
            time.sleep(0.05)
        self.started_after = time.perf_counter() - began

    def load(self, body: bytes, seconds: float = 0, requests: int = 0) -> dict[str, Any]:
        """A closed loop of CONCURRENCY clients for so many seconds or requests."""
        took: list[float] = []
        stop = time.perf_counter() + seconds if seconds else float("inf")
        left = threading.Semaphore(requests) if requests else None

        def client() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port)
            while time.perf_counter() < stop and (left is None or left.acquire(blocking=False)):
                began = time.perf_counter()
                connection.request("POST", "/predictions/people", body, {"Content-Type": "image/jpeg"})
                answer = connection.getresponse()
                content = answer.read()
                if answer.status != 200:
                    sys.exit(f"the server answered {answer.status}: {content[:300]!r}")
                took.append(time.perf_counter() - began)

        before, began, own = self.cpu(), time.perf_counter(), time.process_time()
        threads = [threading.Thread(target=client) for _ in range(CONCURRENCY)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall, own = time.perf_counter() - began, time.process_time() - own
        spent = {name: (after - before[name]) / len(took) * 1e3 for name, after in self.cpu().items()}
        return {
            "rate": len(took) / (wall - own / CORES), "wall rate": len(took) / wall, "cpu ms": spent,
            "p50": np.percentile(took, 50) * 1e3, "p99": np.percentile(took, 99) * 1e3,
        }  # fmt: skip

    def tree(self) -> dict[str, list[int]]:
        """Process ids by role."""
        roles: dict[str, list[int]] = {"front": [self.process.pid], "java": [], "workers": []}
        for pid in children(self.process.pid):
            roles["java"].append(pid)
            roles["workers"] += children(pid)
        return roles

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by role."""
        return {role: sum(cpu_seconds(pid) for pid in pids) for role, pids in self.tree().items()}

    def memory(self) -> float:
        """Resident megabytes of all processes, shared pages counted once for each."""
        return sum(resident_megabytes(pid) for pids in self.tree().values() for pid in pids)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
