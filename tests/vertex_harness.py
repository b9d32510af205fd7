"""Speaks to the provider's process over gRPC as the Pulumi engine does, against the sandbox."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import google.auth.credentials
import grpc
import pytest
from google.api_core.exceptions import NotFound
from google.cloud import aiplatform_v1
from google.protobuf import empty_pb2, json_format, struct_pb2
from google.rpc import status_pb2  # type: ignore[import-untyped]
from pulumi.runtime.proto import engine_pb2_grpc, provider_pb2, provider_pb2_grpc

from sandbox.testing import RunningSandbox

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
    """What the engine would print; `half` is the resource as it is, where it is half made."""

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

    The process starts at once; the first call waits until it answers and configures it.
    """

    def __init__(self, url: str, *, configure: bool = True, settings: Wire | None = None) -> None:
        self.engine = _Engine()
        self._settings = {"project": PROJECT, "location": LOCATION, "endpoint": url, **(settings or {})}
        self._configure = configure
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
        engine_pb2_grpc.add_EngineServicer_to_server(self.engine, self._server)
        self._address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        self.process = subprocess.Popen(
            [sys.executable, str(PLUGIN), self._address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    """Processes of the provider for tests that end them: the next one starts while the current one is used."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._started = [Plugin(url)]

    def take(self) -> Plugin:
        self._started.append(Plugin(self.url))
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
    """One resource of a stack and what the engine remembers of it between runs.

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
        """What `pulumi up` does with one resource; returns create, update, replace or same.

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
        """Reads the resource, and what waits for its deletion; True if inputs or outputs have changed."""
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
        """What `pulumi destroy` does: the resource, and what still waits for its deletion."""
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


class Cloud:
    """The sandbox seen through Google's own clients: what is really there."""

    _made: ClassVar[dict[str, Cloud]] = {}  # each has connections, which are kept open for the next test

    @classmethod
    def of(cls, sandbox: RunningSandbox) -> Cloud:
        found = cls._made.get(sandbox.url)
        if found is None or found.sandbox is not sandbox:
            found = cls._made[sandbox.url] = cls(sandbox)
        return found

    def __init__(self, sandbox: RunningSandbox) -> None:
        self.sandbox = sandbox
        options: Any = {"api_endpoint": sandbox.url}
        credentials = google.auth.credentials.AnonymousCredentials()  # type: ignore[no-untyped-call]
        self.models: Any = aiplatform_v1.ModelServiceClient(
            credentials=credentials, transport="rest", client_options=options
        )
        self.endpoints: Any = aiplatform_v1.EndpointServiceClient(
            credentials=credentials, transport="rest", client_options=options
        )

    def endpoint(self, name: str, **more: Any) -> str:
        """Makes an endpoint and returns its full name."""
        request = aiplatform_v1.CreateEndpointRequest(
            parent=PARENT, endpoint=aiplatform_v1.Endpoint(display_name=name, **more), endpoint_id=name
        )
        self.endpoints.create_endpoint(request=request).result(timeout=60)
        return f"{PARENT}/endpoints/{name}"

    def look(self, endpoint: str) -> Any:
        return self.endpoints.get_endpoint(name=endpoint)

    def deployed(self, endpoint: str) -> dict[str, tuple[str, int]]:
        """Model version and traffic of each deployed model, by id."""
        there = self.look(endpoint)
        return {
            d.id: (
                f"{d.model.rsplit('/', 1)[-1].split('@')[0]}@{d.model_version_id}",
                there.traffic_split.get(d.id, 0),
            )
            for d in there.deployed_models
        }

    def traffic(self, endpoint: str) -> dict[str, int]:
        """Percent by model version."""
        return {model: share for model, share in self.deployed(endpoint).values() if share}

    def running(self, endpoint: str) -> int:
        """How many operations run on an endpoint."""
        _, answer = self.sandbox.ask("GET", f"v1/{endpoint}/operations", filter="done=false")
        return len(answer.get("operations", []))

    def versions(self, model: str) -> list[Any]:
        try:
            return list(self.models.list_model_versions(name=f"{PARENT}/models/{model}"))
        except NotFound:
            return []

    def requests(self, method: str, name: str = "") -> int:
        """How many calls of one method went well, such as endpoints.deployModel; of one resource, or of all."""
        return sum(r["status"] < 400 for r in self._asked(method, name))

    def refused(self, method: str, name: str) -> int:
        """How many calls of one method on one resource, or below it, were refused."""
        return sum(r["status"] >= 400 for r in self._asked(method, name))

    def _asked(self, method: str, name: str) -> list[dict[str, Any]]:
        full = f"aiplatform.projects.locations.{method}"
        return [r for r in self.sandbox.requests() if r["method"] == full and name in r["name"]]

    def writes(self) -> int:
        return sum(r["http"] != "GET" for r in self.sandbox.requests())

    def check_history(self, endpoint: str) -> None:
        """Traffic has always summed to 100 (or 0), and never pointed at what was not serving."""
        for entry in self.sandbox.history():
            if not entry["endpoint"].endswith("/" + endpoint.rsplit("/", 1)[-1]):
                continue
            split = {id_: share for id_, share in entry["trafficSplit"].items() if share}
            assert sum(split.values()) in (0, 100), entry
            for id_ in split:
                assert entry["available"].get(id_, 0) > 0, entry


@contextlib.contextmanager
def in_background(work: Any) -> Iterator[list[BaseException]]:
    """Runs `work` in a thread while the block runs; its exception, if any, is in the list afterwards."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield failed
    thread.join(120)
    assert not thread.is_alive()


def version_inputs(model_id: str = "people", image: str = IMAGE, **more: Any) -> Wire:
    return {"modelId": model_id, "image": image, "healthRoute": "/ping", "predictRoute": "/predict", **more}


def release(model: str, traffic: int | str = 100, **more: Any) -> Wire:
    return {"model": model, "traffic": traffic, "machineType": "n1-standard-2", **more}


def rollout_inputs(endpoint: str, drain: int = 0, **models: Any) -> Wire:
    return {"endpoint": endpoint, "models": models, "drainSeconds": drain}


class Proxy:
    """Stands between provider and sandbox, counts the calls, and acts before or after the one that it is
    armed for."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                number = proxy.number(self.command)
                if proxy.armed == ("before", number):
                    self._act()
                    if not proxy.forward:
                        return None
                connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers.items()))
                    answer = connection.getresponse()
                    content = answer.read()
                except http.client.RemoteDisconnected:  # a fault that was ordered: passed on as it came
                    self.close_connection = True
                    return None
                finally:
                    connection.close()
                if proxy.armed == ("after", number):
                    return self._act()
                with contextlib.suppress(OSError):
                    self.send_response(answer.status)
                    self.send_header("content-type", answer.headers.get("content-type", ""))
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                return None

            def _act(self) -> None:
                proxy.armed = None
                proxy.acted = True
                proxy.act()
                self.close_connection = not proxy.forward

            do_GET = do_POST = do_PATCH = do_DELETE = _forward  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.armed: tuple[str, int] | None = None
        self.acted = False
        self.act: Callable[[], object] = lambda: None
        self.forward = False  # the call goes on its way after the act, instead of getting lost
        self.writes_only = True
        self.count = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def number(self, method: str) -> int:
        with self._lock:
            if self.writes_only and method == "GET":
                return -1
            self.count += 1
            return self.count - 1

    def arm(self, when: str, number: int, act: Callable[[], object], *, forward: bool = False) -> None:
        self.count, self.armed, self.acted, self.act, self.forward = 0, (when, number), False, act, forward

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


