"""Which answers of Vertex AI are tried again, which are waited out, and which are told at once."""

from __future__ import annotations

import itertools
import json
import threading
from typing import Any

import pytest
from pytest_httpserver import HTTPServer

from pulumi_vertex import operations, retries
from pulumi_vertex.access import Access
from pulumi_vertex.engine_call import EngineCall
from pulumi_vertex.errors import PassingError, ProblemError, RefusedError, StoppedError, TimedOutError
from pulumi_vertex.retries import converge
from pulumi_vertex.rollout import runner
from pulumi_vertex.rollout.endpoint import Ours, is_available
from pulumi_vertex.rollout.plan import deployed_id
from pulumi_vertex.rollout.runner import Runner
from pulumi_vertex.vertex_api import VertexApi, explained
from pulumi_vertex.wire import Wire

ENDPOINT = "projects/p/locations/europe-west4/endpoints/1"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retries, "LONGEST_PAUSE", 0.001)


def test_pauses_grow_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "LONGEST_PAUSE", 0.005)
    some = list(itertools.islice(retries.pauses(), 10))
    assert some == sorted(some)
    assert (some[0], some[-1]) == (0.001, 0.005)
    assert len(set(some)) > 3


def call(seconds: float = 30) -> EngineCall:
    return EngineCall("urn", seconds, threading.Event())


def steps(*what: Exception | bool) -> Any:
    left = list(what)

    def step() -> bool:
        now = left.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    step.left = left  # type: ignore[attr-defined]
    return step


def answered(code: int, status: str, message: str, details: list[Wire] | None = None) -> ProblemError:
    error: Wire = {"code": code, "status": status, "message": message, "details": details or []}
    return explained(code, json.dumps({"error": error}).encode(), Access("my-project", "europe-west4"))


def test_rate_limits_pass_and_used_up_quotas_do_not() -> None:
    assert isinstance(answered(429, "RESOURCE_EXHAUSTED", "slow down"), PassingError)
    assert isinstance(answered(503, "UNAVAILABLE", "later"), PassingError)
    used_up = answered(429, "RESOURCE_EXHAUSTED", "The following quotas are exceeded: CustomModelServingCPUs")
    assert isinstance(used_up, RefusedError)
    assert "CustomModelServingCPUs" in str(used_up)
    assert isinstance(answered(500, "INTERNAL", "oops"), RefusedError)
    no_json = explained(502, b"<html>Bad Gateway</html>", Access("p", "l"))
    assert isinstance(no_json, PassingError)
    assert "Bad Gateway" in str(no_json)


# As recorded; the API's name in it has changed in 2026.
DISABLED = (
    "Agent Platform API has not been used in project {} before or it is disabled. Enable it by visiting "
    "https://console.developers.google.com/apis/api/aiplatform.googleapis.com/overview?project={} then retry. If you "
    "enabled this API recently, wait a few minutes for the action to propagate to our systems and retry."
)


def disabled(consumer: str) -> ProblemError:
    metadata = {"service": "aiplatform.googleapis.com", "consumer": f"projects/{consumer}"}
    info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "SERVICE_DISABLED", "metadata": metadata}
    return answered(403, "PERMISSION_DENIED", DISABLED.format(consumer, consumer), [info])


