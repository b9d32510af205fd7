"""Operations take real steps, faults come as ordered, and a kill loses nothing."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import eventually

from sandbox.testing import RunningSandbox

SPEC = {"imageUri": "image@sha256:" + "0" * 64}
UPLOAD: Any = {"model": {"displayName": "m", "containerSpec": SPEC}}


_projects = itertools.count(1)


@pytest.fixture(scope="module")
def process() -> Iterator[RunningSandbox]:
    """One sandbox for all tests that do not kill it."""
    with RunningSandbox() as running:
        yield running
        assert running.violations() == []


@pytest.fixture
def sandbox(process: RunningSandbox) -> Iterator[RunningSandbox]:
    """That sandbox, in a project of the test's own. Whatever faults the test ordered it has met."""
    yield process.project(f"project-{next(_projects)}")
    assert process.unused_faults() == []


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RunningSandbox]:
    """A sandbox of the test's own, to be killed."""
    with RunningSandbox(state=tmp_path / "state") as running:
        yield running
        assert running.violations() == []


def deployment(sandbox: RunningSandbox, number: int, split: Any = None) -> dict[str, Any]:
    resources = {"minReplicaCount": 1, "machineSpec": {"machineType": "n1-standard-2"}}
    deployed = {"id": str(number), "model": f"{sandbox.location}/models/counter", "dedicatedResources": resources}
    return {"deployedModel": deployed, "trafficSplit": split or {}}


def ready(sandbox: RunningSandbox) -> None:
    """A model `counter` and an endpoint `1`."""
    sandbox.do("POST", "models:upload", {"modelId": "counter", **UPLOAD})
    sandbox.do("POST", "endpoints", {"displayName": "e"}, endpointId=1)


def test_operations_are_found_where_clients_look(sandbox: RunningSandbox) -> None:
    ready(sandbox)
    operation = sandbox.do("POST", "endpoints/1:deployModel", deployment(sandbox, 7))
    # /ui/ comes first in the http options of Google's REST clients.
    for version in ("v1", "ui", "v1beta1"):
        read = httpx.get(f"{sandbox.url}/{version}/{operation['name']}").json()
        assert (read["name"], read["done"]) == (operation["name"], True)
    everything = {o["name"] for o in sandbox.do("GET", "operations")["operations"]}
    of_endpoint = {o["name"] for o in sandbox.do("GET", "endpoints/1/operations")["operations"]}
    assert operation["name"] in of_endpoint < everything
    assert len(everything) == 3
    assert sandbox.ask("GET", "operations/123")[0] == 404


def test_waiting_ends_with_the_operation_or_the_time(sandbox: RunningSandbox) -> None:
    sandbox.fault("models.upload", "hold")
    _, operation = sandbox.ask("POST", "models:upload", {"modelId": "slow", **UPLOAD})
    name = f"v1/{operation['name']}:wait"
    assert "done" not in sandbox.ask("POST", name, timeout="0.2s")[1]
    assert sandbox.ask("GET", "models/slow")[0] == 404  # an unfinished upload is not in the registry
    sandbox.release()
    assert sandbox.ask("POST", name, timeout="300s")[1]["done"]
    assert sandbox.ask("GET", "models/slow")[0] == 200


def test_a_slow_operation_takes_its_time(sandbox: RunningSandbox) -> None:
    sandbox.fault("models.upload", "slow", seconds=0.5)
    began = time.monotonic()
    sandbox.do("POST", "models:upload", {"modelId": "slow", **UPLOAD})
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_status_is_answered_without_effect(sandbox: RunningSandbox, code: int) -> None:
    sandbox.fault("models.upload", "status", code=code, count=2, skip=1)
    answers = [sandbox.ask("POST", "models:upload", {"modelId": f"m{n}", **UPLOAD})[0] for n in range(4)]
    assert answers == [200, code, code, 200]
    assert [sandbox.ask("GET", f"models/m{n}")[0] for n in range(4)] == [200, 404, 404, 200]


