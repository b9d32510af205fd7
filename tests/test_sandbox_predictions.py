"""Predictions through the sandbox: the split, the limits, the errors of Vertex AI (stub containers)."""

import collections
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import requests.adapters
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform

from sandbox.testing import LOCATION, RunningSandbox

IMAGE = "image@sha256:"
SHARED, DEDICATED = 1_572_864, 10 * 2**20


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox() as running:
        models: dict[str, dict[str, str]] = {
            "old": {},
            "new": {},
            "bad": {"STUB_STATUS": "500", "STUB_LOG": "boom"},
            "long": {"STUB_STATUS": "200", "STUB_LOG": "x" * (SHARED + 1)},
        }
        for name, variables in models.items():
            env = [{"name": k, "value": v} for k, v in variables.items()]
            model: Any = {"displayName": name, "containerSpec": {"imageUri": IMAGE + name, "env": env}}
            running.do("POST", "models:upload", {"modelId": name, "model": model})
        for endpoint, dedicated in (
            ("shared", False),
            ("own", True),
            ("none", False),
            ("broken", False),
            ("long", False),
            ("empty", False),
        ):
            body = {"displayName": endpoint, "dedicatedEndpointEnabled": dedicated}
            running.do("POST", "endpoints", body, endpointId=endpoint)
        deploy(running, "shared", "old", 1, {"0": 100})
        deploy(running, "shared", "new", 2, {"0": 10, "1": 90})
        deploy(running, "own", "old", 1, {"0": 100})
        deploy(running, "none", "old", 1, {"0": 100})
        running.do("PATCH", "endpoints/none", {}, updateMask="trafficSplit")
        deploy(running, "broken", "bad", 1, {"0": 100})
        deploy(running, "long", "long", 1, {"0": 100})
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []


def deploy(sandbox: RunningSandbox, endpoint: str, model: str, number: int, split: Any) -> None:
    resources = {"minReplicaCount": 1, "machineSpec": {"machineType": "n1-standard-2"}}
    deployed = {"id": str(number), "model": f"{LOCATION}/models/{model}", "dedicatedResources": resources}
    body = {"deployedModel": deployed, "trafficSplit": split}
    sandbox.do("POST", f"endpoints/{endpoint}:deployModel", body)


def test_predictions_say_who_answered(sandbox: RunningSandbox) -> None:
    answer = sandbox.do("POST", "endpoints/own:predict", {"instances": [1, 2], "parameters": {"a": 1}})
    assert len(answer["predictions"]) == 2
    assert answer["predictions"][0]["imageUri"] == IMAGE + "old"
    assert (answer["deployedModelId"], answer["modelVersionId"], answer["modelDisplayName"]) == (
        "1",
        "1",
        "old",
    )


def test_ten_percent_get_about_ten_percent(sandbox: RunningSandbox) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for _ in range(500):
        counts[sandbox.do("POST", "endpoints/shared:predict", {"instances": [1]})["deployedModelId"]] += 1
    assert set(counts) == {"1", "2"}
    assert 10 <= counts["2"] <= 90  # six standard deviations about 50


@pytest.mark.parametrize(("endpoint", "limit"), [("shared", SHARED), ("own", DEDICATED)])
def test_payloads_are_limited(sandbox: RunningSandbox, endpoint: str, limit: int) -> None:
    empty = len(b'{"instances": [""]}')
    for size, status in ((limit, 200), (limit + 1, 400)):
        body = b'{"instances": ["' + b"x" * (size - empty) + b'"]}'
        for verb in ("predict", "rawPredict"):
            url = f"{sandbox.url}/v1/{LOCATION}/endpoints/{endpoint}:{verb}"
            response = httpx.post(url, content=body, headers={"content-type": "application/json"})
            assert response.status_code == status, response.text
    assert response.json()["error"] == {
        "code": 400,
        "message": f"Request payload size exceeds the limit: {limit} bytes.",
        "status": "INVALID_ARGUMENT",
    }


def test_answers_are_limited(sandbox: RunningSandbox) -> None:
    response = httpx.post(f"{sandbox.url}/v1/{LOCATION}/endpoints/long:rawPredict", content=b"x")
    assert response.status_code == 400
    assert f"max is {SHARED}" in response.json()["error"]["message"]


def test_raw_predict_passes_bodies_through(sandbox: RunningSandbox) -> None:
    response = httpx.post(f"{sandbox.url}/v1/{LOCATION}/endpoints/own:rawPredict", content=b"\xff\xd8 a picture")
    assert response.json()["predictions"][0]["deployedModelId"] == "1"
    assert response.headers["x-vertex-ai-deployed-model-id"] == "1"
    assert response.headers["x-vertex-ai-endpoint-id"] == "own"
    assert response.headers["x-vertex-ai-model"].endswith("/models/old")
    assert response.headers["x-vertex-ai-model-version-id"] == "1"


def test_a_containers_error_is_passed_on(sandbox: RunningSandbox) -> None:
    status, body = sandbox.ask("POST", "endpoints/broken:predict", {"instances": [1]})
    assert (status, body) == (500, {"error": {"code": 500, "message": "boom", "status": "INTERNAL"}})
    raw = httpx.post(f"{sandbox.url}/v1/{LOCATION}/endpoints/broken:rawPredict", content=b"x")
    assert (raw.status_code, raw.content) == (500, b"boom")


def test_without_traffic_nobody_answers(sandbox: RunningSandbox) -> None:
    for endpoint in ("none", "empty"):
        status, body = sandbox.ask("POST", f"endpoints/{endpoint}:predict", {"instances": [1]})
        assert (status, body["error"]["status"]) == (400, "FAILED_PRECONDITION")
        assert body["error"]["message"] == f"Endpoint {LOCATION}/endpoints/{endpoint} doesn't have traffic_split."
    assert sandbox.ask("POST", "endpoints/nobody:predict", {"instances": [1]})[0] == 404


@pytest.mark.parametrize("body", [{}, {"instances": "one"}, {"instances": [1], "unknown": 1}, [1]])
def test_a_wrong_body_is_refused(sandbox: RunningSandbox, body: Any) -> None:
    status, answer = sandbox.ask("POST", "endpoints/own:predict", body)
    assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT")


class ToSandbox(requests.adapters.HTTPAdapter):
    """Takes requests for Google's addresses, which Google's client builds by itself, to the sandbox."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.asked: list[str] = []

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        asked = urlsplit(request.url or "")
        self.asked.append(str(asked.hostname))
        request.url = f"{self.url}{asked.path}"
        return super().send(request, *args, **options)


def test_googles_client_predicts_raw(sandbox: RunningSandbox) -> None:
    aiplatform.init(
        project="a-project",
        location="europe-west4",
        api_endpoint=sandbox.url,
        api_transport="rest",
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
    )
    for name, host in (("shared", "europe-west4-aiplatform.googleapis.com"), ("own", "127.0.0.1")):
        endpoint = aiplatform.Endpoint(f"{LOCATION}/endpoints/{name}")
        session = requests.Session()
        there = ToSandbox(sandbox.url)
        session.mount("https://", there)
        endpoint.authorized_session = session  # type: ignore[assignment]
        answer = endpoint.raw_predict(body=b"\xff\xd8 a picture", headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == 200
        assert answer.json()["predictions"][0]["imageUri"].startswith(IMAGE)
        assert there.asked == [host]
