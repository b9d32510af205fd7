"""A sandbox whose containers are stubs, and endpoints with models that behave in known ways."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.testing import LOCATION, RunningSandbox

SPEC = {"imageUri": "image@sha256:" + "0" * 64, "predictRoute": "/predict", "healthRoute": "/ping"}
MODEL = f"{LOCATION}/models/counter"
_numbers = itertools.count(1)


def env(**variables: str) -> Any:
    return {**SPEC, "env": [{"name": k, "value": v} for k, v in variables.items()]}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    account = "known@a-project.iam.gserviceaccount.com"
    with RunningSandbox("--service-account", account, "--idle-seconds", "0.3") as running:
        upload_models(running)
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []


def upload_models(sandbox: RunningSandbox) -> None:
    specs = {
        "counter": SPEC,
        "starting": env(STUB_SECONDS="0.3"),
        "exits": env(STUB_HEALTH="exit", STUB_LOG="loading\nno weights"),
        "never-ready": {**env(STUB_HEALTH="never", STUB_LOG="still here"), "deploymentTimeout": "0.6s"},
    }
    for name, spec in specs.items():
        body = {"modelId": name, "model": {"displayName": name, "containerSpec": spec}}
        sandbox.do("POST", "models:upload", body)


def make_endpoint(sandbox: RunningSandbox, **more: Any) -> str:
    """The path of a new endpoint."""
    number = next(_numbers)
    sandbox.do("POST", "endpoints", {"displayName": "people", **more}, endpointId=number)
    return f"endpoints/{number}"


def deployment(number: int, model: str = MODEL, replicas: int = 1, split: Any = None, **more: Any) -> dict[str, Any]:
    resources = {"minReplicaCount": replicas, "machineSpec": {"machineType": "c3-highcpu-4"}}
    deployed = {"id": str(number), "model": model, "dedicatedResources": resources, **more}
    return {"deployedModel": deployed, "trafficSplit": split or {}}


def deploy(sandbox: RunningSandbox, endpoint: str, *args: Any, **more: Any) -> Any:
    return sandbox.do("POST", f"{endpoint}:deployModel", deployment(*args, **more))