@pytest.mark.parametrize(("when", "found"), [("before", 404), ("after", 200)])
def test_connections_drop_before_or_after_the_effect(sandbox: RunningSandbox, when: str, found: int) -> None:
    sandbox.fault("models.upload", "drop", when=when)
    with pytest.raises(httpx.RemoteProtocolError):
        sandbox.ask("POST", "models:upload", {"modelId": "m", **UPLOAD})
    for operation in sandbox.do("GET", "operations").get("operations", []):
        sandbox.done(operation)
    assert sandbox.ask("GET", "models/m")[0] == found


@pytest.mark.parametrize(("when", "deployed"), [("before", []), ("after", ["7"])])
def test_operations_fail_as_ordered(sandbox: RunningSandbox, when: str, deployed: list[str]) -> None:
    ready(sandbox)
    details = {"status": "RESOURCE_EXHAUSTED", "message": "no quota", "when": when}
    sandbox.fault("endpoints.deployModel", "operation_error", **details)
    operation = sandbox.do("POST", "endpoints/1:deployModel", deployment(sandbox, 7))
    assert operation["error"] == {"code": 8, "message": "no quota"}
    # A failed deployment can leave the model on the endpoint; `after` shows that.
    assert [d["id"] for d in sandbox.do("GET", "endpoints/1").get("deployedModels", [])] == deployed


def test_latency_delays_the_answer(sandbox: RunningSandbox) -> None:
    sandbox.fault("*", "latency", seconds=0.4)
    began = time.monotonic()
    sandbox.do("GET", "models")
    assert time.monotonic() - began >= 0.4


def test_a_fault_can_be_meant_for_one_resource(sandbox: RunningSandbox) -> None:
    sandbox.fault("models.upload", "status", code=503, match='"two"')
    answers = [sandbox.ask("POST", "models:upload", {"modelId": m, **UPLOAD})[0] for m in ("one", "two", "three")]
    assert answers == [200, 503, 200]


def test_a_fault_that_nobody_met_is_told(process: RunningSandbox) -> None:
    process.fault("models.upload", "status", match="nobody's")
    assert [f["match"] for f in process.unused_faults()] == ["nobody's"]
    process.clear_faults()
    assert process.unused_faults() == []


def test_a_wrong_order_says_what_is_right(sandbox: RunningSandbox) -> None:
    response = httpx.post(f"{sandbox.url}/_sandbox/faults", json={"kind": "status", "seconds": 1})
    assert response.status_code == 400
    assert "code, count, kind, match, method, skip" in response.json()["error"]["message"]


def test_the_journal_tells_writes_from_reads(sandbox: RunningSandbox) -> None:
    sandbox.do("GET", "models")
    sandbox.do("POST", "models:upload", {"modelId": "m", **UPLOAD})
    sandbox.ask("GET", "models/nobody")
    prefix = "aiplatform.projects.locations.models."
    seen = [(r["http"], r["method"].removeprefix(prefix), r["status"]) for r in sandbox.requests()]
    assert seen[:2] == [("GET", "list", 200), ("POST", "upload", 200)]
    assert seen[-1] == ("GET", "get", 404)


def test_admin_routes_are_off_by_default(tmp_path: Path) -> None:
    sandbox = RunningSandbox(state=tmp_path)
    sandbox.options = ["--runner", "stub"]
    with sandbox:
        assert httpx.get(f"{sandbox.url}/_sandbox/requests").status_code == 403


def test_a_killed_sandbox_ends_its_operations_at_the_next_start(own: RunningSandbox) -> None:
    ready(own)
    own.fault("models.upload", "slow", seconds=0.5)
    own.fault("endpoints.deployModel", "slow", seconds=0.5)
    _, upload = own.ask("POST", "models:upload", {"modelId": "m", **UPLOAD})
    _, deploy = own.ask("POST", "endpoints/1:deployModel", deployment(own, 7, {"0": 100}))
    own.kill()
    own.start()
    assert own.done(upload)["response"]["modelVersionId"] == "1"
    assert "response" in own.done(deploy)
    assert own.do("GET", "endpoints/1")["trafficSplit"] == {"7": 100}
    assert own.do("POST", "endpoints/1:predict", {"instances": [1]})["deployedModelId"] == "7"


