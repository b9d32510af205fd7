"""The Docker registry behind Artifact Registry: the reference registry, as a program or as a container.

`docker-registry` (Debian's name) or `registry` on the PATH is started as a child; else the image registry:2 is, with
its port published on loopback. Only a container can be reached from a Docker engine that runs in a virtual machine.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from sandbox.artifact_registry.gate import Gate, listen
from sandbox.errors import precondition

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

IMAGE = "registry:2"
START_SECONDS = 30.0
CONFIG = """\
version: 0.1
log: {{accesslog: {{disabled: true}}, level: error}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
"""
# In the image: https://hub.docker.com/_/registry
_REPOSITORIES = "/var/lib/registry/docker/registry/v2/repositories"
_CONFIG_FILE = "/etc/docker/registry/config.yml"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    """In the child: a sandbox that is killed leaves no registry behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RegistryServer:
    """One registry on 127.0.0.1:`port` (0: a free one), its images in `folder`, or in a volume named after `state`.

    A `gated` one asks for access tokens; the registry itself then listens on another port. With a `certificate` it
    speaks HTTPS too, see `Gate`. Its methods block.
    """

    def __init__(
        self, folder: Path, port: int, state: str, *, gated: bool = False, certificate: Path | None = None
    ) -> None:
        self._folder = folder.resolve()
        self._program = shutil.which("docker-registry") or shutil.which("registry")
        self._process: subprocess.Popen[bytes] | None = None
        self._name = f"headcount-registry-{state}"
        self.address = f"127.0.0.1:{port or _free_port()}"
        self._gated, self._certificate = gated, certificate
        self._gate: Gate | None = None
        self._started = False  # the container
        self._backend = f"127.0.0.1:{_free_port()}" if gated else self.address

    # ----------------------------------------------------------------------------------- start, stop

    def start(self) -> None:
        """Returns when the registry answers. Raises FAILED_PRECONDITION with the package to install."""
        if self._running():
            return
        self.stop()  # also a container that a killed sandbox left
        if self._gated:
            self._gate = Gate(self.address, self._backend, self._certificate)
            self._gate.open()
        else:
            listen(self.address).close()
        try:
            if self._program:
                self._start_program()
            else:
                self._start_container()
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://{self._backend}/v2/", timeout=2, trust_env=False).status_code == 200:
                    return
            time.sleep(0.05)
        raise precondition(f"The Docker registry on {self._backend} does not answer; see {self._folder}/log.")

    def _running(self) -> bool:
        if self._process:
            return self._process.poll() is None
        container = self._container() if self._started else None
        return container is not None and container.status == "running"

    def _start_program(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "config.yml"
        config.write_text(CONFIG.format(root=self._folder / "images", address=self._backend))
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(self._program), "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ.get("PATH", "")},
                preexec_fn=_die_with_parent,
            )

    def stop(self) -> None:
        """Stops the registry; its images stay."""
        if self._gate:
            self._gate.close()
            self._gate = None
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        self._started = False
        if not self._program and (container := self._container()):
            container.remove(force=True)

    # --------------------------------------------------------------------------------------- contents

    def remove(self, folder: str) -> None:
        """Removes the images below `folder` and their layers; without one, all, and stops.

        The registry does not run meanwhile: it would remember layers that are gone. What Docker pulled from it
        goes too.
        """
        self.stop()
        self._forget_pulled(f"{self.address}/{folder}".rstrip("/") + "/")
        if not self._program:
            self._remove_in_volume(folder)
            return
        if not folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        shutil.rmtree(self._folder / "images/docker/registry/v2/repositories" / folder, ignore_errors=True)
        collect = [str(self._program), "garbage-collect", str(self._folder / "config.yml")]
        subprocess.run(collect, check=False, capture_output=True, timeout=300)
        self.start()

    def images(self, folder: str) -> list[tuple[str, str, str]]:
        """(image, tag, digest) of everything tagged below `folder`."""
        self.start()
        found = []
        with httpx.Client(base_url=f"http://{self._backend}/v2/", timeout=30, trust_env=False) as client:
            for name in client.get("_catalog", params={"n": 1000}).json().get("repositories", []):
                if not name.startswith(folder + "/"):
                    continue
                for tag in client.get(f"{name}/tags/list").json().get("tags") or []:
                    accept = (
                        "application/vnd.oci.image.index.v1+json,application/vnd.oci.image.manifest.v1+json,"
                        "application/vnd.docker.distribution.manifest.list.v2+json,"
                        "application/vnd.docker.distribution.manifest.v2+json"
                    )
                    answer = client.head(f"{name}/manifests/{tag}", headers={"accept": accept})
                    if digest := answer.headers.get("docker-content-digest"):
                        found.append((name.removeprefix(folder + "/"), tag, digest))
        return found

    # -------------------------------------------------------------------------------------- container

    def _remove_in_volume(self, folder: str) -> None:
        import docker

        if not (client := self._docker()):
            return
        if not folder:
            with contextlib.suppress(docker.errors.APIError):
                client.volumes.get(self._name).remove(force=True)
            return
        script = f'rm -rf "{_REPOSITORIES}/$1" && registry garbage-collect {_CONFIG_FILE}'
        client.containers.run(IMAGE, entrypoint=["sh", "-c", script, "sh", folder], volumes=self._volumes, remove=True)
        self.start()

    @property
    def _volumes(self) -> dict[str, dict[str, str]]:
        return {self._name: {"bind": "/var/lib/registry", "mode": "rw"}}

    def _forget_pulled(self, prefix: str) -> None:
        import docker

        if not (client := self._docker()):
            return
        # One call: client.images.list() looks at each image anew, and fails if somebody removes one meanwhile.
        for image in client.api.images():
            for name in (*(image["RepoTags"] or []), *(image["RepoDigests"] or [])):
                if name.startswith(prefix):
                    with contextlib.suppress(docker.errors.DockerException):
                        client.images.remove(name)

    def _docker(self) -> "docker.DockerClient | None":
        import docker

        try:
            return docker.from_env(version="auto", timeout=60)
        except docker.errors.DockerException:
            return None

    def _container(self) -> "Container | None":
        import docker

        if not (client := self._docker()):
            return None
        try:
            return client.containers.get(self._name)
        except docker.errors.NotFound:
            return None

    def _start_container(self) -> None:
        import docker

        if not (client := self._docker()):
            raise precondition(
                "Artifact Registry needs a Docker registry here: start Docker, or install docker-registry."
            )
        host, port = self._backend.split(":")
        try:
            client.containers.run(
                IMAGE,
                detach=True,
                name=self._name,
                ports={"5000/tcp": (host, int(port))},
                volumes=self._volumes,
                environment={"REGISTRY_STORAGE_DELETE_ENABLED": "true", "REGISTRY_LOG_LEVEL": "error"},
            )
            self._started = True
        except docker.errors.DockerException as error:
            raise precondition(
                f"The Docker registry does not start: {error}. Pull {IMAGE}, or install docker-registry."
            ) from None
