"""The front without Java: run in this process, or as the launcher starts it, before a stand-in for TorchServe."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from serving import connections
from serving.contract import COUNT_HEADER
from serving.front import Front, FrontSettings
from serving.run_folder import RunFolder
from serving.spool import SPOOLED_NAME

HERE = Path(__file__).parent
# Seconds after which a test fails that would wait for ever. pytest's own limit is of no use while uvloop runs: it takes
# the exception for one of a callback's.
LONG = 60
HEADER = COUNT_HEADER.lower()


@dataclass
class Answered:
    """The stand-in's answer; by default, everything that identifies the request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(
        default_factory=lambda: {HEADER: "1", "server-timing": "decode;dur=2, inference;dur=3"}
    )


@dataclass
class StandIn:
    """TorchServe and a worker as one ASGI application. It reads the spooled body and answers what `decide` says.

    hold: answers wait while it is cleared. asked: what the front asked, in order.
    """

    folder: RunFolder
    decide: Callable[[dict[str, Any], bytes], Answered | None] = lambda told, body: None
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hold.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        content = b""
        more = True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        told = json.loads(content)
        told["request_id"] = dict(scope["headers"]).get(b"x-request-id", b"").decode()
        assert re.fullmatch(SPOOLED_NAME, told["spooled"])
        self.asked.append(told)
        await self.hold.wait()
        file = self.folder.spool / told["spooled"]
        body = file.read_bytes()[: told["size"]]
        if body.startswith(b"after "):
            await until(Path(body.removeprefix(b"after ").decode().strip()).exists)
        answer = self.decide(told, body) or Answered(body=identity(body))
        headers = {"content-type": "application/json", **answer.headers, "content-length": str(len(answer.body))}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": pairs})
        await send({"type": "http.response.body", "body": answer.body})


def identity(body: bytes) -> bytes:
    """The stand-in's answer to a body."""
    return json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()


@contextlib.asynccontextmanager
async def listening(server: uvicorn.Server, port: int = 0) -> AsyncIterator[int]:
    """Serve on a port, or on a free one, until the context ends, without uvicorn's main loop and its pauses."""
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    with socket.create_server(("127.0.0.1", port)) as public:
        await server.startup([public])
        await server.on_tick(0)
        try:
            yield public.getsockname()[1]
        finally:
            for listener in server.servers:
                listener.close()
            for connection in server.server_state.connections:
                connection.transport.abort()
            await until(lambda: not server.server_state.tasks)
            for listener in server.servers:
                await listener.wait_closed()


@dataclass
class Rig:
    """A front that serves on a port of its own, and the stand-in behind it."""

    front: Front
    torchserve: StandIn
    server: uvicorn.Server
    port: int
    worker: RunFolder
    connections: list[Connection] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end_worker(self) -> None:
        """As if the worker's process had ended."""
        os.close(self.worker._lock)
        self.front._looked = 0

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self.url, timeout=LONG, trust_env=False) as client:
            yield client

    async def post(self, content: Any = b"picture", **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post("/predictions/people", content=content, **options)

    async def get(self, path: str) -> httpx.Response:
        async with self.client() as client:
            return await client.get(path)

    async def metrics(self) -> dict[str, float]:
        lines = (await self.get("/metrics")).text.splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}

    async def send(self, text: bytes) -> Connection:
        """A connection on which this was sent. It is closed at the end."""
        connection = Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        self.connections.append(connection)
        await connection.send(text)
        return connection

    async def talk(self, text: bytes) -> bytes:
        """All that the front answers to these bytes until it closes the connection."""
        async with await self.send(text) as connection:
            return await connection.rest()


@dataclass
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def rest(self) -> bytes:
        """Returns the bytes that come until the connection ends, in whatever way."""
        said = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(LONG):
                while part := await self.reader.read(65536):
                    said += part
        return said

    async def to(self, end: bytes) -> bytes:
        """Returns the received bytes up to these."""
        async with asyncio.timeout(LONG):
            return await self.reader.readuntil(end)


def post_head(*headers: str, version: str = "1.1") -> bytes:
    """The head of a prediction request."""
    lines = (f"POST /predictions/people HTTP/{version}", "Host: x", *headers, "", "")
    return "\r\n".join(lines).encode()


@contextlib.asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Rig]:
    """A front with one living worker, behind which the stand-in answers."""
    run_folder = RunFolder.create(folder)
    worker = RunFolder(run_folder.path)
    worker.register({"precision": "float32", "compiled": False})
    torchserve = StandIn(run_folder)
    try:
        plain = uvicorn.Server(uvicorn.Config(torchserve, lifespan="off", log_config=None, access_log=False))
        async with listening(plain) as inference:
            front = Front(replace(FrontSettings(run_folder, inference), **settings))
            server = connections.server(front)
            async with listening(server) as port:
                one = Rig(front, torchserve, server, port, worker)
                yield one
                for connection in one.connections:
                    connection.close()
                torchserve.hold.set()
            front.close()
    finally:
        with contextlib.suppress(OSError):
            os.close(worker._lock)
        os.close(run_folder._lock)
        run_folder.remove()


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(LONG):
        while not holds():
            await asyncio.sleep(0.001)


