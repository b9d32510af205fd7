"""Long-running operations: which ones run on a resource, and waiting for one."""

from __future__ import annotations

import time

from .engine_call import EngineCall, duration
from .errors import RefusedError
from .retries import pauses
from .vertex_api import VertexApi
from .wire import Wire


def running(call: EngineCall, api: VertexApi, name: str) -> list[Wire]:
    """The operations that are running on a model or endpoint; none if it does not exist."""
    return [o for o in api.listed(call, f"{name}/operations", "operations") if not o.get("done")]


def wait(call: EngineCall, api: VertexApi, operation: str, what: str) -> Wire:
    """Waits until an operation is done and returns its response. Raises RefusedError when it has failed."""
    delays, began = pauses(), time.monotonic()
    while True:
        found = api.read(call, operation)
        if found.get("done"):
            break
        call.say(f"{what} ({duration(time.monotonic() - began)})")
        call.pause(next(delays))
    if error := found.get("error"):
        raise RefusedError(rpc_status(int(error.get("code", 2))), str(error.get("message", "no reason given")))
    response: Wire = found.get("response", {})
    return response


def wait_for_others(call: EngineCall, api: VertexApi, name: str) -> None:
    """Waits for whatever runs on a model or endpoint, be it the work of an earlier run that was killed.

    Its outcome is left aside: the caller reads the resource again.
    """
    for operation in running(call, api, name):
        try:
            wait(call, api, str(operation["name"]), "waiting for an operation that was already running")
        except RefusedError:
            continue


def rpc_status(code: int) -> str:
    """The name of a google.rpc.Code."""
    import grpc

    return next((s.name for s in grpc.StatusCode if s.value[0] == code), "UNKNOWN")


def kind(operation: Wire) -> str:
    """What an operation does, by the type of its metadata, such as DeployModelOperationMetadata."""
    return str(operation.get("metadata", {}).get("@type", "")).rpartition(".")[2]
