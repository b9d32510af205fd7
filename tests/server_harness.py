"""Requests to the real server, and looks at its processes and files."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from conftest import Server
from helpers import encode, eventually
from PIL import Image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
SMALL = encode(NOISE)


def post(server: Server, content: Any = b"", **options: Any) -> httpx.Response:
    return httpx.post(server.predict, content=content, timeout=240, **options)


def post_json(server: Server, instances: object, **parameters: Any) -> httpx.Response:
    body = json.dumps({"instances": instances, "parameters": parameters})
    return post(server, body.encode(), headers={"Content-Type": "application/json"})


def counts_four(server: Server, bus: bytes) -> None:
    answer = post(server, bus)
    assert (answer.status_code, answer.json().get("count")) == (200, 4), answer.text


def refused(answer: httpx.Response, status: int, says: str) -> None:
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def metrics(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def properties(server: Server) -> dict[str, str]:
    """TorchServe's settings, which lie in the run folder that Java's command line names."""
    for pid in server.processes():
        with contextlib.suppress(OSError):
            if found := re.search(rb"-Djava\.io\.tmpdir=([^\0]+)", Path(f"/proc/{pid}/cmdline").read_bytes()):
                folder = Path(found[1].decode())
                lines = (folder / "torchserve.properties").read_text().splitlines()
                return {"folder": str(folder)} | dict(line.split("=", 1) for line in lines if "=" in line)
    raise AssertionError("no Java below the launcher")


def run_folder(server: Server) -> Path:
    return Path(properties(server)["folder"])


def living(pids: list[int]) -> list[str]:
    """State and name of the processes that still run. A process that has ended and waits to be reaped does not run."""
    stats = []
    for pid in pids:
        with contextlib.suppress(OSError):
            stats.append(Path(f"/proc/{pid}/stat").read_text())
    return [stat for stat in stats if stat.rpartition(")")[2].split()[0] not in ("Z", "X")]


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Addresses the processes accept TCP connections on."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(fd.readlink()))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:"), int(port, 16)))
    return found


def all_workers(server: Server) -> None:
    assert eventually(lambda: metrics(server)["headcount_workers"] == 2)
    server.wait(200)
