"""The sandbox behind the provider: seen through Google's clients, through a proxy, and as the world of one test."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import urlsplit

import google.auth.credentials
import pytest
from google.api_core.exceptions import NotFound
from google.api_core.future.polling import DEFAULT_POLLING
from google.cloud import aiplatform_v1
from vertex_plugin import (
    IMAGE,
    OTHER_IMAGE,
    PARENT,
    ROLLOUT_URN,
    VERSION_URN,
    Plugin,
    Stack,
    Wire,
)

from sandbox.testing import RunningSandbox

OFTEN = DEFAULT_POLLING.with_delay(initial=0.02, maximum=0.5)  # the sandbox's operations take no second


class Cloud:
    """The sandbox seen through Google's own clients, which show its real state."""

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
        self.endpoints.create_endpoint(request=request).result(timeout=60, polling=OFTEN)
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
        """Counts the successful calls of one method, such as endpoints.deployModel, on one resource or on all."""
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
        """Asserts that traffic has always summed to 100 or 0, and never went to a model without replicas."""
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
    """One test's part of a sandbox: a model and an endpoint of its own, and the steps that most tests share."""

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
    """A test's part of the sandbox. At its end every ordered fault must have been met."""
    world = World(sandbox, plugin)
    yield world
    unused = sandbox.unused_faults()
    sandbox.clear_faults()
    sandbox.release()
    assert unused == []
    if world._endpoint and world.check_history:
        world.cloud.check_history(world.endpoint)
