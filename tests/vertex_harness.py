"""Speaks to the provider's process over gRPC as the Pulumi engine does, against the sandbox."""

from __future__ import annotations

import contextlib
import http.client
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
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
    """The provider as a process of its own, started as the engine starts it. One for each `up`, as there."""

    def __init__(self, url: str, *, configure: bool = True, settings: Wire | None = None) -> None:
        self.engine = _Engine()
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
        engine_pb2_grpc.add_EngineServicer_to_server(self.engine, self._server)
        address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        self.process = subprocess.Popen(
            [sys.executable, str(PLUGIN), address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = provider_pb2_grpc.ResourceProviderStub(self.channel)
        self.call("Handshake", provider_pb2.ProviderHandshakeRequest(engine_address=address))
        if configure:
            arguments = {"project": PROJECT, "location": LOCATION, "endpoint": url, **(settings or {})}
            self.call("Configure", provider_pb2.ConfigureRequest(args=struct(arguments), acceptSecrets=True))

    def call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self.stub, method)(request, timeout=120)
        except grpc.RpcError as error:
            raise CallFailed(error) from None

    def lines(self, *, ephemeral: bool = False) -> list[str]:
        return [line.message for line in self.engine.lines if line.ephemeral == ephemeral]

    def stop_engine(self) -> None:
        self._server.stop(None)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        _, errors = self.process.communicate(timeout=10)
        self._server.stop(None)
        assert "Traceback" not in errors, errors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Stack:
    """One resource of a stack and what the engine remembers of it between runs."""

    urn: str
    id: str = ""
    inputs: Wire = field(default_factory=dict)
    outputs: Wire = field(default_factory=dict)
    init_errors: bool = False
    ran: list[str] = field(default_factory=list)

    def check(self, plugin: Plugin, news: Wire) -> Wire:
        answer = plugin.call(
            "Check", provider_pb2.CheckRequest(urn=self.urn, olds=struct(self.inputs), news=struct(news))
        )
        assert not answer.failures, [(f.property, f.reason) for f in answer.failures]
        return unstruct(answer.inputs)

    def failures(self, plugin: Plugin, news: Wire) -> dict[str, str]:
        answer = plugin.call("Check", provider_pb2.CheckRequest(urn=self.urn, news=struct(news)))
        return {f.property: f.reason for f in answer.failures}

    def diff(self, plugin: Plugin, news: Wire) -> Any:
        return plugin.call(
            "Diff",
            provider_pb2.DiffRequest(
                id=self.id,
                urn=self.urn,
                olds=struct(self.outputs),
                old_inputs=struct(self.inputs),
                news=struct(news),
            ),
        )

    def up(self, plugin: Plugin, news: Wire, *, preview: bool = False, timeout: float = 0) -> str:
        """What `pulumi up` does with one resource; returns create, update, replace or same."""
        news = self.check(plugin, news)
        what = "create"
        if self.id:
            found = self.diff(plugin, news)
            what = "replace" if found.replaces else "update" if found.diffs or self.init_errors else "same"
        old_id, old_inputs, old_outputs = self.id, self.inputs, self.outputs
        if what in ("create", "replace"):
            self.create(plugin, news, preview=preview, timeout=timeout)
        elif what == "update":
            self.update(plugin, news, preview=preview, timeout=timeout)
        if what == "replace" and not preview:
            self.delete(plugin, id_=old_id, outputs=old_outputs, inputs=old_inputs)
        self.ran.append(what)
        return what

    def create(self, plugin: Plugin, news: Wire, *, preview: bool = False, timeout: float = 0) -> Wire:
        request = provider_pb2.CreateRequest(urn=self.urn, properties=struct(news), preview=preview, timeout=timeout)
        try:
            answer = plugin.call("Create", request)
        except CallFailed as error:
            if error.half:
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
        """Reads the resource; True if inputs or outputs have changed."""
        answer = plugin.call(
            "Read",
            provider_pb2.ReadRequest(
                id=self.id, urn=self.urn, properties=struct(self.outputs), inputs=struct(self.inputs)
            ),
        )
        if not answer.id:
            changed, self.id, self.inputs, self.outputs = bool(self.id), "", {}, {}
            return changed
        inputs, outputs = unstruct(answer.inputs), unstruct(answer.properties)
        changed = (inputs, outputs) != (self.inputs, self.outputs)
        self.id = answer.id
        self._keep(inputs, outputs)
        return changed

    def delete(self, plugin: Plugin, *, id_: str = "", outputs: Wire | None = None, inputs: Wire | None = None) -> None:
        mine = not id_
        plugin.call(
            "Delete",
            provider_pb2.DeleteRequest(
                id=id_ or self.id,
                urn=self.urn,
                properties=struct(self.outputs if outputs is None else outputs),
                old_inputs=struct(self.inputs if inputs is None else inputs),
            ),
        )
        if mine:
            self.id, self.inputs, self.outputs = "", {}, {}


class Cloud:
    """The sandbox seen through Google's own clients: what is really there."""

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

    def endpoint(self, name: str) -> str:
        request = aiplatform_v1.CreateEndpointRequest(
            parent=PARENT, endpoint=aiplatform_v1.Endpoint(display_name=name), endpoint_id=name
        )
        self.endpoints.create_endpoint(request=request)
        full = f"{PARENT}/endpoints/{name}"
        self._until(lambda: self.look(full))
        return full

    def _until(self, ready: Any) -> None:
        for _ in range(200):
            with contextlib.suppress(Exception):
                ready()
                return
            time.sleep(0.02)
        ready()

    def look(self, endpoint: str) -> Any:
        return self.endpoints.get_endpoint(name=endpoint)

    def deployed(self, endpoint: str) -> dict[str, tuple[str, int]]:
        """Model version and traffic of each deployed model, by id."""
        there = self.look(endpoint)
        return {
            d.id: (
                f"{d.model.rsplit('/', 1)[-1]}@{d.model_version_id}",
                there.traffic_split.get(d.id, 0),
            )
            for d in there.deployed_models
        }

    def traffic(self, endpoint: str) -> dict[str, int]:
        """Percent by model version."""
        return {model: share for model, share in self.deployed(endpoint).values() if share}

    def versions(self, model: str) -> list[Any]:
        try:
            return list(self.models.list_model_versions(name=f"{PARENT}/models/{model}"))
        except NotFound:
            return []

    def requests(self, method: str) -> int:
        """How many calls of one method went well, such as endpoints.deployModel."""
        full = f"aiplatform.projects.locations.{method}"
        return sum(r["method"] == full and r["status"] < 400 for r in self.sandbox.requests())

    def refused(self, method: str, name: str) -> int:
        """How many calls of one method on one resource, or below it, were refused."""
        full = f"aiplatform.projects.locations.{method}"
        return sum(r["method"] == full and r["status"] >= 400 and name in r["name"] for r in self.sandbox.requests())

    def writes(self) -> int:
        return sum(r["http"] != "GET" for r in self.sandbox.requests())

    def check_history(self, endpoint: str) -> None:
        """Traffic has always summed to 100 (or 0), and never pointed at what was not serving."""
        for entry in self.sandbox.history():
            if not entry["endpoint"].endswith(endpoint.rsplit("/", 1)[-1]):
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


@pytest.fixture(scope="module")
def cloud(sandbox: RunningSandbox) -> Cloud:
    return Cloud(sandbox)


@pytest.fixture(scope="module")
def plugin(sandbox: RunningSandbox) -> Iterator[Plugin]:
    with Plugin(sandbox.url) as running:
        yield running