def test_an_api_that_is_disabled_in_another_project_is_told_at_once_with_the_repair() -> None:
    ours, gcloud_s = disabled("123456789"), disabled("764086051850")
    step = steps(*[ours] * 5, True)
    converge(call(), step)  # enabled a moment ago: it passes
    assert step.left == []
    step = steps(gcloud_s, True)
    with pytest.raises(ProblemError, match="gcloud auth application-default set-quota-project my-project"):
        converge(call(), step)
    assert step.left == [True]
    assert "764086051850" in str(gcloud_s)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("PERMISSION_DENIED", DISABLED),
        ("FAILED_PRECONDITION", "Service agents are being provisioned (https://…). Please try again"),
        ("FAILED_PRECONDITION", 'There are other operations running on the Endpoint "e". Operation IDs are: [1].'),
        ("FAILED_PRECONDITION", 'DeployedModel with ID "1" remains involved in the rolling update.'),
        ("ABORTED", "anything"),
    ],
)
def test_the_refusals_of_the_list_are_waited_out(status: str, words: str) -> None:
    step = steps(*[RefusedError(status, words)] * 30, True)
    converge(call(), step)
    assert step.left == []


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("PERMISSION_DENIED", "Permission 'aiplatform.models.upload' denied"),
        ("FAILED_PRECONDITION", "Model server exited unexpectedly. Last log lines: operation failed"),
        ("INVALID_ARGUMENT", "bad"),
        ("NOT_FOUND", "gone"),
    ],
)
def test_every_other_refusal_is_told_at_once(status: str, words: str) -> None:
    step = steps(RefusedError(status, words), True)
    with pytest.raises(RefusedError, match=words[:20]):
        converge(call(), step)
    assert step.left == [True]


def test_a_refusal_of_the_list_is_not_waited_out_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 100)
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    step = steps(*[RefusedError("ABORTED", "x")] * 50)
    with pytest.raises(RefusedError):
        converge(call(1e9), step)
    assert len(step.left) > 30


def test_passing_faults_are_given_up_after_ten_in_a_row_and_counted_anew_after_progress() -> None:
    nine: list[Exception | bool] = [PassingError("503")] * 9
    converge(call(), steps(*nine, False, *nine, True))
    with pytest.raises(PassingError):
        converge(call(), steps(*nine, PassingError("503"), True))


def test_work_ends_with_its_timeout_and_at_cancel() -> None:
    with pytest.raises(TimedOutError, match="custom_timeouts"):
        converge(call(0.02), steps(*[False] * 10**6))
    stopped = call()
    stopped.stop.set()
    with pytest.raises(StoppedError):
        converge(stopped, steps(True))


def test_a_step_has_a_limit_of_its_own_unless_the_user_has_set_a_timeout() -> None:
    assert call(3600).limited(60).left <= 60
    assert call(30).limited(60).left <= 30
    assert EngineCall("urn", 3600, threading.Event(), custom=True).limited(60).left > 3500


def test_lists_are_read_page_by_page(httpserver: HTTPServer) -> None:
    token = "a+b/c=&d"  # as opaque as a page token may be
    path = f"/v1/{ENDPOINT}/operations"
    httpserver.expect_ordered_request(path, query_string={}).respond_with_json(
        {"operations": [{"name": "1"}], "nextPageToken": token}
    )
    httpserver.expect_ordered_request(path, query_string={"pageToken": token}).respond_with_json(
        {"operations": [{"name": "2"}]}
    )
    api = VertexApi(Access("p", "europe-west4", httpserver.url_for("").rstrip("/")))
    assert [o["name"] for o in api.listed(call(), f"{ENDPOINT}/operations", "operations")] == ["1", "2"]
    httpserver.check_assertions()


def test_a_replica_is_available_or_nothing_is_said_of_replicas() -> None:
    resources = {"dedicatedResources": {"minReplicaCount": 1}}
    assert is_available(resources)
    assert is_available({**resources, "status": {"availableReplicaCount": 1}})
    assert not is_available({**resources, "status": {"message": "starting"}})  # a count of zero is left out
    assert is_available({"dedicatedResources": {}, "status": {}})  # scales to zero


def deployed(**status: Any) -> Wire:
    return {"id": "7", "model": "m", "dedicatedResources": {"minReplicaCount": 1}, "status": status}


class Scripted(VertexApi):
    """Answers readings of one endpoint from a list, and refuses deployments as told."""

    def __init__(self, *endpoints: Wire, refusals: tuple[RefusedError, ...] = ()) -> None:
        super().__init__(Access("p", "europe-west4"))
        self.endpoints, self.refusals = list(endpoints), list(refusals)
        self.sent: list[Wire] = []
        self.operations: list[Wire] = []

    def listed(self, call: EngineCall, path: str, field_name: str, **query: str) -> list[Wire]:
        return self.operations

    def find(self, call: EngineCall, path: str, *, version: str = "v1") -> Wire | None:
        return self.endpoints.pop(0) if len(self.endpoints) > 1 else self.endpoints[0]

    def change(self, http: str, path: str, body: Wire | None = None, *, version: str = "v1", **query: str) -> Wire:
        self.sent.append(json.loads(json.dumps(body)))
        if self.refusals:
            raise self.refusals.pop(0)
        return {"name": "an operation"}


