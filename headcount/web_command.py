"""`headcount web`: the page that counts in a browser, served on this machine and to it alone.

It passes pictures on to what counts, with this user's credentials. So that no other web page can do that through the
user's browser, requests must name this server as their host (a name that an attacker's DNS resolves to 127.0.0.1 is
another one) and, where the browser says it, as their origin.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

import typer

from headcount.client import open_counter
from headcount.count_command import leave
from headcount.counters import Counter, CountError
from serving.contract import PREDICT_ROUTE, Limits, Parameters, RequestError, error_json
from serving.page import page

IDLE_SECONDS = 60  # that a connection may be silent


def web(
    url: Annotated[str | None, typer.Option(metavar="URL", help="Ask this server, e.g. http://localhost:8080.")] = None,
    stack: Annotated[
        str | None, typer.Option(metavar="NAME", help="Ask the endpoint of this Pulumi stack, e.g. local or dev.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Ask this endpoint of Vertex AI: projects/…/locations/…/endpoints/ID."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 is a free one.")] = 0,
) -> None:
    """Serve a page, to this machine's browser alone, that counts the people in pictures which are dropped on it.

    Without a server this process counts. Ctrl-C ends it.
    """
    where = url or (f"the endpoint of stack {stack}" if stack else endpoint) or "this machine"
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs begin with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        counter = open_counter(url, None, stack, endpoint, min(4, os.cpu_count() or 1))
        with contextlib.closing(counter), Web(counter, where, port) as server:
            typer.echo(f"Headcount counts at {server.url}, on {where}. Ctrl-C stops it.")
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except CountError as error:
        leave(str(error), 1)
    except OSError as error:
        raise typer.BadParameter(f"port {port} cannot be used ({error.strerror}); give another one, or 0") from None


class Web(ThreadingHTTPServer):
    """The page, and before a counter the route that the page asks. Raises OSError for a port that is taken.

    where: who counts, in words. port: on 127.0.0.1; 0 is a free one.
    """

    daemon_threads = True

    def __init__(self, counter: Counter, where: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.counter, self.free = counter, threading.Semaphore(counter.parallel)
        largest = getattr(counter, "largest_picture", Limits.request_bytes)  # endpoints have it
        self.page = page(largest, where)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.hosts = {f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost")}


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "headcount", ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, find: Any) -> None:
        """Answer what `find` returns (a body, its type, further headers), or the error that it raises."""
        code, kind = 200, "application/json"
        headers: dict[str, str] = {}
        try:
            if self.headers.get("Host") not in self.server.hosts:
                raise RequestError(f"this server is {self.server.url}, and no other name leads to it", 403)
            body, kind, headers = find()
        except RequestError as error:
            code, body = error.code, json.dumps(error.as_json()).encode()
            self.close_connection = True  # the request's body may not have been read
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | headers
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _get(self) -> tuple[bytes, str, dict[str, str]]:
        if urlsplit(self.path).path != "/":
            raise RequestError(f"there is nothing at {self.path}; the page is at {self.server.url}", 404)
        return self.server.page

    def _post(self) -> tuple[bytes, str, dict[str, str]]:
        address = urlsplit(self.path)
        if address.path != PREDICT_ROUTE:
            raise RequestError(f"there is nothing at {self.path}; POST a picture to {PREDICT_ROUTE}", 404)
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc not in self.server.hosts:
            raise RequestError(f"a page of {origin} may not count here", 403)
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestError("the request has no Content-Length; send a picture's bytes", 411)
        if int(length) > Limits.request_bytes:
            raise RequestError(f"the picture has {length} bytes; at most {Limits.request_bytes} are taken", 413)
        parameters = Parameters.parse(dict(parse_qsl(address.query, keep_blank_values=True)))
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise RequestError("the picture did not arrive whole", 400)
        try:
            with self.server.free:
                answer = self.server.counter.count(data, parameters)
        except CountError as error:
            raise RequestError(str(error), 502) from None
        content = answer.as_json()
        if answer.annotated is not None:
            content["annotated"] = {"b64": base64.b64encode(answer.annotated).decode()}
        return json.dumps(content).encode(), "application/json", {}

    def log_message(self, *_: Any) -> None:
        """Nothing: the page says what happens."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, as JSON."""
        body = json.dumps(error_json(code, message or HTTPStatus(code).phrase)).encode()
        self.send_response(code)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))),
                            ("Connection", "close")):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        self.wfile.write(body)
