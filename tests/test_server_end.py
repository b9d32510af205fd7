"""The real server's start and end."""

from __future__ import annotations

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import Server, running
from fake_storage import FakeStorage
from helpers import encode, eventually, instance
from PIL import Image
from server_harness import (
    SMALL,
    all_workers,
    counts_four,
    listening,
    living,
    metrics,
    post,
    post_json,
    refused,
    run_folder,
)

from headcount import Client, CountError
from serving.run_folder import sweep

pytestmark = [pytest.mark.slow, pytest.mark.needs("samples")]


def test_broken_weights_end_the_server_with_the_reason(archive: Path, tmp_path: Path) -> None:
    broken = tmp_path / "archive"
    shutil.copytree(archive, broken, ignore=shutil.ignore_patterns("__pycache__"))  # a server may be writing them
    next(broken.glob("*.pt")).write_bytes(b"PK\x03\x04 no weights")
    server = Server(broken, {"HEADCOUNT_WORKERS": "1"}, tmp_path / "log").start()
    assert server.process is not None
    assert server.process.wait() == 1
    last = server.log_lines()[-1]
    assert last["severity"] == "CRITICAL"
    assert next(archive.glob("*.pt")).name in str(last["message"])


def test_sigterm_before_it_is_ready_ends_it_too(archive: Path, tmp_path: Path) -> None:
    server = Server(archive, {}, tmp_path / "log").start()
    server.wait(503)
    processes = server.processes()
    assert server.stop() == 0
    assert eventually(lambda: not living(processes))


def test_from_ready_to_sigkill(archive: Path, tmp_path: Path, bus: bytes) -> None:
    """Ready means that the next picture is counted. A launcher that is killed leaves nothing for long."""
    server = Server(archive, {}, tmp_path / "log").start()
    try:
        server.wait(503)
        refused(post(server, bus), 503, "no worker is ready")
        server.wait(200)
        counts_four(server, bus)
        # A worker that TorchServe has not connected to yet would wait 30 s for it.
        all_workers(server)
        processes, folder = server.processes(), run_folder(server)
        assert len(processes) >= 3
        os.utime(folder / "lock", (0, 0))
        sweep(folder.parent)
        assert folder.exists(), "its launcher is alive"
    finally:
        server.stop(signal.SIGKILL)
    assert eventually(lambda: not living(processes)), living(processes)
    sweep(folder.parent)  # as the next launcher does
    assert not folder.exists()


def test_as_vertex_ai_runs_it(archive: Path, tmp_path: Path, checkpoint: Path, bus: bytes) -> None:
    """Routes, the model and pictures from a bucket, another class, limits, the one public port, and SIGTERM."""
    objects = {
        "models/of/ours/own.pt": checkpoint.read_bytes(),
        "models/of/ours/labels.txt": b"",
        "pictures/a b/büs.jpg": bus,
    }
    with FakeStorage(objects) as storage:
        environment = {
            "AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": "/v1/count", "AIP_STORAGE_URI": "gs://models/of/ours",
            "STORAGE_EMULATOR_HOST": storage.url, "HEADCOUNT_CLASS": "bus", "HEADCOUNT_BUCKETS": "pictures",
            "HEADCOUNT_HOST": "0.0.0.0", "HEADCOUNT_WORKERS": "1", "HEADCOUNT_MAX_PIXELS": "20000000",
            "HEADCOUNT_MAX_REQUEST_BYTES": "1000000", "HEADCOUNT_LOG_LEVEL": "WARNING",
            "HEADCOUNT_GRACE_SECONDS": "3",
        }  # fmt: skip
        with running(archive, tmp_path / "log", **environment) as server:
            assert httpx.get(f"{server.url}/health").status_code == 200
            instances = [{"image": {"uri": f"gs://pictures/{name}"}} for name in ("a b/büs.jpg", "none.jpg")]
            answer = httpx.post(f"{server.url}/v1/count", json={"instances": [*instances, instance(bus)]}, timeout=60)
            remote, missing, sent = answer.json()["predictions"]
            assert (remote["count"], remote["model"]["name"]) == (1, "own")
            assert remote == sent
            assert "gs://pictures/none.jpg does not exist" in missing["error"]["message"]
            refused(post(server, encode(Image.new("1", (5000, 5000)))), 400, "at most 20 megapixels")
            refused(post(server, bytes(1_100_000)), 413, "larger than 1 MB")
            with Client(grpc=f"127.0.0.1:{server.grpc}") as client:
                with pytest.raises(CountError, match="larger than"):
                    client.count(bytes(1_100_000))
                assert client.count(bus).count == 1
            assert server.process is not None
            public = [one for one in listening([server.process.pid, *server.processes()]) if one[0] != "127.0.0.1"]
            assert public == [("0.0.0.0", server.port)]
            finishes_what_is_in_flight_and_leaves_nothing(server)
    assert server.log.read_text() == ""


def finishes_what_is_in_flight_and_leaves_nothing(server: Server) -> None:
    folder, processes, (worker,) = run_folder(server), server.processes(), server.workers()
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(4) as pool, Client(grpc=f"127.0.0.1:{server.grpc}") as client:
        rest = [pool.submit(post_json, server, [instance(SMALL)] * 3) for _ in range(2)]
        remote = pool.submit(client.count, SMALL)
        assert eventually(lambda: metrics(server)["headcount_queue"] == 2)
        assert server.process is not None
        server.process.terminate()
        server.wait(503)
        rest.append(pool.submit(post_json, server, [instance(SMALL)] * 3))
        assert eventually(lambda: metrics(server)["headcount_queue"] == 3), "requests are taken for the grace"
        os.kill(worker, signal.SIGCONT)
        for one in rest:
            assert [p["count"] for p in one.result().json()["predictions"]] == [0] * 3
        assert remote.result().count == 0
    assert server.process.wait() == 0
    assert not folder.exists()
    assert eventually(lambda: not living(processes))
