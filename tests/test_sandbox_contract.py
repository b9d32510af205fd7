"""The sandbox speaks the language of Google's discovery documents."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.cloud import aiplatform_v1, artifactregistry_v1

import sandbox
from sandbox import discovery
from sandbox.conventions import partial
from sandbox.errors import CODES, LISTED, GoogleError
from sandbox.server import METHODS
from sandbox.testing import LOCATION, RunningSandbox


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
        ("POST", "trainingPipelines", "aiplatform.projects.locations.trainingPipelines.create"),
        ("GET", "featurestores/7", "aiplatform.projects.locations.featurestores.get"),
        ("POST", "endpoints/1:explain", "aiplatform.projects.locations.endpoints.explain"),
        ("DELETE", "endpoints/1/operations/2", "aiplatform.projects.locations.endpoints.operations.delete"),
    ],
)
def test_what_is_not_implemented_says_its_name(stub_sandbox: RunningSandbox, http: str, path: str, name: str) -> None:
    for version in ("v1", "v1beta1"):
        status, body = stub_sandbox.ask(http, f"{version}/{LOCATION}/{path}")
        assert status == 501
        assert body["error"]["status"] == "UNIMPLEMENTED"
        assert name in body["error"]["message"]


def test_an_unknown_path_is_not_found(stub_sandbox: RunningSandbox) -> None:
    for path in ("models/m:juggle", "nonsense", "models/"):
        status, body = stub_sandbox.ask("POST", path)
        assert (status, body["error"]["status"]) == (404, "NOT_FOUND")
    assert httpx.get(stub_sandbox.url).status_code == 404


def test_no_web_page_may_drive_it(stub_sandbox: RunningSandbox) -> None:
    url, page = f"{stub_sandbox.url}/v1/{LOCATION}/models", {"origin": "https://example.com"}
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
def test_requests_are_read_as_strictly_as_google_reads_them(stub_sandbox: RunningSandbox, body: Any, says: str) -> None:
    status, answer = stub_sandbox.ask("POST", "models:upload", body)
    assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT")
    assert says in answer["error"]["message"]
    assert says in stub_sandbox.violations()[-1]["message"]


def test_an_unknown_query_parameter_is_refused(stub_sandbox: RunningSandbox) -> None:
    status, answer = stub_sandbox.ask("GET", "models", colour="red")
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
    make = discovery.route("POST", "v1/projects/p/locations/l/repositories", "artifactregistry")
    assert make
    for form in list(artifactregistry_v1.Repository.Format):
        assert discovery.read_request(make, [], {"format": int(form)})["format"] == form.name
    # Of the others that our bodies can hold, the document's order is the number.
    schemas = discovery.document("aiplatform.v1")["schemas"]
    kind = schemas["GoogleCloudAiplatformV1ReservationAffinity"]["properties"]["reservationAffinityType"]
    assert kind["enum"] == [t.name for t in sorted(aiplatform_v1.ReservationAffinity.Type)]
    with pytest.raises(GoogleError):
        discovery.read_request(
            deploy, [], {"deployedModel": {"dedicatedResources": {"machineSpec": {"acceleratorType": 99}}}}
        )


@pytest.mark.parametrize(
    ("field", "enum", "wrap"),
    [
        ("algorithm", aiplatform_v1.StudySpec.Algorithm, lambda v: {"studySpec": {"algorithm": v}}),
        (
            "measurementSelectionType",
            aiplatform_v1.StudySpec.MeasurementSelectionType,
            lambda v: {"studySpec": {"measurementSelectionType": v}},
        ),
        (
            "goal",
            aiplatform_v1.StudySpec.MetricSpec.GoalType,
            lambda v: {"studySpec": {"metrics": [{"goal": v}]}},
        ),
        (
            "scaleType",
            aiplatform_v1.StudySpec.ParameterSpec.ScaleType,
            lambda v: {"studySpec": {"parameters": [{"scaleType": v}]}},
        ),
        ("strategy", aiplatform_v1.Scheduling.Strategy, lambda v: {"trialJobSpec": {"scheduling": {"strategy": v}}}),
    ],
)
def test_enums_of_jobs_arrive_by_number(field: str, enum: Any, wrap: Any) -> None:
    create = method("POST", "hyperparameterTuningJobs")
    for number in list(enum):
        assert discovery.read_request(create, [], wrap(int(number))) == wrap(number.name), field


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


@pytest.mark.parametrize("api", ["aiplatform", "artifactregistry", "compute", "iam", "storage"])
def test_every_error_has_the_shape_of_its_api(api: str) -> None:
    """Shapes of other APIs are noticed: see `sandbox.errors`."""
    name = next(name for name in discovery.DOCUMENTS if name.startswith(api + "."))
    one = next(discovery._methods(discovery.document(name)))
    of_this_api = discovery.Method(one["id"], name, None, None, frozenset())
    for status in CODES:
        error = GoogleError(status, "message")
        assert discovery.response_violations(of_this_api, error.http, error.body(api)) == []
        other = error.body("iam" if api not in LISTED else "aiplatform")
        assert discovery.response_violations(of_this_api, error.http, other)


@pytest.mark.parametrize(
    ("fields", "selected"),
    [
        ("kind", {"kind": "k"}),
        ("items/name", {"items": [{"name": "a"}, {"name": "b"}]}),
        ("items(name,owner/id),kind", {"kind": "k", "items": [{"name": "a", "owner": {"id": 1}}, {"name": "b"}]}),
        ("items/*/id", {"items": [{"owner": {"id": 1}}, {}]}),
        ("nothing", {}),
    ],
)
def test_part_of_an_answer_is_selected(fields: str, selected: Any) -> None:
    items = [{"name": "a", "owner": {"id": 1, "more": 2}}, {"name": "b"}]
    assert partial({"kind": "k", "items": items}, fields) == selected


@pytest.mark.parametrize("fields", ["a(", "a)", "a,,b", "/a", "a/", "(a)", ","])
def test_a_selection_that_cannot_be_read_is_refused(fields: str) -> None:
    with pytest.raises(GoogleError, match="Invalid field selection"):
        partial({}, fields)


def test_no_module_imports_another_in_a_circle() -> None:
    """Imports for types alone count too. Raises graphlib.CycleError with the circle."""
    root = Path(next(iter(sandbox.__path__)))
    files = {".".join(["sandbox", *path.relative_to(root).with_suffix("").parts]): path for path in root.rglob("*.py")}
    imports: dict[str, set[str]] = {}
    for name, path in files.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        named = {m for n in nodes for m in (n.module, *(f"{n.module}.{alias.name}" for alias in n.names))}
        imports[name] = {str(m) for m in named} & set(files) - {name}
    assert len(list(TopologicalSorter(imports).static_order())) == len(files) > 20
