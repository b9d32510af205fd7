"""What runs containers: Docker (`sandbox.docker_runner`), or a stub for tests (`sandbox.stub_runner`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# Every container carries these, so that a sandbox that was killed finds its own at the next start.
LABEL = "headcount.sandbox."


class UnreachableError(Exception):
    """The container does not answer: not listening, connection reset, or too slow (`timeout`)."""

    def __init__(self, message: str, *, timeout: bool = False) -> None:
        super().__init__(message)
        self.timeout = timeout


@dataclass(frozen=True)
class Launch:
    """A container to be started, everything in it already expanded."""

    image: str
    command: list[str]  # replaces the image's ENTRYPOINT when not empty
    args: list[str]  # replaces the image's CMD when not empty
    env: dict[str, str]
    port: int  # 0: none, as a job's container has
    shared_memory_mb: int
    labels: dict[str, str]
    name: str  # begins the container's name, for readers of `docker ps`
    accelerators: int = 0
    hostname: str = ""  # under which other containers reach it, and then its whole name
    folders: dict[str, Path] = field(default_factory=dict)  # folders of this machine, by their path in the container
    cpus: tuple[int, ...] = ()  # those that it may use; all where empty
    outputs: dict[str, str] = field(default_factory=dict)  # files that are expected of it, with the text of a stub


@dataclass(frozen=True)
class ContainerResponse:
    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True)
class Line:
    """A line that a container wrote. time: RFC 3339 with nanoseconds; stream: stdout or stderr."""

    time: str
    stream: str
    text: str


class Container(Protocol):
    """A started container."""

    @property
    def labels(self) -> dict[str, str]: ...
    async def get(self, path: str, port: int, timeout: float) -> int: ...
    async def post(self, path: str, body: bytes, content_type: str, timeout: float) -> ContainerResponse: ...
    async def connect(self, port: int, timeout: float) -> None: ...
    async def execute(self, command: list[str], timeout: float) -> int: ...
    async def exit_code(self) -> int | None: ...
    @property
    def out_of_memory(self) -> bool: ...  # known after its exit code
    async def logs(self, lines: int, *, only_errors: bool = False) -> list[str]: ...  # the last ones
    async def output(self, since: dict[str, str]) -> list[Line]: ...  # after a time, by stream
    async def read_file(self, path: str) -> bytes: ...  # b"" where there is none
    async def halt(self, grace: float) -> None: ...  # ends it; what it has written can still be read
    async def stop(self, grace: float) -> None: ...


class ContainerRunner(Protocol):
    async def resolve(self, image: str) -> str: ...
    async def fetch(self, image: str) -> None: ...
    async def start(self, launch: Launch) -> Container: ...
    async def find(self, state: str) -> list[Container]: ...
    async def cpus(self) -> tuple[int, ...]: ...
    async def close(self) -> None: ...
