"""The front's client to TorchServe, against servers that behave badly."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serving.upstream import Upstream

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nX-Kind: good\r\nContent-Length: 2\r\n\r\nok"


async def asked(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)


def run(serve: Serve, use: Callable[[Upstream], Awaitable[None]]) -> int:
    """Use a client of a server that handles each connection so; how many connections it made."""
    connections = 0

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(counted, "127.0.0.1", 0)
        upstream = Upstream("127.0.0.1", server.sockets[0].getsockname()[1], "/x")
        async with server, asyncio.timeout(10):
            await use(upstream)
            upstream.close()

    asyncio.run(main())
    return connections


async def twice(upstream: Upstream) -> None:
    for body in (b"a", b"bc"):
        answer = await upstream.post(body, "id")
        assert (answer.status, answer.headers["x-kind"], answer.body) == (200, "good", b"ok")


def test_connections_are_kept() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for expected in (b"a", b"bc"):
            assert await asked(reader) == expected
            for part in (OK[:20], OK[20:-1], OK[-1:]):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)

    assert run(serve, twice) == 1


def test_a_connection_that_the_server_closed_is_replaced() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(OK)

    async def later(upstream: Upstream) -> None:
        await twice(upstream)
        while upstream._idle:  # until the client has seen the end
            await asyncio.sleep(0)
        await twice(upstream)

    assert run(serve, later) == 4


def test_a_server_that_takes_a_request_and_closes_is_asked_anew_once() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await asked(reader) == b"a":
            writer.write(OK)
            await asked(reader)

    async def use(upstream: Upstream) -> None:
        await upstream.post(b"a", "id")
        with pytest.raises(ConnectionError, match="closed"):
            await upstream.post(b"bc", "id")

    assert run(serve, use) == 2


@pytest.mark.parametrize("said", [b"SSH-2.0\r\n", OK[:30], b""])
def test_no_answer_is_an_error(said: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(said)

    async def use(upstream: Upstream) -> None:
        with pytest.raises(ConnectionError):
            await upstream.post(b"a", "id")

    assert run(serve, use) == 1


def test_who_gives_up_ends_the_connection() -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        assert await reader.read() == b""
        ended.set()

    async def use(upstream: Upstream) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await upstream.post(b"a", "id")
        await ended.wait()

    assert run(serve, use) == 1


def test_nobody_there() -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="Connect"):
            await Upstream("127.0.0.1", 1, "/x").post(b"a", "id")

    asyncio.run(main())