# The launcher before a stand-in: a program in the place of Java


def fake_java(home: Path) -> Path:
    """A JAVA_HOME whose `java` runs play_torchserve()."""
    java = home / "bin" / "java"
    java.parent.mkdir(parents=True)
    program = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport front_harness\nfront_harness.play_torchserve()\n"
    java.with_suffix(".py").write_text(program)
    java.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$0.py" "$@"\n')
    java.chmod(0o755)
    return home


def play_torchserve() -> None:
    """Be TorchServe and its worker. A body that begins with "after " is answered when the file it names is there."""
    settings = Path(sys.argv[sys.argv.index("-f") + 1]).read_text()
    port = int(re.findall(r"^inference_address=http://127\.0\.0\.1:(\d+)$", settings, re.MULTILINE)[0])
    folder = RunFolder(Path(os.environ["HEADCOUNT_RUN_FOLDER"]))
    standin = StandIn(folder)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        folder.sign_of_life()
        await standin(scope, receive, send)

    async def main() -> None:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
        async with listening(server, port):
            folder.register({"precision": "float32", "compiled": False})
            print("a line that is no JSON", flush=True)
            await asyncio.Event().wait()

    asyncio.run(main())


def fake_archive(folder: Path) -> Path:
    """As much of a model archive as the launcher reads."""
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text('{"model": {"modelVersion": "1"}}')
    return folder


class Launched:
    """A launcher with the stand-in behind it. Its log tells where it listens."""

    def __init__(self, folder: Path, *arguments: str, patch: str = "", **environment: str) -> None:
        self.folder, self.log = folder, folder / "log"
        self.http = httpx.Client(timeout=60, trust_env=False)
        temporary = folder / "tmp"
        temporary.mkdir()
        program = f"{patch}\nfrom serving import launcher\nlauncher.main()"
        archive = fake_archive(folder / "archive")
        defaults = {
            "TMPDIR": str(temporary), "HEADCOUNT_WORKERS": "1", "AIP_HTTP_PORT": "0", "HEADCOUNT_GRACE_SECONDS": "0",
            "HEADCOUNT_GRPC": "127.0.0.1:0", "JAVA_HOME": str(fake_java(folder / "java")),
        }  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, "--archive", archive, *arguments],
                stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=os.environ | defaults | environment,
            )  # fmt: skip

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the log that are complete."""
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def line(self, message: str) -> dict[str, Any]:
        """Wait for a line of the log."""
        while True:
            for line in self.lines():
                if line["message"] == message:
                    return line
            if self.process.poll() is not None:
                raise AssertionError(f"it ended without saying {message!r}:\n{self.log.read_text()}")
            time.sleep(0.01)

    def run_folder(self) -> Path:
        (found,) = (self.folder / "tmp").glob("headcount-*")
        return found

    def worker(self) -> int:
        """Process id of the stand-in for TorchServe."""
        (file,) = (self.run_folder() / "workers").iterdir()
        return int(file.name)

    def leaves_no_process(self) -> bool:
        """Whether nothing runs below it any more: a stand-in ends with the launcher."""
        marker = f"TMPDIR={self.folder}".encode()
        for process in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if marker in process.read_bytes():
                    return False
        return True

    def post(self, content: bytes) -> httpx.Response:
        return self.http.post(self.line("ready")["url"] + "/predictions/people", content=content)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(self.line("starting")["url"] + path)

    def in_flight(self) -> int:
        return int(re.findall(r"^headcount_queue (\d+)", self.get("/metrics").text, re.MULTILINE)[0])

    def end(self, number: int) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait()


Start = Callable[..., Awaitable[Rig]]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a front with these settings."""
    async with contextlib.AsyncExitStack() as stack:
        yield lambda **settings: stack.enter_async_context(running(tmp_path, **settings))


@pytest.fixture
async def rig(start: Start) -> Rig:
    return await start()


def refused(answer: httpx.Response, status: int, says: str) -> None:
    """The answer is the error that the contract describes."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error_is(answer.content, status, says)


def error_is(body: bytes, status: int, says: str) -> None:
    error = json.loads(body)["error"]
    assert error["code"] == status
    assert re.fullmatch("[A-Z_]+", error["status"])
    assert error["status"] != "UNKNOWN"
    assert says in error["message"]


class _Said(io.BytesIO):
    """The bytes of a server on a connection, from which http.client reads one answer after the other."""

    def makefile(self, _: str) -> _Said:
        return self

    def close(self) -> None:
        pass


def answers(said: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each answer in a server's bytes."""
    found, file = [], _Said(said)
    while file.tell() < len(said):
        one = http.client.HTTPResponse(file)  # type: ignore[arg-type]
        one.begin()
        found.append((one.status, one.read()))
    return found


def always(answer: Answered) -> Callable[[dict[str, Any], bytes], Answered]:
    return lambda told, body: answer


async def flood(connection: Any, data: bytes, pause: float = 0) -> None:
    while True:
        await connection.send(data)
        await asyncio.sleep(pause)