class Killed(Exception):  # noqa: N818
    """The sandbox was killed while it was asked."""


class Writer:
    """Uploads, deploys and undeploys without end, and records acknowledged operations and errors."""

    def __init__(self, sandbox: RunningSandbox, round_: int) -> None:
        self.sandbox, self.round = sandbox, round_
        self.steps = 0
        self.acknowledged: list[str] = []
        self.unexpected: list[BaseException] = []
        self.killed = False

    def ask(self, path: str, body: Any) -> Any:
        """The operation when it is done. An endpoint that the kill of the last round left busy is waited for."""
        try:
            while True:
                status, answer = self.sandbox.ask("POST", path, body)
                if status == 400 and "other operations running" in answer["error"]["message"]:
                    continue
                assert status == 200, answer
                done = self.sandbox.done(answer)
                assert "error" not in done, done
                self.steps += 1
                return done
        except httpx.HTTPError:
            if not self.killed:
                raise
            raise Killed from None

    def write(self) -> None:
        try:
            for number in itertools.count():
                model = f"m{self.round}-{number}"
                self.ask("models:upload", {"modelId": model, **UPLOAD})
                self.acknowledged.append(model)
                deployed = f"{self.round + 1}{number:03}"
                self.ask("endpoints/1:deployModel", deployment(self.sandbox, int(deployed), {"0": 100}))
                for other in self.sandbox.do("GET", "endpoints/1")["deployedModels"]:
                    if other["id"] != deployed:
                        self.ask("endpoints/1:undeployModel", {"deployedModelId": other["id"]})
        except (Killed, httpx.HTTPError) as error:
            if not self.killed:
                self.unexpected.append(error)
        except BaseException as error:
            self.unexpected.append(error)


def test_a_kill_at_any_moment_loses_nothing_that_was_answered(own: RunningSandbox) -> None:
    """SIGKILL amid uploads, deployments and undeployments, after growing numbers of them; then the rules hold."""
    ready(own)
    acknowledged: list[str] = []
    for round_ in range(8):
        writer = Writer(own, round_)
        thread = threading.Thread(target=writer.write)
        thread.start()
        assert eventually(lambda writer=writer, steps=round_ + 2: writer.steps >= steps or bool(writer.unexpected))  # type: ignore[misc]
        writer.killed = True
        own.kill()
        thread.join()
        assert writer.unexpected == []
        acknowledged += writer.acknowledged
        own.start()
        for operation in own.do("GET", "operations", filter="done=false").get("operations", []):
            assert "error" not in own.done(operation)
        for model in acknowledged:
            assert own.ask("GET", f"models/{model}")[0] == 200
        endpoint = own.do("GET", "endpoints/1")
        ids = {d["id"] for d in endpoint.get("deployedModels", [])}
        split = endpoint.get("trafficSplit", {})
        assert set(split) <= ids
        assert sum(split.values()) in (0, 100)


def test_fresh_forgets(tmp_path: Path) -> None:
    with RunningSandbox(state=tmp_path) as sandbox:
        ready(sandbox)
    with RunningSandbox(state=tmp_path) as sandbox:
        assert sandbox.do("GET", "models")["models"]
    with RunningSandbox("--fresh", state=tmp_path) as sandbox:
        assert sandbox.do("GET", "models") == {}


def test_a_port_or_a_state_in_use_is_said(process: RunningSandbox, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(RunningSandbox(state=process.state)) as second:
        with pytest.raises(RuntimeError):
            second.start()
        assert "Another sandbox uses the state folder" in capfd.readouterr().err
        second.port = process.port
        with pytest.raises(RuntimeError):
            second.start()
        assert "stop what listens there, or choose another with --port" in capfd.readouterr().err
