"""The public port: routes, limits, health and draining, as an ASGI application before TorchServe.

A body is written to a file of the run folder while it arrives; TorchServe and its worker are told only the file's
name. So nothing copies a picture through the JVM, a slow client holds no worker, and memory stays bounded.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.contract import COUNT_HEADER, RequestError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

PREDICT_ROUTE = "/predictions/people"
logger = logging.getLogger("headcount")


@dataclass(frozen=True)
class Settings:
    """What the front needs to know.

    request_bytes: largest body. spool_bytes: all bodies together. queue: admitted requests, running ones included.
    body_seconds: to send a body. answer_seconds: to answer it. stuck_seconds: without a sign of life from any
    worker until /ping says so.
    """

    run_folder: Path
    upstream: str
    predict_route: str = PREDICT_ROUTE
    health_route: str = "/ping"
    request_bytes: int = 32_000_000
    spool_bytes: int = 512_000_000
    queue: int = 64
    body_seconds: float = 60
    answer_seconds: float = 120
    stuck_seconds: float = 10


class Metrics:
    """Prometheus metrics of this process."""

    def __init__(self, front: Front) -> None:
        self.registry = registry = CollectorRegistry()
        buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
        self.requests = Counter(
            "headcount_requests", "Prediction requests by HTTP status", ["status"], registry=registry
        )
        self.latency = Histogram(
            "headcount_latency_seconds",
            "From the whole body to the answer",
            buckets=buckets,
            registry=registry,
        )
        self.stages = {
            stage: Histogram(f"headcount_{stage}_seconds", f"A request's {stage}", buckets=buckets, registry=registry)
            for stage in ("decode", "inference")
        }
        self.people = Counter("headcount_people", "People counted", registry=registry)
        Gauge("headcount_queue", "Requests admitted and not answered", registry=registry).set_function(
            lambda: front.in_flight
        )
        Gauge("headcount_workers", "Workers alive", registry=registry).set_function(lambda: len(front.workers()))


class Front:
    """The ASGI application."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.draining = False
        self.in_flight = 0
        self.spooled_bytes = 0
        self.spool = settings.run_folder / "spool"
        self.metrics = Metrics(self)
        self._client: aiohttp.ClientSession | None = None
        self._looked, self._had_worker = 0.0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        if path in (self.settings.predict_route, PREDICT_ROUTE):
            if method == "POST":
                await self._predict(scope, receive, send)
            else:
                await _answer_error(send, RequestError(f"{path} takes POST with a picture, not {method}", 405))
        elif path in (self.settings.health_route, "/ping"):
            healthy = self.healthy()
            word = "Healthy" if healthy else "Draining" if self.draining else "Unhealthy"
            await _answer(send, 200 if healthy else 503, _json({"status": word}))
        elif path == "/metrics":
            await _answer(send, 200, generate_latest(self.metrics.registry), b"text/plain; version=0.0.4")
        else:
            route = self.settings.predict_route
            await _answer_error(send, RequestError(f"there is nothing at {path}; POST a picture to {route}", 404))

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    # Health

    def workers(self) -> dict[int, float]:
        """Living workers' process ids and the seconds since their last sign of life."""
        now = time.time()
        alive = {}
        for file in (self.settings.run_folder / "workers").iterdir():
            try:
                os.kill(int(file.name), 0)
                alive[int(file.name)] = now - file.stat().st_mtime
            except (ProcessLookupError, FileNotFoundError):
                file.unlink(missing_ok=True)
        return alive

    def _some_worker(self) -> bool:
        """Whether there was a worker a moment ago: looking costs more than it is worth for every request."""
        if time.monotonic() > self._looked + 0.2:
            self._looked, self._had_worker = time.monotonic(), bool(self.workers())
        return self._had_worker

    def healthy(self) -> bool:
        """Whether a worker that has run a picture is alive and was seen working lately."""
        return not self.draining and any(age < self.settings.stuck_seconds for age in self.workers().values())

    async def probe(self, picture: bytes) -> None:
        """Run a picture through TorchServe if no worker gave a sign of life lately: an idle one gives none."""
        if all(age > self.settings.stuck_seconds / 5 for age in self.workers().values()):
            name = self._write(picture)
            try:
                await self._ask({"spooled": name, "content_type": "image/jpeg", "query": "", "accept": ""}, "probe")
            except (aiohttp.ClientError, OSError, TimeoutError, RequestError):
                pass  # health is judged by the sign of life alone
            finally:
                self._forget(name, len(picture))

    # Predictions

    async def _predict(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request_id = headers.get("x-request-id", "")
        if not re.fullmatch(r"[\w.:-]{1,64}", request_id):
            request_id = secrets.token_hex(8)
        arrived = time.time()
        record: dict[str, Any] = {"request_id": request_id, "status": 0}
        try:
            await self._answer_prediction(scope, headers, receive, send, record)
        except RequestError as error:
            record["status"], record["message"] = error.code, str(error)
            extra: Headers = [(b"x-request-id", request_id.encode())]
            if error.code in (429, 503):
                extra.append((b"retry-after", b"1"))
            if error.code in (408, 413):
                extra.append((b"connection", b"close"))  # the rest of the body may never end
            await _answer_error(send, error, extra)
        except _ClientGoneError:
            record["status"], record["message"] = 499, "the client went away"
        except Exception as error:  # a full disk, say
            logger.exception("a request failed")
            record["status"], record["message"] = 500, str(error)
            await _answer_error(send, RequestError("the server failed; its log says why", 500))
        self.metrics.requests.labels(record["status"]).inc()
        if logger.isEnabledFor(logging.INFO):
            record["seconds"] = round(time.time() - arrived, 4)
            logger.info(record.pop("message", "counted"), extra={"fields": record})

    async def _answer_prediction(
        self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send, record: dict[str, Any]
    ) -> None:
        if self.draining:
            raise RequestError("this server is shutting down; ask another one", 503)
        if not self._some_worker():
            raise RequestError("no worker is ready; try again in some seconds", 503)
        name, size = await self._receive_body(headers, receive)
        admitted = False
        try:
            if self.in_flight >= self.settings.queue:
                raise RequestError(f"all workers are busy and {self.in_flight} requests wait; try again", 429)
            admitted, began = True, time.perf_counter()
            self.in_flight += 1
            told = {
                "spooled": name,
                "content_type": headers.get("content-type", ""),
                "query": scope["query_string"].decode("latin-1"),
                "accept": headers.get("accept", ""),
            }
            try:
                status, answered, body = await self._ask(told, record["request_id"])
            except TimeoutError:
                raise RequestError(f"no answer within {self.settings.answer_seconds:g} s; send less", 504) from None
            except (aiohttp.ClientError, OSError):
                raise RequestError("no worker is available at the moment; try again", 503) from None
            self._observe(answered, began, status)
            record |= {"status": status, "bytes": size, "count": answered.get(COUNT_HEADER)}
            if status != 200:
                record["message"] = json.loads(body)["error"]["message"]
            extra: Headers = [(b"x-request-id", record["request_id"].encode())]
            extra += [
                (key.lower().encode(), answered[key].encode())
                for key in (COUNT_HEADER, "Server-Timing")
                if key in answered
            ]
            await _answer(send, status, body, answered.get("Content-Type", "application/json").encode(), extra)
        finally:
            self.in_flight -= admitted
            self._forget(name, size)

    async def _receive_body(self, headers: dict[str, str], receive: Receive) -> tuple[str, int]:
        """Spool the body; its name and size. Raises RequestError and _ClientGoneError."""
        limit = self.settings.request_bytes
        too_large = RequestError(
            f"the body is larger than {limit / 1e6:g} MB; send a smaller picture or fewer instances, "
            "or raise HEADCOUNT_MAX_REQUEST_BYTES where the server runs", 413,
        )  # fmt: skip
        declared = headers.get("content-length", "")
        refused = declared.isdigit() and int(declared) > limit
        if refused and "expect" in headers:
            raise too_large  # the client waits for leave to send: it is not given
        name, size, taken = secrets.token_hex(16), 0, 0
        file = -1 if refused else os.open(self.spool / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGoneError
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    refused = refused or size > limit
                    # A refused body is read to its end, within reason: a client still sending sees no answer.
                    if refused and size > 4 * limit:
                        raise too_large
                    if not refused and chunk:
                        if self.spooled_bytes + len(chunk) > self.settings.spool_bytes:
                            raise RequestError("too many pictures are on their way at once; try again", 429)
                        if os.write(file, chunk) < len(chunk):
                            raise OSError(errno.ENOSPC, "no room for the body in the run folder")
                        taken += len(chunk)
                        self.spooled_bytes += len(chunk)
            if refused:
                raise too_large
            return name, size
        except BaseException as error:
            self._forget(name, taken)
            if isinstance(error, TimeoutError):
                seconds = self.settings.body_seconds
                raise RequestError(f"the body did not arrive within {seconds:g} s", 408) from None
            raise
        finally:
            if file >= 0:
                os.close(file)

    async def _ask(self, told: dict[str, str], request_id: str) -> tuple[int, Any, bytes]:
        """Status, headers and body of TorchServe's answer."""
        if self._client is None:
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                timeout=aiohttp.ClientTimeout(total=self.settings.answer_seconds),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            )
        headers = {"Content-Type": "application/octet-stream", "x-request-id": request_id}
        async with self._client.post(self.settings.upstream, data=_json(told), headers=headers) as answer:
            body = await answer.read()
            if answer.status >= 400 and not body.startswith(b'{"error"'):
                # TorchServe's own words name Java classes.
                raise RequestError("no worker could answer; the server's log says why. Try again", 503)
            return answer.status, answer.headers, body

    def _observe(self, answered: Any, began: float, status: int) -> None:
        self.metrics.latency.observe(time.perf_counter() - began)
        if status == 200:
            self.metrics.people.inc(int(answered.get(COUNT_HEADER, 0)))
        for stage, spent in re.findall(r"(\w+);dur=([\d.]+)", answered.get("Server-Timing", "")):
            if stage in self.metrics.stages:
                self.metrics.stages[stage].observe(float(spent) / 1e3)

    def _write(self, data: bytes) -> str:
        name = secrets.token_hex(16)
        (self.spool / name).write_bytes(data)
        self.spooled_bytes += len(data)
        return name

    def _forget(self, name: str, size: int) -> None:
        (self.spool / name).unlink(missing_ok=True)
        self.spooled_bytes -= size


class _ClientGoneError(Exception):
    """The client closed the connection before its body was whole."""


async def _answer_error(send: Send, error: RequestError, extra: Headers | None = None) -> None:
    await _answer(send, error.code, _json(error.as_json()), extra=extra)


async def _answer(
    send: Send,
    status: int,
    body: bytes,
    content_type: bytes = b"application/json",
    extra: Headers | None = None,
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *(extra or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
