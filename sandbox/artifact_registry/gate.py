"""The gate of the Docker registry: it asks for access tokens as Artifact Registry does, and passes requests on.

https://cloud.google.com/artifact-registry/docs/docker/authentication#token
The registry's own authentication knows fixed passwords, or tokens signed with a certificate. Google's password is an
OAuth access token with the user name `oauth2accesstoken`, which ends after an hour.
"""

import asyncio
import base64
import binascii
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sandbox import clock, oauth2
from sandbox.errors import precondition
from sandbox.streams import pump

USER = "oauth2accesstoken"
TOKEN_PATH = "/v2/token"
HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade"}


def credentials(image: str) -> dict[str, str] | None:
    """The sandbox's own credentials for pulling images, as Google's service agents have tokens of their own."""
    return {"username": USER, "password": oauth2.TOKEN} if image.startswith("127.0.0.1:") else None


def _presented(request: Request) -> str | None:
    """The token in a request's Authorization header, or None where it has none. "" is a header of no use."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind == "Bearer":
        return value
    if kind != "Basic":
        return None
    try:
        user, _, password = base64.b64decode(value).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return password if user == USER else ""


def _refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"errors": [{"code": code, "message": message}]}, status, headers)


def listen(address: str) -> socket.socket:
    """A socket that listens on HOST:PORT. Raises FAILED_PRECONDITION when the port is taken."""
    host, port = address.split(":")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, int(port)))
    except OSError:
        listener.close()
        raise precondition(
            f"Something else listens on {address}, which the sandbox's Docker registry needs: stop it, or choose "
            "another port with --registry-port."
        ) from None
    listener.listen(128)
    return listener


class Gate:
    """Listens on `address` in a thread of its own while it is open, and asks `backend`, both HOST:PORT.

    With a `certificate`, a PEM file that holds the key too, it speaks HTTPS as well as HTTP on that port: on loopback,
    BuildKit speaks HTTP alone and other clients of registries HTTPS alone.
    """

    def __init__(self, address: str, backend: str, certificate: Path | None = None) -> None:
        self.address, self._backend = address, backend
        self._servers = [self._server(None)] + ([self._server(certificate)] if certificate else [])
        self._thread: threading.Thread | None = None

    def _server(self, certificate: Path | None) -> uvicorn.Server:
        options: Any = {"lifespan": "off", "log_level": "error", "access_log": False, "timeout_graceful_shutdown": 2}
        return uvicorn.Server(uvicorn.Config(self, ssl_certfile=certificate, **options))

    def open(self) -> None:
        """Returns when requests can be sent. Raises FAILED_PRECONDITION when the port is taken."""
        listener = listen(self.address)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listener)), daemon=True)
        self._thread.start()

    def close(self) -> None:
        for server in self._servers:
            server.should_exit = True
        if self._thread:
            self._thread.join()

    async def _serve(self, listener: socket.socket) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=None, trust_env=False, limits=limits) as self._client:
            if len(self._servers) == 1:
                await self._servers[0].serve(sockets=[listener])
                return
            inner = [listen("127.0.0.1:0") for _ in self._servers]

            async def sort(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                first = await reader.read(65536)
                tls = first[:1] == b"\x16"  # a TLS record of type handshake
                inner_reader, inner_writer = await asyncio.open_connection(*ports[tls])
                inner_writer.write(first)
                await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

            ports = [server.getsockname() for server in inner]
            async with await asyncio.start_server(sort, sock=listener):
                await asyncio.gather(*(s.serve(sockets=[i]) for s, i in zip(self._servers, inner, strict=True)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
            await response(scope, receive, send)
        except ClientDisconnect:
            return

    async def _answer(self, request: Request) -> Response:
        token = _presented(request)
        if request.url.path == TOKEN_PATH:
            # Clients ask by POST first, and by GET where that answers 404, as Google's registries are known to:
            # https://github.com/containerd/containerd/blob/main/core/remotes/docker/authorizer.go
            return self._token(token) if request.method == "GET" else Response(status_code=404)
        if token is None or not oauth2.is_accepted(token):
            realm = f"{request.url.scheme}://{self.address}{TOKEN_PATH}"
            challenge = {"www-authenticate": f'Bearer realm="{realm}",service="{self.address}"'}
            return _refusal(401, "UNAUTHORIZED", "authentication required", challenge)
        return await self._pass_on(request)

    @staticmethod
    def _token(token: str | None) -> Response:
        """Exchanges a password for a bearer token, which is the same one. Nothing here is public."""
        if token is None:
            return _refusal(403, "DENIED", "Unauthenticated request. Log in as oauth2accesstoken with an access token.")
        if not oauth2.is_accepted(token):
            return _refusal(401, "UNAUTHORIZED", "The access token has expired, or is not one of the sandbox's.")
        left = min((oauth2.expiry(token) or 0) - clock.time(), 3600)
        return JSONResponse({"token": token, "access_token": token, "expires_in": int(left)})

    async def _pass_on(self, request: Request) -> Response:
        url = httpx.URL(f"http://{self._backend}", raw_path=request.scope["raw_path"] + _query(request))
        # The registry makes the addresses in its answers from the Host header.
        kept = [(k, v) for k, v in request.headers.raw if k not in HOP_BY_HOP and k != b"authorization"]
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        content = request.stream() if has_body else None
        try:
            asked = self._client.build_request(request.method, url, headers=kept, content=content)
            answer = await self._client.send(asked, stream=True)
        except httpx.HTTPError as error:
            return _refusal(502, "UNAVAILABLE", f"The registry does not answer: {error!r}")
        response = StreamingResponse(_body(answer), answer.status_code)
        response.raw_headers = [(k.lower(), v) for k, v in answer.headers.raw if k.lower() not in HOP_BY_HOP]
        return response


def _query(request: Request) -> bytes:
    query: bytes = request.scope["query_string"]
    return b"?" + query if query else b""


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()
