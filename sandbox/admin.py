"""Orders and questions of tests to the sandbox itself, under /_sandbox. Only with --admin.

POST   /_sandbox/faults      orders a fault: {"method", "count", "kind", …}, see `Fault`
GET    /_sandbox/faults      those not used up
DELETE /_sandbox/faults      forgets them
POST   /_sandbox/release     lets go of the operations that a "hold" fault keeps running
GET    /_sandbox/requests    every request so far: time, http, method (discovery id), name, status
DELETE /_sandbox/requests    forgets them
GET    /_sandbox/history     every state of an endpoint's traffic: trafficSplit, and available replicas by
                             deployed model, after each change of either
POST   /_sandbox/clock       {"seconds"}: puts the sandbox's clock forward, so that delays and tokens end
GET    /_sandbox/violations  departures from the discovery documents (with --validate)
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sandbox import clock
from sandbox.errors import CODES, GoogleError, invalid, not_found
from sandbox.store import JSON, Store

KINDS = {
    "status": {"code"},  # answer this HTTP status, without effect
    "refuse": {"status", "message"},  # answer this error, without effect
    "drop": {"when"},  # close the connection, before or after the effect
    "operation_error": {
        "when",
        "status",
        "message",
    },  # the operation ends with an error, before or after its effect, or "half": deployed, and without replicas
    "slow": {"seconds"},  # the operation takes this much longer
    "hold": set(),  # the operation runs until POST /_sandbox/release
    "latency": {"seconds"},  # the answer takes this much longer
}
DEFAULTS: JSON = {
    "code": 503,
    "when": "before",
    "status": "INTERNAL",
    "message": "Ordered by a fault.",
    "seconds": 1.0,
}


@dataclass
class Fault:
    """The next `count` calls of `method` (a discovery id, or * for all) go wrong in one way.

    `skip` calls go well first. `match` limits it to calls whose resource name or body contains a text.
    """

    id: int
    method: str
    kind: str
    count: int
    skip: int
    match: str
    details: JSON


@dataclass
class Admin:
    store: Store
    enabled: bool
    faults: list[Fault] = field(default_factory=list)
    requests: deque[JSON] = field(default_factory=lambda: deque(maxlen=100_000))
    violations: deque[JSON] = field(default_factory=lambda: deque(maxlen=1_000))
    release: Callable[[], None] = lambda: None
    _ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def take(self, method: str, name: str, body: bytes) -> JSON:
        """The fault that this call meets, used up by one, or {}."""
        for fault in self.faults:
            text = name.encode() + b" " + body if fault.match else b""
            if fault.method not in (method, "*") or fault.match.encode() not in text:
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.count -= 1
            if not fault.count:
                self.faults.remove(fault)
            return {"kind": fault.kind, **fault.details}
        return {}

    async def answer(self, request: Request) -> Response:
        if not self.enabled:
            raise GoogleError("PERMISSION_DENIED", "The admin routes are off: start the sandbox with --admin.")
        what = request.url.path.removeprefix("/_sandbox/")
        match request.method, what:
            case "POST", "faults":
                return JSONResponse({"id": self._order(await request.json())})
            case "DELETE", "faults":
                self.faults.clear()
                return JSONResponse({})
            case "GET", "faults":
                shown = [{k: v for k, v in vars(f).items() if k != "details"} | f.details for f in self.faults]
                return JSONResponse({"faults": shown})
            case "POST", "clock":
                clock.advance(float((await request.json())["seconds"]))
                return JSONResponse({})
            case "POST", "release":
                self.release()
                return JSONResponse({})
            case "GET", "requests":
                return JSONResponse({"requests": list(self.requests)})
            case "DELETE", "requests":
                self.requests.clear()
                return JSONResponse({})
            case "GET", "history":
                return JSONResponse({"history": self.store.history()})
            case "GET", "violations":
                return JSONResponse({"violations": list(self.violations)})
        raise not_found(f"No admin route {request.method} {request.url.path}; see sandbox/admin.py.")

    def _order(self, order: Any) -> int:
        kind = order.get("kind") if isinstance(order, dict) else None
        if kind not in KINDS:
            raise invalid(f"A fault needs a kind, one of {', '.join(KINDS)}.")
        allowed = {"method", "kind", "count", "skip", "match", *KINDS[kind]}
        if unknown := set(order) - allowed:
            raise invalid(f"A {kind} fault has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(allowed))}.")
        details = {k: order.get(k, DEFAULTS[k]) for k in KINDS[kind]}
        moments = ("before", "after", "half") if kind == "operation_error" else ("before", "after")
        if details.get("when", "before") not in moments:
            raise invalid(f'"when" is one of {", ".join(moments)}.')
        if details.get("status", "INTERNAL") not in CODES:
            raise invalid(f'"status" is one of {", ".join(CODES)}.')
        fault = Fault(
            id=next(self._ids),
            method=order.get("method", "*"),
            kind=kind,
            count=int(order.get("count", 1)),
            skip=int(order.get("skip", 0)),
            match=order.get("match", ""),
            details=details,
        )
        self.faults.append(fault)
        return fault.id

    def journal(self, http: str, method: str, name: str, status: int) -> None:
        """Remembers a request; status 0 is a connection that was dropped."""
        if self.enabled:
            self.requests.append({"time": clock.now(), "http": http, "method": method, "name": name, "status": status})


async def linger(fault: JSON) -> None:
    if fault.get("kind") == "latency":
        await asyncio.sleep(fault["seconds"])
