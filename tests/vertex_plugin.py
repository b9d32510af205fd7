"""Speaks to the provider's process over gRPC as the Pulumi engine does."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf import empty_pb2, json_format, struct_pb2
from google.rpc import status_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import engine_pb2_grpc, provider_pb2, provider_pb2_grpc

Wire = dict[str, Any]

PLUGIN = Path(__file__).parent.parent / "pulumi_vertex" / "plugin"
PROJECT, LOCATION = "some-project", "europe-west4"
PARENT = f"projects/{PROJECT}/locations/{LOCATION}"
IMAGE = "europe-west4-docker.pkg.dev/some-project/images/serving@sha256:" + "a" * 64
OTHER_IMAGE = IMAGE[:-64] + "b" * 64
VERSION_URN = "urn:pulumi:test::people::vertex:index:ModelVersion::"
ROLLOUT_URN = "urn:pulumi:test::people::vertex:index:Rollout::people"


def struct(value: Wire) -> struct_pb2.Struct:
    message = struct_pb2.Struct()
    message.update(value)
    return message


def unstruct(message: struct_pb2.Struct) -> Wire:
    value: Wire = json_format.MessageToDict(message)
    return value


class CallFailed(Exception):  # noqa: N818
    """An error with the text that the engine would print; `half` is the state of a half-made resource."""

    def __init__(self, error: grpc.RpcError) -> None:
        super().__init__(error.details())
        self.code: grpc.StatusCode = error.code()
        self.half: Any = None
        metadata: Any = error.trailing_metadata()
        for key, value in metadata or ():
            if key == "grpc-status-details-bin":
                detail = provider_pb2.ErrorResourceInitFailed()
                assert status_pb2.Status.FromString(value).details[0].Unpack(detail)
                self.half = detail


class _Engine(engine_pb2_grpc.EngineServicer):
    def __init__(self) -> None:
        self.lines: list[Any] = []

    def Log(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.lines.append(request)
        return empty_pb2.Empty()


class Plugin:
    """The provider as a process of its own, started as the engine starts it. One for each `up`, as there.

    The process starts at once; the first call waits until it answers and configures it. first_pause: the seconds that
    it waits before it looks at an operation again, where many runs would only wait for each other's 0.2 s.
    """

    def __init__(
        self, url: str, *, configure: bool = True, settings: Wire | None = None, first_pause: float | None = None
    ) -> None:
        self.engine = _Engine()
        self._settings = {"project": PROJECT, "location": LOCATION, "endpoint": url, **(settings or {})}
        self._configure = configure
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
        engine_pb2_grpc.add_EngineServicer_to_server(self.engine, self._server)
        self._address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        program = [str(PLUGIN)]
        if first_pause:
            impatient = f"retries.FIRST_PAUSE = {first_pause}"
            program = ["-c", f"from pulumi_vertex import provider, retries; {impatient}; provider.main()"]
        self.process = subprocess.Popen(
            [sys.executable, *program, self._address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._channel: grpc.Channel | None = None
        self._lock = threading.Lock()

    def _connect(self) -> Any:
        with self._lock:
            if self._channel is None:
                assert self.process.stdout is not None
                port = int(self.process.stdout.readline())
                self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
                stub = provider_pb2_grpc.ResourceProviderStub(self._channel)
                stub.Handshake(provider_pb2.ProviderHandshakeRequest(engine_address=self._address))
                if self._configure:
                    stub.Configure(provider_pb2.ConfigureRequest(args=struct(self._settings), acceptSecrets=True))
            return provider_pb2_grpc.ResourceProviderStub(self._channel)

    def call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._connect(), method)(request, timeout=120)
        except grpc.RpcError as error:
            raise CallFailed(error) from None

    def cancel(self) -> None:
        """Ctrl-C."""
        self.call("Cancel", empty_pb2.Empty())

    def lines(self, *, ephemeral: bool = False) -> list[str]:
        return [line.message for line in self.engine.lines if line.ephemeral == ephemeral]

    def stop_engine(self) -> None:
        self._server.stop(None)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def close(self) -> None:
        if self._channel:
            self._channel.close()
        self.process.terminate()  # not killed, because a process that measures coverage writes its figures now
        _, errors = self.process.communicate(timeout=60)
        self._server.stop(None)
        assert "Traceback" not in errors, errors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Plugins:
    """Processes of the provider for tests that kill them. The next one starts while the current one is used."""

    def __init__(self, url: str, first_pause: float | None = None) -> None:
        self.url, self.first_pause = url, first_pause
        self._started = [Plugin(url, first_pause=first_pause)]

    def take(self) -> Plugin:
        self._started.append(Plugin(self.url, first_pause=self.first_pause))
        return self._started[-2]

    def close(self) -> None:
        for plugin in self._started:
            plugin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Replaced:
    """A state that a replacement has left for deletion."""

    id: str
    inputs: Wire
    outputs: Wire


@dataclass
class Stack:
    """One resource of a stack, and its state as the engine keeps it between runs.

    The order of calls is that of the engine (pkg/resource/deploy/step.go and step_generator.go of pulumi/pulumi):
    a refresh reads and diffs each state, also one that waits for its deletion; a forced replacement is checked without
    old inputs and not diffed; what was replaced is deleted at the end of the run, or of a later one.
    """

    urn: str
    id: str = ""
    inputs: Wire = field(default_factory=dict)
    outputs: Wire = field(default_factory=dict)
    init_errors: bool = False
    replaced: list[Replaced] = field(default_factory=list)

    def check(self, plugin: Plugin, news: Wire, *, olds: bool = True) -> Wire:
        request = provider_pb2.CheckRequest(urn=self.urn, olds=struct(self.inputs if olds else {}), news=struct(news))
        answer = plugin.call("Check", request)
        assert not answer.failures, [(f.property, f.reason) for f in answer.failures]
        return unstruct(answer.inputs)

    def failures(self, plugin: Plugin, news: Wire) -> dict[str, str]:
        answer = plugin.call("Check", provider_pb2.CheckRequest(urn=self.urn, news=struct(news)))
        return {f.property: f.reason for f in answer.failures}

    def diff(self, plugin: Plugin, news: Wire, state: Replaced | None = None) -> Any:
        state = state or Replaced(self.id, self.inputs, self.outputs)
        return plugin.call(
            "Diff",
            provider_pb2.DiffRequest(
                id=state.id,
                urn=self.urn,
                olds=struct(state.outputs),
                old_inputs=struct(state.inputs),
                news=struct(news),
            ),
        )

    def up(
        self,
        plugin: Plugin,
        news: Wire,
        *,
        preview: bool = False,
        timeout: float = 0,
        force: bool = False,
        deletes: bool = True,
    ) -> str:
        """Does the steps of `pulumi up` for one resource; returns create, update, replace or same.

        `force` is `up --replace`. Without `deletes` the run ends, as if killed, before what was replaced is deleted.
        """
        news = self.check(plugin, news, olds=not force)
        what = "create"
        if self.id:
            what = "replace" if force else self._planned(self.diff(plugin, news))
        old = Replaced(self.id, self.inputs, self.outputs)
        if what in ("create", "replace"):
            self.create(plugin, news, preview=preview, timeout=timeout)
        elif what == "update":
            self.update(plugin, news, preview=preview, timeout=timeout)
        if not preview:
            if what == "replace":
                self.replaced.append(old)
            if deletes:
                self.delete_replaced(plugin)
        return what

    def _planned(self, found: Any) -> str:
        return "replace" if found.replaces else "update" if found.diffs or self.init_errors else "same"

    def create(self, plugin: Plugin, news: Wire, *, preview: bool = False, timeout: float = 0) -> Wire:
        request = provider_pb2.CreateRequest(urn=self.urn, properties=struct(news), preview=preview, timeout=timeout)
        old = Replaced(self.id, self.inputs, self.outputs)
        try:
            answer = plugin.call("Create", request)
        except CallFailed as error:
            if error.half:
                if self.id:
                    self.replaced.append(old)
                self.id = error.half.id
                self._keep(news, unstruct(error.half.properties), half=True)
            raise
        outputs = unstruct(answer.properties)
        if not preview:
            self.id = answer.id
            self._keep(news, outputs)
        return outputs

    def update(self, plugin: Plugin, news: Wire, *, preview: bool = False, timeout: float = 0) -> Wire:
        request = provider_pb2.UpdateRequest(
            id=self.id,
            urn=self.urn,
            olds=struct(self.outputs),
            old_inputs=struct(self.inputs),
            news=struct(news),
            preview=preview,
            timeout=timeout,
        )
        try:
            answer = plugin.call("Update", request)
        except CallFailed as error:
            if error.half:
                self._keep(news, unstruct(error.half.properties), half=True)
            raise
        outputs = unstruct(answer.properties)
        if not preview:
            self._keep(news, outputs)
        return outputs

    def _keep(self, inputs: Wire, outputs: Wire, *, half: bool = False) -> None:
        self.inputs, self.outputs, self.init_errors = inputs, outputs, half

    def refresh(self, plugin: Plugin) -> bool:
        """Reads the resource and the states that wait for deletion; True if inputs or outputs have changed."""
        self.replaced = [found for state in self.replaced if (found := self._refreshed(plugin, state))]
        old = Replaced(self.id, self.inputs, self.outputs)
        new = self._refreshed(plugin, old)
        if new is None:
            self.id, self.inputs, self.outputs = "", {}, {}
            return bool(old.id)
        self.id = new.id
        self._keep(new.inputs, new.outputs)
        return new != old

    def _refreshed(self, plugin: Plugin, state: Replaced) -> Replaced | None:
        request = provider_pb2.ReadRequest(
            id=state.id, urn=self.urn, properties=struct(state.outputs), inputs=struct(state.inputs)
        )
        answer = plugin.call("Read", request)
        if not answer.id:
            return None
        new = Replaced(answer.id, unstruct(answer.inputs), unstruct(answer.properties))
        self.diff(plugin, state.inputs, new)
        return new

    def delete_replaced(self, plugin: Plugin) -> None:
        while self.replaced:
            self._delete(plugin, self.replaced[0])
            self.replaced.pop(0)

    def delete(self, plugin: Plugin) -> None:
        """Does the steps of `pulumi destroy`: deletes the resource and the states that wait for deletion."""
        self.delete_replaced(plugin)
        if self.id:
            self._delete(plugin, Replaced(self.id, self.inputs, self.outputs))
        self.id, self.inputs, self.outputs, self.init_errors = "", {}, {}, False

    def delete_again(self, plugin: Plugin, state: Replaced) -> None:
        """A deletion whose success was not recorded."""
        self._delete(plugin, state)

    @property
    def state(self) -> Replaced:
        return Replaced(self.id, self.inputs, self.outputs)

    def _delete(self, plugin: Plugin, state: Replaced) -> None:
        request = provider_pb2.DeleteRequest(
            id=state.id, urn=self.urn, properties=struct(state.outputs), old_inputs=struct(state.inputs)
        )
        plugin.call("Delete", request)
