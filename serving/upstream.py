"""The front's client to TorchServe: HTTP/1.1 on loopback, over connections that are kept.

serving/README.md says why it is not a library's.
"""

from __future__ import annotations

import asyncio
from typing import cast

import httptools


class Upstream:
    """A client of one HTTP/1.1 server on loopback that keeps its connections."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self.host, self.port = host, port
        self._head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/octet-stream\r\n"
        self._idle: list[_Connection] = []

    async def post(self, body: bytes, request_id: str) -> UpstreamAnswer:
        """Returns the server's answer to this body. Raises OSError if there is none.

        The request is repeated on a new connection if the server closed an idle one at that moment, because counting
        twice is harmless.
        """
        head = f"{self._head}x-request-id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        message = head.encode() + body
        while self._idle:
            try:
                return await self._idle.pop().ask(message)
            except ConnectionError:
                pass
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self._idle), self.host, self.port)
        return await connection.ask(message)

    def close(self) -> None:
        for connection in self._idle.copy():
            connection.transport.abort()


class UpstreamAnswer:
    """TorchServe's answer. Header names are in lower case."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""


class _Connection(asyncio.Protocol):
    """One connection; a request at a time."""

    transport: asyncio.Transport

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._parser = httptools.HttpResponseParser(self)
        self._asked: asyncio.Future[UpstreamAnswer] | None = None
        self._answer, self._parts = UpstreamAnswer(), list[bytes]()

    async def ask(self, message: bytes) -> UpstreamAnswer:
        self._asked = asyncio.get_running_loop().create_future()
        self._answer, self._parts = UpstreamAnswer(), []
        self.transport.write(message)
        try:
            return await self._asked
        except BaseException:
            self.transport.abort()
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        self._fail("TorchServe closed the connection")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"TorchServe's answer is not HTTP: {error}")
            self.transport.abort()

    def _fail(self, why: str) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.set_exception(ConnectionError(why))

    # httptools calls these.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._answer.status, self._answer.body = self._parser.get_status_code(), b"".join(self._parts)
        if self._asked is None or self._asked.done():
            return
        self._asked.set_result(self._answer)
        if self._parser.should_keep_alive():
            self._idle.append(self)
        else:
            self.transport.close()