def run(api: Scripted, seconds: float = 30) -> Runner:
    release = {"model": "projects/p/locations/l/models/m@1", "traffic": 100, "machineType": "n1-standard-2"}
    return Runner(call(seconds), api, {"endpoint": ENDPOINT, "models": {"main": release}}, Ours("mark"))


def test_a_replica_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    starting, ready = deployed(message="starting"), deployed(availableReplicaCount=1)
    api = Scripted(*({"deployedModels": [d]} for d in (starting, starting, ready)))
    assert run(api)._wait_until_available("7", "m@1")
    assert len(api.endpoints) == 1
    monkeypatch.setattr(runner, "AVAILABLE_SECONDS", 1.05)
    assert not run(Scripted({"deployedModels": [starting]}))._wait_until_available("7", "m@1")
    assert not run(Scripted({"deployedModels": []}))._wait_until_available("7", "m@1")


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ([deployed(message="no GPU is left")], r"no replica is available\. no GPU is left$"),
        ([], "was undeployed by somebody else as soon as it was deployed"),
    ],
)
def test_a_deployment_without_a_replica_fails_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, there: list[Wire], says: str
) -> None:
    one = run(Scripted({"deployedModels": there}))
    monkeypatch.setattr(runner, "AVAILABLE_SECONDS", 0.5)
    monkeypatch.setattr(one, "_deployment_seconds", lambda _: 10.0)
    monkeypatch.setattr(operations, "wait", lambda *_: {"deployedModel": {"id": "7"}})
    with pytest.raises(ProblemError, match=says):
        one._deploy(one.wanted["main"], ())


TAKEN = RefusedError("ALREADY_EXISTS", "taken")
NO_ID = RefusedError("INVALID_ARGUMENT", "deployed_model.id must not be set")
NO_SPLIT = RefusedError("INVALID_ARGUMENT", "Required field traffic_split is not set.")


def sent(*refusals: RefusedError, empty: bool) -> list[tuple[bool, bool]]:
    """Whether each request had an id of our choice, and traffic."""
    api = Scripted({}, refusals=refusals)
    one = run(api)
    one._start_deployment(one.wanted["main"], () if empty else {"another"})
    return [("id" in body["deployedModel"], "trafficSplit" in body) for body in api.sent]


def test_what_a_deployment_asks_for_depends_on_what_was_refused() -> None:
    assert sent(empty=True) == [(True, False)]
    assert sent(NO_ID, empty=False) == [(True, False), (False, False)]
    assert sent(*[TAKEN] * 5, empty=False) == [(True, False)] * 5 + [(False, False)]
    assert sent(NO_SPLIT, empty=True) == [(True, False), (True, True)]
    assert sent(NO_SPLIT, NO_ID, empty=True) == [(True, False), (True, True), (False, True)]
    # Where others serve, all the traffic is never asked for.
    with pytest.raises(RefusedError, match="traffic_split"):
        sent(NO_SPLIT, NO_SPLIT, empty=False)


@pytest.mark.parametrize("finished", [False, True], ids=["runs", "is done"])
def test_what_another_run_deploys_is_not_deployed_twice(finished: bool) -> None:
    api = Scripted({}, refusals=(TAKEN,))
    one = run(api)
    if finished:
        api.endpoints = [{"deployedModels": [{**deployed(), "id": deployed_id(ENDPOINT, one.wanted["main"].spec)}]}]
    else:
        kind = f"type.googleapis.com/google.cloud.aiplatform.v1.{runner.DEPLOYMENT}"
        api.operations = [{"name": "1", "metadata": {"@type": kind}}]
    with pytest.raises(PassingError, match="Another run"):
        one._start_deployment(one.wanted["main"], {"another"})
    assert len(api.sent) == 1
