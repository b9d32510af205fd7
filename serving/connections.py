"""The connections of clients to the front: uvicorn's HTTP protocol with bodies that go to files, and with limits.

serving/README.md says why the protocol is a subclass of uvicorn's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Generator
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.contract import error_json
from serving.front import Front
from serving.spool import BODY, Body

IDLE_SECONDS = 75  # that a connection without a request is kept
LINGER_SECONDS = 2  # that a client has to read why it was refused, before the connection is closed


def server(front: Front) -> uvicorn.Server:
    """The HTTP server of the public port. Its serve() takes the sockets to serve."""
    protocol: Any = functools.partial(SpoolingProtocol, front)
    return _Server(
        uvicorn.Config(
            front, lifespan="off", http=protocol, log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=IDLE_SECONDS, ws="none",
        )
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, because the launcher drains the front first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class SpoolingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with three differences.

    The body of a prediction goes to its file as it arrives. ASGI would have it copied three times more, and the
    application woken for every part of it. The application finds the Body in scope["extensions"], and sees an empty one
    through receive().

    No client holds a connection or memory for ever: a head (request line and headers) has a limit of size and of time,
    the rest of a body after an early answer and the reading of an answer have one of time.

    A request that would rather be HTTP/2, as Java's own client sends it, keeps its body.
    """

    body: Body | None = None

    def __init__(self, front: Front, **options: Any) -> None:
        super().__init__(**options)
        self.front, self.settings = front, front.settings
        self._in_body = self._broken = False
        self._head_size = 0  # bytes of the head that arrives
        self._beside_body = 0  # bytes since the last of a body: chunk extensions and trailers
        self._part = 0  # counts the heads and bodies of this connection
        self._timer: asyncio.TimerHandle | None = None
        self._timed_part = -1

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._limit_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._broken = True
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        while len(rest) and not self._broken:
            size = len(rest) if self._in_body else self.settings.head_bytes - self._head_size
            part, rest = rest[:size], rest[size:]
            if self._in_body:
                self._beside_body += len(part)
            else:
                self._head_size += len(part)
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade as error:
                rest = memoryview(self._head_without_upgrade() + bytes(part[error.args[0] :]) + bytes(rest))
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
                self._head_size = 0
            except httptools.HttpParserError:
                self._refuse(400, "this is not a valid HTTP/1.1 request")
            if (self._beside_body if self._in_body else self._head_size) >= self.settings.head_bytes:
                self._refuse(431, f"the request line and the headers have more than {self.settings.head_bytes} bytes")
        self._limit_time()

    # httptools calls these.

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # else it is a trailer, which the front does not use
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # the parser stops here and would drop the body
        pipelined = self._answer_is_due()
        self.body = None
        super().on_headers_complete()
        self._in_body, self._beside_body = True, 0
        self._part += 1
        if not pipelined:
            self.body = self.front.expect(self.scope)
        if self.body is not None:
            self.scope["extensions"] = {BODY: self.body}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        self._beside_body = 0
        if self.body is None:
            super().on_body(body)
        elif not self.cycle.response_complete:
            self.body.write(body)
            if self.body.failed is not None:
                self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        if not self._in_body:  # the parser stopped after the headers
            return
        super().on_message_complete()
        self._in_body, self._head_size = False, 0
        self._part += 1

    def _head_without_upgrade(self) -> bytes:
        """Returns the parsed head without its request for another protocol, which a server may ignore (RFC 9110,
        section 7.8)."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name not in (b"upgrade", b"http2-settings"):
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    # uvicorn calls this.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reading()

    def _answer_is_due(self) -> bool:
        """Whether a request whose headers were parsed has no complete answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, code: int, message: str) -> None:
        """Answers an invalid request with an error, and closes the connection."""
        if self._broken or self.transport.is_closing():
            return
        self._broken = True
        if (self.pipeline or not self._in_body) and self._answer_is_due():
            self.cycle.keep_alive = False  # earlier requests get their answers, and the last one closes
        elif self._in_body and self.cycle.response_started:
            self.transport.close()
        else:
            if self._in_body:  # the rest of the body is not read
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            body = json.dumps(error_json(code, message)).encode()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[code] + head + body)
            # Closed while the client is still sending, the connection would be reset, and the answer lost.
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _limit_time(self) -> None:
        """Starts the time limit of an incomplete head or body, unless it runs or another limit applies."""
        if self._timed_part == self._part:
            return
        self._stop_timer()
        if self._broken or (not self._in_body and (self._answer_is_due() or self.timeout_keep_alive_task is not None)):
            return
        seconds = self.settings.body_seconds if self._in_body else self.settings.head_seconds
        self._timer, self._timed_part = self.loop.call_later(seconds, self._time_is_up), self._part

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timed_part = None, -1

    def _time_is_up(self) -> None:
        self._stop_timer()
        if self._in_body and self._answer_is_due():
            self._limit_time()  # the front has a time limit of its own, and says so
        elif self._in_body or not self._head_size:
            self.transport.abort()
        else:
            self._refuse(408, f"the headers did not arrive within {self.settings.head_seconds:g} s")

    def _watch_reading(self, unsent: int = 0) -> None:
        """Closes the connection of a client that does not read its answer. unsent: bytes left at the last look."""
        left = self.transport.get_write_buffer_size()
        if left and left == unsent:
            self.transport.abort()
        elif left:
            self.loop.call_later(IDLE_SECONDS, self._watch_reading, left)
