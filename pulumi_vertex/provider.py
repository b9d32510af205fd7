"""The provider: Pulumi's ResourceProvider service, as the engine speaks it over gRPC.

https://github.com/pulumi/pulumi/blob/master/proto/pulumi/provider.proto

Written on the service itself, because the SDK's provider class puts a traceback into every error and cannot report a
resource that is half made. Calls run in threads, so that Cancel arrives while others wait. This module knows the
protocol and the registry of resources; what a resource does is in its own module.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent import futures
from typing import Any, Final

import grpc
from google.protobuf import empty_pb2

# Not pulumi.runtime.proto.status_pb2: both define google.rpc.Status, and a process can load only one of them.
from google.rpc import status_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import (
    engine_pb2,
    engine_pb2_grpc,
    plugin_pb2,
    provider_pb2,
    provider_pb2_grpc,
)

from .access import PROVIDER_INPUTS, Access, is_loopback
from .checks import Failures, check_properties
from .definition import VERSION
from .engine_call import EngineCall
from .errors import HalfMadeError, ProblemError
from .jobs import CustomJobType, TuningJobType
from .model_version import ModelVersionType
from .package_schema import package_schema
from .pipelines import PipelineJobType, ScheduleType
from .released_image import ReleasedImageType
from .resource import ResourceType, State
from .rollout import RolloutType
from .vertex_api import VertexApi
from .wire import UNKNOWN, Wire, from_struct, to_struct, unwrapped, wrapped_like

RESOURCES: Final[Mapping[str, ResourceType]] = {
    resource.definition.token: resource
    for resource in (
        ModelVersionType(),
        RolloutType(),
        ReleasedImageType(),
        CustomJobType(),
        TuningJobType(),
        PipelineJobType(),
        ScheduleType(),
    )
}
MESSAGE_BYTES: Final = 400 * 1024 * 1024  # as the SDKs allow; gRPC's own default of 4 MB is soon reached
ENGINE_SECONDS: Final = 1.0  # between two looks whether the engine is still there


class Service(provider_pb2_grpc.ResourceProviderServicer):
    def __init__(self, engine_address: str = "") -> None:
        self._engine: engine_pb2_grpc.EngineStub | None = None
        self._configured: VertexApi | None = None
        self._stop = threading.Event()
        self._warned: set[tuple[str, str]] = set()  # URN and line
        if engine_address:
            self._attach(engine_address)

    # -- engine

    def _attach(self, address: str) -> None:
        channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", MESSAGE_BYTES)])
        self._engine = engine_pb2_grpc.EngineStub(channel)
        exit_with_engine(address)

    def _log(self, urn: str, message: str, severity: Any = engine_pb2.INFO, *, ephemeral: bool = False) -> None:
        if self._engine is None:
            return
        line = engine_pb2.LogRequest(severity=severity, message=message, urn=urn, ephemeral=ephemeral)
        with contextlib.suppress(grpc.RpcError):  # a line that is lost must not fail the work
            self._engine.Log(line, timeout=10)

    def Handshake(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if request.engine_address and self._engine is None:
            self._attach(request.engine_address)
        return provider_pb2.ProviderHandshakeResponse(accept_secrets=True)

    def Attach(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._attach(request.address)
        return empty_pb2.Empty()

    def GetPluginInfo(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return plugin_pb2.PluginInfo(version=VERSION)

    def Cancel(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._stop.set()
        return empty_pb2.Empty()

    def GetMapping(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return provider_pb2.GetMappingResponse()

    def GetSchema(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        described = package_schema([resource.definition for resource in RESOURCES.values()], PROVIDER_INPUTS)
        return provider_pb2.GetSchemaResponse(schema=json.dumps(described))

    # -- configuration

    def CheckConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        news = from_struct(request.news)
        given = {key: value for key, value in unwrapped(news).items() if key not in ("version", "pluginDownloadURL")}
        failures: Failures = []
        check_properties("", PROVIDER_INPUTS, given, failures)
        url = given.get("endpoint")
        if isinstance(url, str) and url.startswith("http://") and not is_loopback(url):
            failures.append(
                (
                    "endpoint",
                    f"would send your token unencrypted to {url!r}. Use https, or an address on this machine.",
                )
            )
        return check_response(news, failures)

    def DiffConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        old, new = unwrapped(from_struct(request.old_inputs)), unwrapped(from_struct(request.news))
        keys = [p.wire for p in PROVIDER_INPUTS if old.get(p.wire) != new.get(p.wire)]
        found = {
            key: "update_replace" if key in ("project", "location") and new.get(key) != UNKNOWN else "update"
            for key in keys
        }
        return diff_response(found)

    def Configure(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            self._configured = VertexApi(Access.of(unwrapped(from_struct(request.args))))
        return provider_pb2.ConfigureResponse(acceptSecrets=True, supportsPreview=True)

    # -- resources

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            resource = resource_of(request.urn)
            news = resource.resolve(from_struct(request.news))
            return check_response(news, resource.check(unwrapped(news)))

    def Diff(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            resource, state = resource_of(request.urn), state_of(request.id, request.old_inputs, request.olds)
            inputs = unwrapped(from_struct(request.news))
            for line in resource.warnings(state, inputs):
                if (request.urn, line) not in self._warned:  # the engine asks for some diffs twice
                    self._warned.add((request.urn, line))
                    self._log(request.urn, line, engine_pb2.WARNING)
            return diff_response(resource.diff(state, inputs))

    def Create(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        wire = from_struct(request.properties)
        with reported(context, wire):
            inputs, resource = unwrapped(wire), resource_of(request.urn)
            call = self._call(request, resource, "create")
            if request.preview:
                outputs = resource.preview(call, self._api, inputs, None)
                return provider_pb2.CreateResponse(properties=to_struct(wire | outputs))
            made = resource.create(call, self._api, inputs)
            return provider_pb2.CreateResponse(id=made.id, properties=to_struct(wire | made.outputs))

    def Update(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        wire = from_struct(request.news)
        with reported(context, wire):
            inputs, resource = unwrapped(wire), resource_of(request.urn)
            state = state_of(request.id, request.old_inputs, request.olds)
            call = self._call(request, resource, "update")
            if request.preview:
                outputs = resource.preview(call, self._api, inputs, state)
            else:
                outputs = resource.update(call, self._api, state, inputs)
            return provider_pb2.UpdateResponse(properties=to_struct(wire | outputs))

    def Read(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            resource, state = resource_of(request.urn), state_of(request.id, request.inputs, request.properties)
            found = resource.read(self._call(request, resource, "read"), self._api, state)
            if found is None:
                return provider_pb2.ReadResponse()
            inputs = wrapped_like(found.inputs, from_struct(request.inputs))
            return provider_pb2.ReadResponse(
                id=found.id, properties=to_struct(inputs | found.outputs), inputs=to_struct(inputs)
            )

    def Delete(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            resource, state = resource_of(request.urn), state_of(request.id, request.old_inputs, request.properties)
            resource.delete(self._call(request, resource, "delete"), self._api, state)
            return empty_pb2.Empty()

    # -- helpers

    @property
    def _api(self) -> VertexApi:
        if self._configured is None:
            raise ProblemError("The vertex provider was asked for work before it was configured.")
        return self._configured

    def _call(self, request: Any, resource: ResourceType, what: str) -> EngineCall:
        urn = request.urn
        return EngineCall(
            urn,
            request.timeout or resource.seconds[what],
            self._stop,
            say=lambda message: self._log(urn, message, ephemeral=True),
            log=lambda message: self._log(urn, message),
            warn=lambda message: self._log(urn, message, engine_pb2.WARNING),
            custom=bool(request.timeout),
        )


def resource_of(urn: str) -> ResourceType:
    """The resource type that a URN names."""
    token = urn.split("::")[2].split("$")[-1]
    if token not in RESOURCES:
        raise ProblemError(f"The vertex provider has no resource {token}; it has {', '.join(RESOURCES)}.")
    return RESOURCES[token]


def state_of(id_: str, inputs: Any, outputs: Any) -> State:
    return State(id_, unwrapped(from_struct(inputs)), unwrapped(from_struct(outputs)))


def check_response(news: Wire, failures: Failures) -> Any:
    return provider_pb2.CheckResponse(
        inputs=to_struct(news),
        failures=[provider_pb2.CheckFailure(property=path, reason=why) for path, why in failures],
    )


def diff_response(found: Mapping[str, str]) -> Any:
    kinds = provider_pb2.PropertyDiff
    detailed = {path: kinds(kind=kinds.Kind.Value(what.upper()), inputDiff=True) for path, what in found.items()}
    tops = {path: path.split(".")[0].split("[")[0] for path in found}
    return provider_pb2.DiffResponse(
        changes=provider_pb2.DiffResponse.DIFF_SOME if found else provider_pb2.DiffResponse.DIFF_NONE,
        diffs=list(dict.fromkeys(tops.values())),
        replaces=list(dict.fromkeys(tops[path] for path, what in found.items() if what.endswith("replace"))),
        detailedDiff=detailed,
        hasDetailedDiff=True,
    )


class reported:  # noqa: N801
    """Turns what goes wrong in a call into the gRPC error that the engine shows: a sentence, never a traceback."""

    def __init__(self, context: grpc.ServicerContext, inputs: Wire | None = None) -> None:
        self._context, self._inputs = context, inputs or {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, HalfMadeError):
            half = provider_pb2.ErrorResourceInitFailed(
                id=error.id,
                properties=to_struct(self._inputs | error.outputs),
                inputs=to_struct(self._inputs),
                reasons=[str(error)],
            )
            status = status_pb2.Status(code=grpc.StatusCode.UNKNOWN.value[0], message=str(error))
            status.details.add().Pack(half)
            self._context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            self._context.abort(grpc.StatusCode.UNKNOWN, str(error))
        if isinstance(error, ProblemError):
            # A code of which the engine knows that nothing was made or changed.
            self._context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        if isinstance(error, Exception):
            if os.environ.get("PULUMI_VERTEX_DEBUG"):
                traceback.print_exception(error)
            self._context.abort(
                grpc.StatusCode.UNKNOWN,
                f"The vertex provider failed in a way it does not know ({type(error).__name__}: {error}). This is a "
                "mistake in the provider; with PULUMI_VERTEX_DEBUG=1 and `pulumi up -d` it says where.",
            )


def exit_with_engine(address: str) -> None:
    """Ends this process soon after the engine is gone: a provider that worked on alone would meet its successor."""
    host, _, port = address.rpartition(":")

    def watch() -> None:
        missed = 0
        while missed < 3:
            time.sleep(ENGINE_SECONDS)
            try:
                socket.create_connection((host, int(port)), timeout=ENGINE_SECONDS).close()
                missed = 0
            except OSError:
                missed += 1
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Serves until the engine ends this process; the first line printed is the port."""
    addresses = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    server = grpc.server(
        # A thread for each call that waits; Cancel needs one, too.
        futures.ThreadPoolExecutor(max_workers=256),
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
        ],
    )
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(Service(addresses[0] if addresses else ""), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()
