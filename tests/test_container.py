"""The image as it is run in production: read-only, with two CPUs, as a user without rights, with Docker alone."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exported_models
import httpx
import pytest
import yolo_checkpoint
from helpers import ROOT, eventually, free_port, instance
from images import RUN, docker
from machine import docker_client
from PIL import Image

from headcount import Client
from serving.detector import cpu_flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class ServingContainer:
    """One run of the image, on ports that Docker picks."""

    def __init__(self, *options: str) -> None:
        self.began = time.monotonic()
        self.name = f"{RUN}-{uuid.uuid4().hex[:8]}"
        docker(
            "run", "--detach", "--name", self.name, "--read-only", "--tmpfs", "/tmp",
            "-e", "HEADCOUNT_GRPC=0.0.0.0:7070", "-p", "127.0.0.1::8080", "-p", "127.0.0.1::7070", *options, RUN,
        )  # fmt: skip
        ports = json.loads(docker("inspect", "-f", "{{json .NetworkSettings.Ports}}", self.name))
        self.url, self.grpc = (
            f"{scheme}127.0.0.1:{binding[0]['HostPort']}" if (binding := ports.get(port)) else "ended"
            for scheme, port in (("http://", "8080/tcp"), ("", "7070/tcp"))
        )

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in docker("logs", self.name).splitlines()]

    def count(self, picture: bytes) -> int:
        """As soon as it can, asked without a pause."""
        while time.monotonic() < self.began + 60:
            try:
                answer = httpx.post(f"{self.url}/predictions/people", content=picture, timeout=20)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code == 200:
                return int(answer.json()["count"])
            time.sleep(0.05)
        pytest.fail(f"no answer in 60 s:\n{docker('logs', self.name)[-3000:]}")

    def answers(self, path: str) -> bool:
        """Whether GET is answered with 200."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + path, timeout=10).status_code == 200
        return False

    def exit_code(self) -> int:
        return int(docker("wait", self.name))

    def remove(self) -> None:
        docker("rm", "-f", self.name, check=False)


@pytest.fixture(scope="module")
def container(serving_image: str, bus: bytes) -> Iterator[ServingContainer]:
    """A container on two CPUs that counted four."""
    one = ServingContainer("--cpus", "2")
    try:
        assert one.count(bus) == 4
        yield one
    finally:
        one.remove()


def test_rest_and_grpc(container: ServingContainer, bus: bytes) -> None:
    assert httpx.get(f"{container.url}/ping").status_code == 200
    with Client(container.url) as rest, Client(grpc=container.grpc) as remote:
        assert rest.count(bus).count == remote.count(bus).count == 4


def test_it_is_nobody_who_owns_nothing(serving_image: str) -> None:
    """The image's own permissions, on a file system that can be written: on a read-only one no test could fail."""
    script = """
    id -u
    find / -xdev -path /proc -prune -o -path /sys -prune -o -type l -o -writable -print 2>/dev/null
    true
    """
    uid, *writable = docker("run", "--rm", "--entrypoint", "sh", serving_image, "-c", script).split()
    assert uid == "65532"
    beside_temporary = [path for path in writable if not path.startswith(("/tmp", "/var/tmp", "/dev", "/run/lock"))]
    assert beside_temporary == []


def test_there_is_no_compiler(container: ServingContainer) -> None:
    script = """
    for c in gcc g++ cc c++ clang ld as make; do command -v $c; done
    find / -xdev '(' -name 'cc1*' -o -name ptxas ')' 2>/dev/null
    echo end
    """
    assert docker("exec", container.name, "sh", "-c", script) == "end"


def test_labels_say_what_it_is(serving_image: str) -> None:
    labels = json.loads(docker("image", "inspect", "-f", "{{json .Config.Labels}}", serving_image))
    assert labels["org.opencontainers.image.title"] == "headcount"
    assert labels["org.opencontainers.image.description"]


@pytest.mark.skipif("avx2" not in cpu_flags(), reason="compiled for x86-64-v3 or better")
def test_the_compiled_network_is_used(container: ServingContainer) -> None:
    ready = next(line for line in container.log_lines() if line["message"] == "ready")
    bfloat16 = {"avx512_bf16", "amx_bf16"} & cpu_flags()
    assert ready["compiled"] is True
    assert ready["precision"] == ("bfloat16" if bfloat16 else "float32")
    assert ready["workers"] == 2


def test_one_cpu_has_one_worker_and_it_stops_in_time(serving_image: str, bus: bytes) -> None:
    one = ServingContainer("--cpus", "1")
    try:
        assert one.count(bus) == 4
        assert next(line for line in one.log_lines() if line["message"] == "ready")["workers"] == 1
        docker("stop", "--time", "10", one.name)  # as long as Vertex AI waits
        assert one.exit_code() == 0, "it was not killed"
    finally:
        one.remove()


