"""Containers of the local Docker engine."""

import asyncio
import contextlib
import datetime
import io
import os
import sys
import tarfile
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from sandbox.artifact_registry.gate import credentials
from sandbox.errors import GoogleError, precondition
from sandbox.runner import LABEL, Container, ContainerResponse, Launch, Line, UnreachableError
from sandbox.streams import pump

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container as DockerHandle

T = TypeVar("T")


class DockerRunner:
    """Containers of the local Docker engine, one published port each, on loopback.

    Through the `docker` package: its errors are typed where the command line's are text. It blocks, so
    every call runs in a thread.
    """

    def __init__(self, port: int) -> None:
        self._client: docker.DockerClient | None = None
        self._network = ContainerNetwork(port)
        self._state = ""
        self.http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), trust_env=False)

    async def _call(self, work: "Callable[[docker.DockerClient], T]") -> T:
        return await asyncio.to_thread(lambda: work(self._connect()))

    def _connect(self) -> "docker.DockerClient":
        import docker  # here: it takes 0.1 s, and a sandbox without deployments does without

        if self._client is None:
            try:
                self._client = docker.from_env(version="auto", timeout=600)
            except docker.errors.DockerException as error:
                raise precondition(
                    "The sandbox needs Docker to run a model's container, and no Docker engine answers "
                    f"({error}). Start Docker and repeat, or start the sandbox with --runner stub."
                ) from None
        return self._client

    async def resolve(self, image: str) -> str:
        """The image by digest; a tag is pulled to learn it. Raises GoogleError when there is none."""
        if "@sha256:" in image:
            return image

        def work(client: "docker.DockerClient") -> str:
            digests = _pulled(client, image).attrs.get("RepoDigests") or []
            repository = image.rpartition(":")[0] if ":" in image.rpartition("/")[2] else image
            return next((d for d in digests if d.startswith(repository + "@")), image)

        try:
            return await self._call(work)
        except GoogleError as error:
            if "needs Docker" in error.message:  # an upload works without it
                return image
            raise

    async def fetch(self, image: str) -> None:
        """Pulls an image that is not here yet. Raises GoogleError when it can not be had."""
        await self._call(lambda client: _pulled(client, image))

    async def start(self, launch: Launch) -> Container:
        if launch.accelerators:
            raise precondition("The sandbox runs no accelerators: do without accelerator_count, or --runner stub.")
        await self._network.open(self._call, launch.labels[LABEL + "state"])

        def work(client: "docker.DockerClient") -> "DockerHandle":
            import docker

            _pulled(client, launch.image)
            options: dict[str, Any] = {}
            if launch.command:
                options["entrypoint"] = launch.command
            if launch.args:
                options["command"] = launch.args
            if launch.shared_memory_mb:
                options["shm_size"] = launch.shared_memory_mb * 2**20
            if launch.hostname:
                options["hostname"] = launch.hostname
            if launch.cpus:
                options["cpuset_cpus"] = ",".join(map(str, launch.cpus))
            if launch.port:
                options["ports"] = {f"{launch.port}/tcp": ("127.0.0.1", 0)}  # 0: any free one
            try:
                container = client.containers.create(
                    launch.image,
                    name=launch.hostname or f"{launch.name}-{uuid.uuid4().hex[:6]}",
                    detach=True,
                    environment={
                        "STORAGE_EMULATOR_HOST": self._network.sandbox,
                        "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{self._network.sandbox}/",  # gcloud's variable
                        **launch.env,
                    },
                    network=self._network.name,
                    extra_hosts=self._network.hosts,
                    labels=launch.labels,
                    volumes={str(folder): {"bind": at, "mode": "rw"} for at, folder in launch.folders.items()},
                    **options,
                )
            except docker.errors.APIError as error:
                raise precondition(f"Docker can not create the container: {error.explanation}") from None
            try:
                container.start()
                container.reload()
            except docker.errors.APIError as error:
                container.remove(force=True)
                raise precondition(f"Docker can not start the container: {error.explanation}") from None
            return container

        task = asyncio.create_task(self._call(work))
        try:
            handle = await asyncio.shield(task)
        except asyncio.CancelledError:
            # The thread cannot be stopped; without waiting for it, its container would have no owner.
            with contextlib.suppress(GoogleError):
                orphan = await task
                await asyncio.to_thread(orphan.remove, force=True, v=True)
            raise
        return DockerContainer(self, handle, launch.port)

    async def find(self, state: str) -> list[Container]:
        self._state = state

        def work(client: "docker.DockerClient") -> "list[DockerHandle]":
            found = client.containers.list(all=True, filters={"label": f"{LABEL}state={state}"})
            for container in found:
                if container.status == "created":  # a kill came before its start
                    container.remove(force=True, v=True)
            return [container for container in found if container.status != "created"]

        try:
            handles = await self._call(work)
        except GoogleError:  # no Docker: then there are none
            return []
        return [DockerContainer(self, h, int(h.labels.get(LABEL + "port", 8080))) for h in handles]

    async def cpus(self) -> tuple[int, ...]:
        """The CPUs that containers may use: those of the engine's machine, without any that this process must not."""
        count: int = (await self._call(lambda client: client.info()))["NCPU"]
        own = os.sched_getaffinity(0) if sys.platform == "linux" else set()
        return tuple(sorted(own & set(range(count)))) or tuple(range(count))

    async def close(self) -> None:
        if self._client and self._state:
            await self._network.close(self._call, self._state)
        await self.http.aclose()


