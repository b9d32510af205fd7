"""The provider: Pulumi's ResourceProvider service, as the engine speaks it over gRPC.

https://github.com/pulumi/pulumi/blob/master/proto/pulumi/provider.proto

Written on the service itself, because the SDK's provider class puts a traceback into every error and cannot report a
resource that is half made. Calls run in threads, so that Cancel arrives while others wait.
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
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, TypeVar

import grpc
from google.protobuf import empty_pb2, json_format, struct_pb2

# Not pulumi.runtime.proto.status_pb2: both define google.rpc.Status, and a process can load only one of them.
from google.rpc import status_pb2  # type: ignore[import-untyped]
from pulumi.runtime import rpc
from pulumi.runtime.proto import (
    engine_pb2,
    engine_pb2_grpc,
    plugin_pb2,
    provider_pb2,
    provider_pb2_grpc,
)

from . import definition, model_version, rollout
from .api import Api, HalfMadeError, Work, import_lightly
from .definition import UNKNOWN, VERSION, Failures, ProblemError, Wire
from .settings import SETTINGS, Settings, is_loopback

T = TypeVar("T")

RESOURCES: Final[Mapping[str, ModuleType]] = {m.DEFINITION.token: m for m in (model_version, rollout)}
MESSAGE_BYTES: Final = 400 * 1024 * 1024  # as the SDKs allow; gRPC's own default of 4 MB is soon reached
ENGINE_SECONDS: Final = 1.0  # between two looks whether the engine is still there


# --- values on the wire -------------------------------------------------------------------------------------


class Secret(str):
    """A text that an error message does not quote."""

    def __repr__(self) -> str:
        return "[secret]"


def plain(value: Any) -> Any:
    """A value without its secret wrappings; whole numbers as int, which JSON over protobuf gives as float."""
    if isinstance(value, dict):
        if rpc.is_rpc_secret(value):
            inner = plain(value.get("value"))
            return Secret(inner) if isinstance(inner, str) and inner != UNKNOWN else inner
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def has_secret(value: Any) -> bool:
    if isinstance(value, dict):
        return rpc.is_rpc_secret(value) or any(map(has_secret, value.values()))
    return isinstance(value, list) and any(map(has_secret, value))


def sealed(value: Any, like: Any) -> Any:
    """`value` with everything secret again that is secret in `like`; a list with a secret in it wholly."""
    if rpc.is_rpc_secret(like) or (isinstance(like, list) and has_secret(like)):
        return rpc.wrap_rpc_secret(value)
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: sealed(item, like.get(key)) for key, item in value.items()}
    return value


def received(struct: struct_pb2.Struct) -> Wire:
    value: Wire = json_format.MessageToDict(struct)
    return value


def sent(value: Wire) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(value)
    return struct


# --- the service --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a create or an update ends with: the resource's id and outputs."""

    id: str
    outputs: Wire


