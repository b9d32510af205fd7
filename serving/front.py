"""The public port: routes, limits, health and draining, as an ASGI application before TorchServe.

A body is written to a file of the run folder while it arrives; TorchServe and its worker are told only the file's
name. So nothing copies a picture through the JVM, a slow client holds no worker, and memory stays bounded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.contract import COUNT_HEADER, PREDICT_ROUTE, RequestError
from serving.exported.model_contract import Contract
from serving.exported.openapi import exported_openapi
from serving.openapi import openapi
from serving.page import page
from serving.run_folder import RunFolder
from serving.spool import BODY, Body, Spool
from serving.upstream import Upstream, UpstreamAnswer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = "application/json"
RETRY_AFTER = (b"retry-after", b"1")
logger = logging.getLogger("headcount")


@dataclass(frozen=True)
class FrontSettings:
    """The front's limits and addresses.

    torchserve: its port on loopback. request_bytes: largest body. spool_bytes: all bodies together. queue: admitted
    requests, running ones included. head_bytes, head_seconds: the largest request line with headers, and the time to
    send them. body_seconds: to send a body. slow_seconds: as in Spool. answer_seconds: to answer a request.
    stuck_seconds: without a sign of life from any worker until /ping says so. page: whether GET / answers with the page
    that counts in a browser.
    """

    run_folder: RunFolder
    torchserve: int
    predict_route: str = PREDICT_ROUTE
    health_route: str = "/ping"
    request_bytes: int = 32_000_000
    spool_bytes: int = 512_000_000
    queue: int = 64
    head_bytes: int = 16_384
    head_seconds: float = 10
    body_seconds: float = 60
    slow_seconds: float = 5
    answer_seconds: float = 120
    stuck_seconds: float = 10
    page: bool = True


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
        Gauge("headcount_workers", "Workers alive", registry=registry).set_function(
            lambda: len(front.settings.run_folder.workers())
        )


class Front:
    """The ASGI application.

    leaving: /ping answers 503, and requests are still taken. draining: new requests are refused as well.
    open: prediction requests that are not answered. in_flight: those of them that were admitted to the queue.
    """

    def __init__(self, settings: FrontSettings) -> None:
        self.settings = settings
        self.leaving = self.draining = False
        self.open = self.in_flight = 0
        self.predict_routes: tuple[str, ...] = (settings.predict_route, PREDICT_ROUTE)
        self.takes, self.done, self.no_page = "a picture", "counted", ""
        self.spool = Spool(
            settings.run_folder.spool, settings.request_bytes, settings.spool_bytes, settings.slow_seconds
        )
        self.metrics = Metrics(self)
        # Body, type and further headers of what GET answers, by path.
        self.documents: dict[str, tuple[bytes, str, dict[str, str]]] = {"/openapi.json": (_json(openapi()), JSON, {})}
        if settings.page:
            self.documents["/"] = page(settings.request_bytes, "this server")
        self.upstream = Upstream("127.0.0.1", settings.torchserve, PREDICT_ROUTE)
        self._looked, self._had_worker = 0.0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        predicts = path in self.predict_routes
        if not predicts and path not in (
            self.settings.health_route,
            FrontSettings.health_route,
            "/metrics",
            *self.documents,
        ):
            told = f"there is nothing at {path}; POST {self.takes} to {self.predict_routes[0]}"
            await _answer_error(send, RequestError(self.no_page if self.no_page and path == "/" else told, 404))
        elif method not in (("POST",) if predicts else ("GET", "HEAD")):
            takes, allow = (f"POST with {self.takes}", b"POST") if predicts else ("GET", b"GET, HEAD")
            error = RequestError(f"{path} takes {takes}, not {method}", 405)
            await _answer_error(send, error, [(b"allow", allow)])
        elif predicts:
            await self._predict(scope, receive, send)
        elif path == "/metrics":
            await _answer(send, 200, generate_latest(self.metrics.registry), b"text/plain; version=0.0.4")
        elif path in self.documents:
            body, content_type, headers = self.documents[path]
            extra = [(name.encode(), value.encode()) for name, value in headers.items()]
            await _answer(send, 200, body, content_type.encode(), extra)
        else:
            healthy = self.healthy()
            word = "Healthy" if healthy else "Draining" if self.leaving else "Unhealthy"
            await _answer(send, 200 if healthy else 503, _json({"status": word}))

    def expect(self, scope: Mapping[str, Any]) -> Body | None:
        """Returns the body to fill for a request whose headers were parsed, or None if its route takes none."""
        wanted = scope["method"] == "POST" and scope["path"] in self.predict_routes
        return self.spool.body(_declared(scope)) if wanted else None

    def serve_exported(self, contract: Contract) -> None:
        """Serves an exported model instead of the one that counts people, before there is a worker."""
        route = f"/predictions/{contract.name}"
        given = self.settings.predict_route
        self.predict_routes = (route if given == PREDICT_ROUTE else given, route, PREDICT_ROUTE)
        self.takes, self.done = "JSON instances", "predicted"
        self.no_page = (
            f"the page counts people, and this server has the model {contract.name}; POST JSON instances to "
            f"{self.predict_routes[0]}, as /openapi.json describes them"
        )
        self.documents = {"/openapi.json": (_json(exported_openapi(contract, self.predict_routes[0])), JSON, {})}
        self.upstream = Upstream("127.0.0.1", self.settings.torchserve, route)

    def close(self) -> None:
        self.upstream.close()
        self.spool.close()

    # Health

    def _some_worker(self) -> bool:
        """Whether there was a worker a moment ago: looking costs more than it is worth for every request."""
        if time.monotonic() > self._looked + 0.2:
            self._looked, self._had_worker = time.monotonic(), bool(self.settings.run_folder.workers())
        return self._had_worker

    def healthy(self) -> bool:
        """Whether a worker that has run a picture is alive and was seen working lately."""
        ages = self.settings.run_folder.workers().values()
        return not self.leaving and any(age < self.settings.stuck_seconds for age in ages)

    async def probe(self, request: bytes) -> None:
        """Have TorchServe answer a request if no worker gave a sign of life lately: an idle one gives none."""
        if all(age > self.settings.stuck_seconds / 5 for age in self.settings.run_folder.workers().values()):
            body = self.spool.body()
            try:
                body.write(request)
                body.finish()
                await self._ask(body, "probe")
            except (OSError, RequestError):
                pass  # health is judged by the sign of life alone
            finally:
                body.discard()

    # Predictions

    async def _predict(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request_id = headers.get("x-request-id", "")
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", request_id):
            request_id = secrets.token_hex(8)
        arrived = time.time()
        record: dict[str, Any] = {"request_id": request_id, "status": 0}
        self.open += 1
        try:
            await self._answer_prediction(scope, headers, receive, send, record)
        except RequestError as error:
            record["status"], record["message"] = error.code, str(error)
            extra: Headers = [(b"x-request-id", request_id.encode())]
            if error.code in (429, 503):
                extra.append(RETRY_AFTER)
            if error.code in (408, 413) or self.leaving:
                extra.append((b"connection", b"close"))  # the rest of the body may never end
            await _answer_error(send, error, extra)
        except _ClientGoneError:
            record["status"], record["message"] = 499, "the client went away"
        except Exception as error:  # a full disk, say
            logger.exception("a request failed")
            record["status"], record["message"] = 500, str(error)
            await _answer_error(send, RequestError("the server failed; its log says why", 500))
        finally:
            self.open -= 1
        self.metrics.requests.labels(record["status"]).inc()
        if logger.isEnabledFor(logging.INFO):
            record["seconds"] = round(time.time() - arrived, 4)
            logger.info(record.pop("message", self.done), extra={"fields": record})

    async def _answer_prediction(
        self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send, record: dict[str, Any]
    ) -> None:
        body: Body = scope.get("extensions", {}).get(BODY) or self.spool.body(_declared(scope))
        admitted = read = False
        try:
            if self.draining:
                raise RequestError("this server is shutting down; ask another one", 503)
            if not self._some_worker():
                raise RequestError("no worker is ready; try again in some seconds", 503)
            await self._receive_body(body, headers, receive)
            if self.in_flight >= self.settings.queue:
                raise RequestError(f"all workers are busy and {self.in_flight} requests wait; try again", 429)
            admitted, began = True, time.perf_counter()
            self.in_flight += 1
            answer = await self._ask(
                body,
                record["request_id"],
                content_type=headers.get("content-type", ""),
                query=scope["query_string"].decode("latin-1"),
                accept=headers.get("accept", ""),
            )
            read = True
            self._observe(answer, began)
            record |= {"status": answer.status, "bytes": body.size}
            if COUNT_HEADER.lower() in answer.headers:
                record["count"] = answer.headers[COUNT_HEADER.lower()]
            if answer.status != 200:
                record["message"] = json.loads(answer.body)["error"]["message"]
            extra: Headers = [(b"x-request-id", record["request_id"].encode())]
            if answer.status in (429, 503):
                extra.append(RETRY_AFTER)
            if self.leaving:  # the client's next connection finds another server
                extra.append((b"connection", b"close"))
            passed = {COUNT_HEADER.lower(), "server-timing"} & answer.headers.keys()
            extra += [(name.encode(), answer.headers[name].encode()) for name in passed]
            content_type = answer.headers.get("content-type", "application/json").encode()
            await _answer(send, answer.status, answer.body, content_type, extra)
        finally:
            self.in_flight -= admitted
            body.discard(read)

    async def _receive_body(self, body: Body, headers: dict[str, str], receive: Receive) -> None:
        """Wait for the whole body. Raises RequestError, OSError and _ClientGoneError."""
        if body.refused and "expect" in headers:
            body.finish()  # the client waits for leave to send: it is not given
        try:
            async with asyncio.timeout(self.settings.body_seconds) as body.deadline:
                more = True
                while more and body.failed is None:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGoneError
                    more = message.get("more_body", False)
                    if chunk := message.get("body", b""):
                        body.write(chunk)
        except TimeoutError:
            if body.failed is None:
                seconds = self.settings.body_seconds
                raise RequestError(f"the body did not arrive within {seconds:g} s", 408) from None
        body.finish()

    async def _ask(
        self, body: Body, request_id: str, content_type: str = "", query: str = "", accept: str = ""
    ) -> UpstreamAnswer:
        """TorchServe's answer to a body. Raises RequestError."""
        told = {"spooled": body.name, "size": body.size, "content_type": content_type, "query": query, "accept": accept}
        try:
            async with asyncio.timeout(self.settings.answer_seconds):
                answer = await self.upstream.post(_json(told), request_id)
        except TimeoutError:
            raise RequestError(f"no answer within {self.settings.answer_seconds:g} s; send less", 504) from None
        except OSError:
            raise RequestError("no worker is available at the moment; try again", 503) from None
        if answer.status >= 400 and not answer.body.startswith(b'{"error"'):
            # TorchServe's own words name Java classes.
            raise RequestError("no worker could answer; the server's log says why. Try again", 503)
        return answer

    def _observe(self, answer: UpstreamAnswer, began: float) -> None:
        self.metrics.latency.observe(time.perf_counter() - began)
        if answer.status == 200:
            self.metrics.people.inc(int(answer.headers.get(COUNT_HEADER.lower(), 0)))
        for stage, spent in re.findall(r"(\w+);dur=([\d.]+)", answer.headers.get("server-timing", "")):
            if stage in self.metrics.stages:
                self.metrics.stages[stage].observe(float(spent) / 1e3)


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


def _declared(scope: Mapping[str, Any]) -> int:
    """The length that a request's head declares for its body; 0 if none."""
    length: bytes = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(length) if length.isdigit() else 0


_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def _json(value: Any) -> bytes:
    return _encode(value).encode()