class ContainerNetwork:
    """The containers' own network, on whose gateway the sandbox answers too: there they read `gs://` objects.

    Google's clients, and the serving image, take the address from STORAGE_EMULATOR_HOST.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.name = self.sandbox = ""
        self.hosts: dict[str, str] = {}
        self._door: asyncio.Server | None = None
        self._lock = asyncio.Lock()

    async def open(self, call: Callable[..., Awaitable[Any]], state: str) -> None:
        """Makes the network, or takes the one that a killed sandbox left."""
        async with self._lock:
            if self.name:
                return
            name = _network_name(state)
            gateway = await call(lambda client: self._gateway(client, name))
            try:
                self._door = await asyncio.start_server(self._forward, gateway, self.port)
                self.sandbox = f"http://{gateway}:{self.port}"
            except OSError:
                # Docker runs in a virtual machine. There this name leads to the loopback of the machine around it.
                self.sandbox = f"http://host.docker.internal:{self.port}"
                self.hosts = {"host.docker.internal": "host-gateway"}
            self.name = name

    @staticmethod
    def _gateway(client: "docker.DockerClient", name: str) -> str:
        import docker

        try:
            network = client.networks.get(name)
        except docker.errors.NotFound:
            network = client.networks.create(name, driver="bridge", check_duplicate=True)
            network.reload()
        return str(network.attrs["IPAM"]["Config"][0]["Gateway"])

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async def close(self, call: Callable[..., Awaitable[Any]], state: str) -> None:
        """Removes the network, also one that a killed sandbox left, unless containers are on it."""
        if self._door:
            self._door.close()

        def remove(client: "docker.DockerClient") -> None:
            import docker

            with contextlib.suppress(docker.errors.APIError):
                client.networks.get(_network_name(state)).remove()

        await call(remove)


def _network_name(state: str) -> str:
    return f"headcount-{state}"


def _pulled(client: "docker.DockerClient", image: str) -> Any:
    import docker

    try:
        return client.images.get(image)
    except docker.errors.ImageNotFound:
        pass
    name = image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"
    try:
        return client.images.pull(name, auth_config=credentials(image))
    except docker.errors.DockerException as error:
        why = getattr(error, "explanation", None) or error
        raise precondition(f"Failed to pull the container image {image}: {why}") from None


class DockerContainer:
    def __init__(self, runner: DockerRunner, handle: "DockerHandle", port: int) -> None:
        self._runner = runner
        self._handle = handle
        self._port = port

    @property
    def labels(self) -> dict[str, str]:
        return dict(self._handle.labels)

    def _address(self, port: int) -> tuple[str, int]:
        """Where a port of the container is reached: published on loopback for the first port only."""
        published = (self._handle.attrs["NetworkSettings"]["Ports"] or {}).get(f"{port}/tcp")
        if not published:
            raise UnreachableError(f"port {port} is not published")
        return "127.0.0.1", int(published[0]["HostPort"])

    async def _request(self, method: str, path: str, port: int, timeout: float, **content: Any) -> httpx.Response:
        host, published = self._address(port)
        try:
            async with asyncio.timeout(timeout):
                return await self._runner.http.request(
                    method, f"http://{host}:{published}{path}", timeout=None, **content
                )
        except TimeoutError:
            raise UnreachableError(f"no answer in {timeout:g} s", timeout=True) from None
        except httpx.HTTPError as error:
            raise UnreachableError(str(error) or type(error).__name__) from None

    async def get(self, path: str, port: int, timeout: float) -> int:
        return (await self._request("GET", path, port, timeout)).status_code

    async def post(self, path: str, body: bytes, content_type: str, timeout: float) -> ContainerResponse:
        headers = {"content-type": content_type}
        response = await self._request("POST", path, self._port, timeout, content=body, headers=headers)
        return ContainerResponse(response.status_code, response.headers.get("content-type", ""), response.content)

    async def connect(self, port: int, timeout: float) -> None:
        host, published = self._address(port)
        try:
            async with asyncio.timeout(timeout):
                _, writer = await asyncio.open_connection(host, published)
        except (OSError, TimeoutError) as error:
            raise UnreachableError(str(error)) from None
        writer.close()

    async def execute(self, command: list[str], timeout: float) -> int:
        try:
            async with asyncio.timeout(timeout):
                result = await asyncio.to_thread(self._handle.exec_run, command)
        except TimeoutError:
            raise UnreachableError(f"no end in {timeout:g} s", timeout=True) from None
        return int(result.exit_code or 0)

    async def exit_code(self) -> int | None:
        import docker

        try:
            await asyncio.to_thread(self._handle.reload)
        except docker.errors.NotFound:
            return 137  # removed by hand
        state = self._handle.attrs["State"]
        return None if state["Running"] else int(state["ExitCode"])

    async def logs(self, lines: int, *, only_errors: bool = False) -> list[str]:
        import docker

        try:
            raw: bytes = await asyncio.to_thread(self._handle.logs, tail=lines, stdout=not only_errors)
        except docker.errors.APIError:
            return []
        return raw.decode(errors="replace").splitlines()

    @property
    def out_of_memory(self) -> bool:
        return bool(self._handle.attrs.get("State", {}).get("OOMKilled"))

    async def output(self, since: dict[str, str]) -> list[Line]:
        import docker

        def read(stream: str) -> list[Line]:
            after = since.get(stream, "")
            seconds = datetime.datetime.fromisoformat(after).timestamp() if after else 0.0
            options: dict[str, Any] = {"stdout": stream == "stdout", "stderr": stream == "stderr"}
            if after:
                options["since"] = seconds - 1e-3  # its precision is less than that of `after`
            raw: bytes = self._handle.logs(timestamps=True, **options)
            # A carriage return, with which progress bars go on, ends no line.
            pairs = (line.partition(" ") for line in raw.decode(errors="replace").split("\n") if line)
            return [Line(time, stream, text.rstrip("\r")) for time, _, text in pairs if time > after]

        try:
            both = await asyncio.to_thread(lambda: read("stdout") + read("stderr"))
        except docker.errors.APIError:
            return []
        return sorted(both, key=lambda line: line.time)

    async def read_file(self, path: str) -> bytes:
        import docker

        def work() -> bytes:
            stream, _ = self._handle.get_archive(path)
            with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
                file = archive.extractfile(archive.getmembers()[0])
                return file.read() if file else b""

        try:
            return await asyncio.to_thread(work)
        except docker.errors.APIError:
            return b""

    async def halt(self, grace: float) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds. A container already gone is fine."""
        import docker

        def work() -> None:
            with contextlib.suppress(docker.errors.NotFound):
                self._handle.stop(timeout=int(grace))

        await asyncio.shield(asyncio.to_thread(work))

    async def stop(self, grace: float) -> None:
        """The same, and removal."""
        import docker

        def work() -> None:
            with contextlib.suppress(docker.errors.NotFound):
                self._handle.stop(timeout=int(grace))
            # A removal that another process has begun answers 409.
            with contextlib.suppress(docker.errors.NotFound, docker.errors.APIError):
                self._handle.remove(force=True, v=True)

        await asyncio.shield(asyncio.to_thread(work))
