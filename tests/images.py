"""Docker images for tests: the tiny ones (tiny_server.py, tiny_trainer.py), and the removal of a run's images."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import machine
import pytest
from helpers import ROOT
from pytest_httpserver import HTTPServer

# Names and labels of this run: images and containers of others on this machine are neither looked at nor removed.
RUN = f"headcount-test-{uuid.uuid4().hex[:8]}"
LABEL = "headcount.test"
SERVER = (ROOT / "tests" / "tiny_server.py").read_text()
TRAINER = (ROOT / "tests" / "tiny_trainer.py").read_text()
DOCKERFILE = f"""\
FROM {machine.BASE_IMAGE} AS training
ARG SOURCES=
LABEL headcount.sources="${{SOURCES}}"
COPY training/trainer.py /trainer.py
ENTRYPOINT ["python", "/trainer.py"]
FROM {machine.BASE_IMAGE}
ARG SOURCES=
LABEL headcount.sources="${{SOURCES}}"
COPY serving/server.py /server.py
ENTRYPOINT ["python", "/server.py"]
CMD ["from-the-image"]
"""


def docker(*arguments: str, check: bool = True) -> str:
    """Returns the output of the Docker command. A failure fails the test."""
    done = subprocess.run(
        [machine.docker_client(), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
    )
    if check and done.returncode:
        pytest.fail(f"docker {' '.join(arguments)}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout.strip()


def write_tiny_sources(folder: Path) -> None:
    """Writes a build context: a Dockerfile, its .dockerignore, a server, a trainer, and weights that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / ".dockerignore", folder)
    for name, text in (
        ("Dockerfile", DOCKERFILE),
        ("serving/server.py", SERVER),
        ("training/trainer.py", TRAINER),
        (".headcount/weights/yolov5n.pt", "weights"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def build(folder: Path, name: str, **arguments: str) -> None:
    """Builds the image `name` from a folder, for linux/amd64 and with the label of this run."""
    options = [option for key, value in arguments.items() for option in ("--build-arg", f"{key}={value}")]
    label = f"{LABEL}={RUN}"
    docker("build", "--quiet", "--platform", "linux/amd64", "--label", label, *options, "--tag", name, str(folder))


def push(name: str) -> str:
    """Pushes an image to the registry in its name; returns its name by digest."""
    docker("push", "--quiet", name)
    digests: list[str] = json.loads(docker("image", "inspect", "--format", "{{json .RepoDigests}}", name))
    return next(digest for digest in digests if digest.startswith(name.rpartition(":")[0] + "@"))


@contextlib.contextmanager
def named_by_digest(image: str) -> Iterator[str]:
    """The name by digest of a local image, in a registry that has its manifest alone.

    Docker has the layers and does not ask for them. To push the gigabytes of the serving image takes minutes, because
    Docker compresses them.
    """
    types = "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.container.image.v1+json"
    config = {"mediaType": types[1], "size": 1, "digest": docker("image", "inspect", "-f", "{{.Id}}", image)}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": types[0], "config": config, "layers": []})
    digest = f"sha256:{hashlib.sha256(manifest.encode()).hexdigest()}"
    with HTTPServer() as server:
        server.expect_request("/v2/").respond_with_data("")
        server.expect_request(f"/v2/headcount/manifests/{digest}").respond_with_data(manifest, content_type=types[0])
        name = f"127.0.0.1:{server.port}/headcount@{digest}"
        yield name
        docker("rmi", name, check=False)


def forget_images(registry: str) -> None:
    """Removes the images that Docker pulled from a test's registry."""
    listed = docker("images", "--format", "{{.ID}} {{.Repository}}").splitlines()
    if ids := [line.split()[0] for line in listed if line.split()[1].startswith(registry + "/")]:
        docker("rmi", "-f", *ids, check=False)


def remove_all() -> None:
    """Removes the containers and images of this run that a failed test may have left."""
    for kind, remove in (("ps", "rm"), ("images", "rmi")):
        found = docker(kind, "-aq", "--filter", f"label={LABEL}={RUN}", check=False).split()
        if found:
            docker(remove, "-f", *dict.fromkeys(found), check=False)