_names = itertools.count(1)


class World:
    """One test's part of a sandbox: a model and an endpoint of its own, and what most tests do with them."""

    def __init__(self, sandbox: RunningSandbox, plugin: Plugin) -> None:
        self.sandbox, self.plugin, self.cloud = sandbox, plugin, Cloud.of(sandbox)
        self.model = f"m{next(_names)}"
        self.check_history = True
        self._endpoint = ""

    @property
    def endpoint(self) -> str:
        """The full name of an endpoint, made when it is first asked for."""
        if not self._endpoint:
            self._endpoint = self.cloud.endpoint(f"e-{self.model}")
        return self._endpoint

    def named(self, number: int) -> str:
        """A version of this model, as endpoints name it."""
        return f"{self.model}@{number}"

    def stack(self) -> Stack:
        """A version that is not made yet."""
        return Stack(f"{VERSION_URN}{self.model}")

    def version(self, image: str = IMAGE, *, plugin: Plugin | None = None, **more: Any) -> Stack:
        """A version that is made; each one has an image of its own."""
        version = Stack(f"{VERSION_URN}{self.model}-{image[-4:]}")
        version.up(plugin or self.plugin, version_inputs(self.model, image, **more))
        return version

    def two(self) -> tuple[Stack, Stack]:
        return self.version(), self.version(OTHER_IMAGE)

    def empty_rollout(self) -> Stack:
        return Stack(f"{ROLLOUT_URN}-{self.model}")

    def served(self, version: Stack, **more: Any) -> Stack:
        """A rollout that gives a version all traffic."""
        rollout = self.empty_rollout()
        rollout.up(self.plugin, self.releases(main=release(version.id, **more)))
        return rollout

    def releases(self, drain: int = 0, **models: Any) -> Wire:
        return rollout_inputs(self.endpoint, drain, **models)

    @property
    def deployed(self) -> dict[str, tuple[str, int]]:
        return self.cloud.deployed(self.endpoint)

    @property
    def traffic(self) -> dict[str, int]:
        return self.cloud.traffic(self.endpoint)

    def deploy_by_hand(self, model: str, id_: str, split: dict[str, int] | None = None, **more: Any) -> None:
        deployed = aiplatform_v1.DeployedModel(id=id_, model=model, dedicated_resources=MACHINES, **more)
        request = aiplatform_v1.DeployModelRequest(
            endpoint=self.endpoint, deployed_model=deployed, traffic_split=split or {}
        )
        self.cloud.endpoints.deploy_model(request=request).result(timeout=30)

    def undeploy_by_hand(self, id_: str) -> None:
        self.cloud.endpoints.undeploy_model(endpoint=self.endpoint, deployed_model_id=id_).result(timeout=30)

    def move_by_hand(self, traffic: dict[str, int]) -> None:
        self.cloud.endpoints.update_endpoint(
            endpoint=aiplatform_v1.Endpoint(name=self.endpoint, traffic_split=traffic),
            update_mask={"paths": ["traffic_split"]},
        )


MACHINES: Any = {"machine_spec": {"machine_type": "n1-standard-2"}, "min_replica_count": 1}


@pytest.fixture(scope="module")
def options() -> tuple[str, ...]:
    """The options of the module's sandbox."""
    return ()


@pytest.fixture(scope="module")
def sandbox(options: tuple[str, ...]) -> Iterator[RunningSandbox]:
    with RunningSandbox(*options) as running:
        yield running
        assert running.violations() == []  # everything sent and answered fits Google's discovery documents


@pytest.fixture(scope="module")
def plugin(sandbox: RunningSandbox) -> Iterator[Plugin]:
    with Plugin(sandbox.url) as running:
        yield running


@pytest.fixture
def world(sandbox: RunningSandbox, plugin: Plugin) -> Iterator[World]:
    """Whatever faults the test ordered it has met, and callers noticed nothing."""
    world = World(sandbox, plugin)
    yield world
    unused = sandbox.unused_faults()
    sandbox.clear_faults()
    sandbox.release()
    assert unused == []
    if world._endpoint and world.check_history:
        world.cloud.check_history(world.endpoint)