class Service(provider_pb2_grpc.ResourceProviderServicer):
    def __init__(self, engine_address: str = "") -> None:
        self._engine: engine_pb2_grpc.EngineStub | None = None
        self._api: Api | None = None
        self._stop = threading.Event()
        # The id that stays, by URN, as far as this run of the engine has told. A create finds work of the
        # same content again, so a replacement (`up --replace`, or a change taken back after a failed update)
        # can end with the id it began with. Then the engine asks to delete "the old one" under the id of the
        # one that stays.
        self._live: dict[str, str] = {}
        if engine_address:
            self._attach(engine_address)

    # -- engine

    def _attach(self, address: str) -> None:
        channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", MESSAGE_BYTES)])
        self._engine = engine_pb2_grpc.EngineStub(channel)
        exit_with_engine(address)

    def _log(self, urn: str, message: str, *, ephemeral: bool = False) -> None:
        if self._engine is None:
            return
        line = engine_pb2.LogRequest(severity=engine_pb2.INFO, message=message, urn=urn, ephemeral=ephemeral)
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
        described = definition.schema([m.DEFINITION for m in RESOURCES.values()], SETTINGS)
        return provider_pb2.GetSchemaResponse(schema=json.dumps(described))

    # -- configuration

    def CheckConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        news = received(request.news)
        given = {key: value for key, value in plain(news).items() if key not in ("version", "pluginDownloadURL")}
        failures: Failures = []
        definition.check_properties("", SETTINGS, given, failures)
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
        old, new = plain(received(request.old_inputs)), plain(received(request.news))
        keys = [p.wire for p in SETTINGS if old.get(p.wire) != new.get(p.wire)]
        found = {
            key: "update_replace" if key in ("project", "location") and new.get(key) != UNKNOWN else "update"
            for key in keys
        }
        return diff_response(found)

    def Configure(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            given = plain(received(request.args))
            self._api = Api(Settings.of(given))
        return provider_pb2.ConfigureResponse(acceptSecrets=True, supportsPreview=True)

    # -- resources

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            module, news = resource(request.urn), received(request.news)
            given = plain(news)
            failures = definition.check(module.DEFINITION, given)
            failures += module.check(given)
            return check_response(news, failures)

    def Diff(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            module = resource(request.urn)
            old, new = plain(received(request.old_inputs)), plain(received(request.news))
            found = definition.diff(module.DEFINITION, old, new)
            if any(what.endswith("replace") for what in found.values()):
                self._live.pop(request.urn, None)
            else:
                self._live[request.urn] = request.id
            return diff_response(found)

    def Create(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context, received(request.properties)):
            wire = received(request.properties)
            inputs, urn = plain(wire), request.urn
            module = resource(urn)
            work = self._work(request, module, "create")
            if request.preview:
                answer = self._preview(work, module, inputs, {}, {})
            elif module is model_version:
                answer = self._create_version(work, inputs)
            else:
                name = inputs["endpoint"]
                answer = Answer(name, rollout.roll_out(work, self.api, inputs, {}))
            if not request.preview:
                self._live[urn] = answer.id
            return provider_pb2.CreateResponse(id=answer.id, properties=state(answer, wire))

    def _create_version(self, work: Work, inputs: Wire) -> Answer:
        name = model_version.create(work, self.api, inputs)
        try:
            model_version.settle(work, self.api, name, {}, inputs)
            return Answer(name, self._version_outputs(work, name))
        except ProblemError as error:
            parts = {
                "name": name,
                "versionId": name.rsplit("@", 1)[-1],
                "createTime": "",
                "versionAliases": [],
            }
            raise HalfMadeError(f"Version {name} was uploaded, but: {error}", name, parts) from None

    def _version_outputs(self, work: Work, name: str) -> Wire:
        version = model_version.get(work, self.api, name)
        if version is None:
            raise ProblemError(f"The model version {name} is gone. Run `pulumi refresh`, then `pulumi up`.")
        return model_version.outputs(name, version)

    def Update(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context, received(request.news)):
            wire = received(request.news)
            inputs, old_inputs = plain(wire), plain(received(request.old_inputs))
            olds = plain(received(request.olds))
            module = resource(request.urn)
            work = self._work(request, module, "update")
            if request.preview:
                answer = self._preview(work, module, inputs, old_inputs, olds)
            elif module is model_version:
                model_version.settle(work, self.api, request.id, old_inputs, inputs)
                answer = Answer(request.id, self._version_outputs(work, request.id))
            else:
                answer = Answer(request.id, rollout.roll_out(work, self.api, inputs, olds))
            return provider_pb2.UpdateResponse(properties=state(answer, wire))

    def _preview(self, work: Work, module: ModuleType, inputs: Wire, old_inputs: Wire, olds: Wire) -> Answer:
        names = [p.wire for p in module.DEFINITION.outputs]
        if module is rollout:
            return Answer("", rollout.preview(work, self.api, inputs, olds))
        outputs = {name: olds.get(name, UNKNOWN) for name in names}
        if inputs.get("aliases") != old_inputs.get("aliases"):
            outputs["versionAliases"] = UNKNOWN
        return Answer("", outputs)

    def Read(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            wire_inputs, wire_olds = received(request.inputs), received(request.properties)
            inputs, olds = plain(wire_inputs), plain(wire_olds)
            module = resource(request.urn)
            work = self._work(request, module, "read")
            if module is model_version:
                version = model_version.get(work, self.api, request.id)
                if version is None:
                    return provider_pb2.ReadResponse()
                outputs = model_version.outputs(request.id, version)
                new = model_version.refreshed(inputs, version)
            else:
                endpoint = rollout.get_endpoint(work, self.api, request.id)
                if endpoint is None:
                    return provider_pb2.ReadResponse()
                known = rollout.Known.of(request.urn, olds, adopt=inputs.get("adopt") is True or not inputs)
                new = rollout.refreshed(inputs, olds, endpoint, known) | {"endpoint": request.id}
                outputs = rollout.outputs(endpoint, known, rollout.releases_of(new))
            wrapped = sealed(new, wire_inputs)
            return provider_pb2.ReadResponse(id=request.id, properties=sent(wrapped | outputs), inputs=sent(wrapped))

    def Delete(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with reported(context):
            module = resource(request.urn)
            if self._live.get(request.urn) == request.id:
                return empty_pb2.Empty()
            work = self._work(request, module, "delete")
            if module is model_version:
                model_version.delete(work, self.api, request.id)
            else:
                rollout.delete(work, self.api, request.id, plain(received(request.properties)))
            return empty_pb2.Empty()

    # -- helpers

    @property
    def api(self) -> Api:
        if self._api is None:
            raise ProblemError("The vertex provider was asked for work before it was configured.")
        return self._api

    def _work(self, request: Any, module: ModuleType, what: str) -> Work:
        urn = request.urn
        seconds = request.timeout or module.SECONDS[what]
        return Work(
            urn,
            seconds,
            self._stop,
            say=lambda message: self._log(urn, message, ephemeral=True),
            log=lambda message: self._log(urn, message),
        )


def resource(urn: str) -> ModuleType:
    """The module of a URN's resource type."""
    token = urn.split("::")[2].split("$")[-1]
    if token not in RESOURCES:
        raise ProblemError(f"The vertex provider has no resource {token}; it has {', '.join(RESOURCES)}.")
    return RESOURCES[token]


def state(answer: Answer, wire: Wire) -> struct_pb2.Struct:
    """What Pulumi keeps: the inputs as they came, secrets and all, and the outputs."""
    return sent(wire | answer.outputs)


def check_response(news: Wire, failures: Failures) -> Any:
    return provider_pb2.CheckResponse(
        inputs=sent(news),
        failures=[provider_pb2.CheckFailure(property=path, reason=why) for path, why in failures],
    )


def diff_response(found: Mapping[str, str]) -> Any:
    kinds = provider_pb2.PropertyDiff
    detailed = {path: kinds(kind=kinds.Kind.Value(what.upper()), inputDiff=True) for path, what in found.items()}
    tops = list(dict.fromkeys(path.split(".")[0].split("[")[0] for path in found))
    return provider_pb2.DiffResponse(
        changes=provider_pb2.DiffResponse.DIFF_SOME if found else provider_pb2.DiffResponse.DIFF_NONE,
        diffs=tops,
        replaces=[
            top
            for top in tops
            if any(p.split(".")[0].split("[")[0] == top and w.endswith("replace") for p, w in found.items())
        ],
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
                properties=sent(self._inputs | error.outputs),
                inputs=sent(self._inputs),
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
    import_lightly()
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
