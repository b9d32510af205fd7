"""The sandbox speaks the language of Google's discovery documents."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from google.cloud import aiplatform_v1

from sandbox import discovery
from sandbox.errors import GoogleError
from sandbox.server import METHODS
from sandbox.testing import LOCATION, RunningSandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox() as running:
        yield running


def method(http: str, path: str) -> discovery.Method:
    found = discovery.route(http, f"v1/{LOCATION}/{path}")
    assert found is not None
    return found


def test_every_implemented_method_is_one_of_googles() -> None:
    documented = {m["id"] for name in discovery.DOCUMENTS for m in discovery._methods(discovery.document(name))}
    assert set(METHODS) <= documented


@pytest.mark.parametrize(
    ("http", "path", "name"),
    [
        ("POST", "models:upload", "models.upload"),
        ("GET", "models/m@2", "models.get"),
        ("DELETE", "models/m@2:deleteVersion", "models.deleteVersion"),
        ("POST", "endpoints/1:deployModel", "endpoints.deployModel"),
        ("POST", "endpoints/1/operations/2:cancel", "endpoints.operations.cancel"),
        ("GET", "operations/2", "operations.get"),
        ("POST", "endpoints/openapi/completions", "endpoints.openapi.completions"),
        ("POST", "customJobs", "customJobs.create"),
    ],
)
def test_paths_lead_to_methods(http: str, path: str, name: str) -> None:
    assert method(http, path).id == f"aiplatform.projects.locations.{name}"


@pytest.mark.parametrize(
    ("http", "path", "name"),
    [
        ("POST", "customJobs", "aiplatform.projects.locations.customJobs.create"),
        ("GET", "pipelineJobs/7", "aiplatform.projects.locations.pipelineJobs.get"),
        ("POST", "endpoints/1:explain", "aiplatform.projects.locations.endpoints.explain"),
        ("DELETE", "endpoints/1/operations/2", "aiplatform.projects.locations.endpoints.operations.delete"),
    ],
)
def test_what_is_not_implemented_says_its_name(sandbox: RunningSandbox, http: str, path: str, name: str) -> None:
    for version in ("v1", "v1beta1"):
        status, body = sandbox.ask(http, f"{version}/{LOCATION}/{path}")
        assert status == 501
        assert body["error"]["status"] == "UNIMPLEMENTED"
        assert name in body["error"]["message"]


def test_an_unknown_path_is_not_found(sandbox: RunningSandbox) -> None:
    for path in ("models/m:juggle", "nonsense", "models/"):
        status, body = sandbox.ask("POST", path)
        assert (status, body["error"]["status"]) == (404, "NOT_FOUND")
    assert httpx.get(sandbox.url).status_code == 404


def test_no_web_page_may_drive_it(sandbox: RunningSandbox) -> None:
    url, page = f"{sandbox.url}/v1/{LOCATION}/models", {"origin": "https://example.com"}
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers=page).status_code == 403


MODEL: Any = {"displayName": "m", "containerSpec": {"imageUri": "i@sha256:0"}}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"model": {**MODEL, "colour": "red"}}, "Unknown name \"colour\" at 'model': Cannot find field."),
        ({"model": {**MODEL, "displayName": 5}}, "Invalid value at 'model.displayName' (TYPE_STRING), 5"),
        ({"model": {**MODEL, "labels": ["a"]}}, "Invalid value at 'model.labels' (TYPE_MESSAGE)"),
        ({"model": {"containerSpec": {"deploymentTimeout": "2h"}}}, "google-duration"),
        ({"model": {"containerSpec": {"sharedMemorySizeMb": "many"}}}, "int64"),
        ({"model": {"containerSpec": {"ports": [{"containerPort": "x"}]}}}, "ports[0].containerPort"),
    ],
)
def test_requests_are_read_as_strictly_as_google_reads_them(sandbox: RunningSandbox, body: Any, says: str) -> None:
    status, answer = sandbox.ask("POST", "models:upload", body)
    assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT")
    assert says in answer["error"]["message"]
    assert says in sandbox.violations()[-1]["message"]


def test_an_unknown_query_parameter_is_refused(sandbox: RunningSandbox) -> None:
    status, answer = sandbox.ask("GET", "models", colour="red")
    assert status == 400
    assert 'Unknown name "colour": Cannot bind query parameter' in answer["error"]["message"]


def test_requests_are_read_as_loosely_as_google_reads_them() -> None:
    body = {
        "model": {
            "display_name": "m",  # the proto's name
            "createTime": "never read: output only",
            "containerSpec": {"imageUri": "i", "sharedMemorySizeMb": 64, "command": None},
        }
    }
    read = discovery.read_request(method("POST", "models:upload"), ["$alt", "prettyPrint"], body)
    assert read == {"model": {"displayName": "m", "containerSpec": {"imageUri": "i", "sharedMemorySizeMb": "64"}}}


def test_enums_arrive_by_number_as_googles_clients_send_them() -> None:
    deploy = method("POST", "endpoints/1:deployModel")
    for number in list(aiplatform_v1.AcceleratorType):
        machine = {"machineSpec": {"acceleratorType": int(number)}}
        body = {"deployedModel": {"dedicatedResources": machine}}
        read = discovery.read_request(deploy, [], body)
        assert read["deployedModel"]["dedicatedResources"]["machineSpec"]["acceleratorType"] == number.name
    # Of the others that our bodies can hold, the document's order is the number.
    schemas = discovery.document("aiplatform.v1")["schemas"]
    kind = schemas["GoogleCloudAiplatformV1ReservationAffinity"]["properties"]["reservationAffinityType"]
    assert kind["enum"] == [t.name for t in sorted(aiplatform_v1.ReservationAffinity.Type)]
    with pytest.raises(GoogleError):
        discovery.read_request(
            deploy, [], {"deployedModel": {"dedicatedResources": {"machineSpec": {"acceleratorType": 99}}}}
        )


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"name": "x", "colour": "red"}),
        (200, {"name": "x", "createTime": "yesterday"}),
        (200, {"name": "x", "trafficSplit": {"1": "all"}}),
        (200, {"name": "x", "deployedModels": [{"dedicatedResources": {"minReplicaCount": None}}]}),
        (404, {"error": "not found"}),
        (404, {"error": {"code": 400, "message": "m", "status": "NOT_FOUND"}}),
    ],
)
def test_wrong_answers_are_noticed(status: int, body: Any) -> None:
    assert discovery.response_violations(method("GET", "endpoints/1"), status, body)


def test_operations_are_checked_to_the_bottom() -> None:
    get = method("GET", "operations/1")
    prefix = "type.googleapis.com/google.cloud.aiplatform.v1."
    response = {"@type": prefix + "Endpoint", "displayName": "e"}
    good = {"name": "o", "done": True, "response": response}
    assert discovery.response_violations(get, 200, good) == []
    assert discovery.response_violations(get, 200, {**good, "response": {**response, "colour": 1}})
    assert discovery.response_violations(get, 200, {**good, "metadata": {"no": "type"}})