def test_the_largest_picture_fits_into_little_memory(serving_image: str, bus: bytes) -> None:
    out = io.BytesIO()
    Image.new("RGBA", (7070, 7070), (10, 20, 30, 128)).save(out, "PNG")
    one = ServingContainer("--cpus", "2", "--memory", "2g", "--memory-swap", "2g")
    try:
        assert one.count(bus) == 4
        for _ in range(2):
            answer = httpx.post(
                f"{one.url}/predictions/people", content=out.getvalue(), headers={"Accept": "image/jpeg"}, timeout=60
            )
            assert answer.status_code == 200, answer.text
            assert httpx.get(f"{one.url}/ping").status_code == 200
        assert one.count(bus) == 4
    finally:
        one.remove()


def test_broken_weights_end_it_with_the_reason(serving_image: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 no weights")
    tmp_path.chmod(0o755)
    one = ServingContainer("-v", f"{tmp_path}/broken.pt:/opt/headcount/archive/{checkpoint.name}:ro")
    try:
        assert one.exit_code() == 1, docker("logs", one.name)
        last = one.log_lines()[-1]
        assert last["severity"] == "CRITICAL"
        assert checkpoint.name in last["message"]
    finally:
        one.remove()


def test_without_a_folder_to_write_to_it_says_so(serving_image: str) -> None:
    said = subprocess.run(
        [docker_client(), "run", "--rm", "--name", f"{RUN}-full", "--read-only", serving_image],
        check=False,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert "temporary directory" in json.loads(said.stdout.splitlines()[-1])["message"]


def test_the_readme_s_docker_line_serves(serving_image: str, bus: bytes) -> None:
    (line,) = re.findall(r"^docker run .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    port, name = free_port(), f"{RUN}-readme"
    words = shlex.split(line.replace("127.0.0.1:8080:", f"127.0.0.1:{port}:"))
    assert words[-1] == "headcount"
    typed = subprocess.Popen([docker_client(), *words[1:-1], "--name", name, serving_image], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ping", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        answer = httpx.post(f"http://127.0.0.1:{port}/predictions/people", content=bus, timeout=20)
        assert answer.json()["count"] == 4
        typed.send_signal(signal.SIGTERM)
        assert typed.wait(20) == 0
        assert docker("ps", "-aq", "--filter", f"name={name}") == ""
    finally:
        docker("rm", "-f", name, check=False)
        typed.wait(20)


def test_a_model_of_torch_export_is_served_instead(serving_image: str, tmp_path: Path) -> None:
    model = exported_models.weather(tmp_path / "model")
    one = ServingContainer("-e", "AIP_STORAGE_URI=/model", "-v", f"{model}:/model:ro", "-e", "AIP_PREDICT_ROUTE=/v1/p")
    try:
        assert eventually(lambda: one.answers("/ping"), 300), docker("logs", one.name)[-3000:]
        answer = httpx.post(f"{one.url}/v1/p", json={"instances": [*exported_models.INSTANCES, {}]}, timeout=60)
        first, second, third = answer.json()["predictions"]
        assert (first, second) == (exported_models.predicted(1, 2, 10), exported_models.predicted(-3.5, 0.25))
        assert third["error"]["message"] == "instances[2]: it lacks the column 'a'"
        assert list(httpx.get(f"{one.url}/openapi.json").json()["paths"])[:1] == ["/v1/p"]
    finally:
        one.remove()


def test_google_s_own_harness_serves_it(serving_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LocalModel runs an image as Vertex AI does: routes, port, and a folder of artifacts."""
    # Google's package imports FastAPI and parts of Starlette for a model server of its own, which is not used here.
    importlib.import_module("starlette.datastructures")
    fastapi = types.ModuleType("fastapi")
    fastapi.__dict__.update(HTTPException=Exception, Request=object, Response=object)
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    from google.cloud.aiplatform.prediction import LocalModel

    yolo_checkpoint.write(tmp_path / "own.pt", yolo_checkpoint.make_seeing(["cat", "person"], "person"))
    model = LocalModel(
        serving_container_image_uri=serving_image,
        serving_container_predict_route="/v1/people",
        serving_container_health_route="/v1/health",
        serving_container_ports=[8123],
    )
    endpoint: Any = model.deploy_to_local_endpoint(artifact_uri=str(tmp_path), container_ready_timeout=120)
    try:
        endpoint.serve()
        assert endpoint.run_health_check().json() == {"status": "Healthy"}
        instances = {"instances": [instance(yolo_checkpoint.squares(n)) for n in (3, 0, 9)]}
        answer = endpoint.predict(json.dumps(instances), headers={"Content-Type": "application/json"})
        assert [prediction["count"] for prediction in answer.json()["predictions"]] == [3, 0, 9]
        assert answer.json()["predictions"][0]["model"]["name"] == "own"
        assert endpoint.predict(yolo_checkpoint.squares(5)).json()["count"] == 5
    finally:
        if endpoint.container is not None:
            endpoint.container.remove(force=True)
            endpoint.container.client.close()
            endpoint.container = None  # its __del__ would stop it once more
