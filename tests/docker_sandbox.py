"""A sandbox that runs real containers, and the steps that its tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import images
import pytest
from docker.models.containers import Container
from helpers import eventually

from sandbox.runner import LABEL
from sandbox.testing import LOCATION, RunningSandbox

RESIZE_MASK = "dedicatedResources.minReplicaCount,dedicatedResources.maxReplicaCount"
RESIZED = {"id": "7", "dedicatedResources": {"minReplicaCount": 3, "maxReplicaCount": 3}}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def sandbox(docker_engine: docker.DockerClient, tiny_image: str, state: Path) -> Iterator[RunningSandbox]:
    """One sandbox with models `tiny`, `exits` and `late`; each test makes its endpoint."""
    with RunningSandbox(runner="docker", state=state) as running:
        upload(running, "tiny", tiny_image)
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []
    assert containers(docker_engine) == []  # a stopped sandbox leaves none


@pytest.fixture(autouse=True)
def tidy(sandbox: RunningSandbox) -> Iterator[None]:
    """Undeploys the models that a test left, so that a failed test does not make the next ones fail."""
    yield
    assert sandbox.process is not None
    if sandbox.process.poll() is not None:
        sandbox.start()
    for found in sandbox.do("GET", "endpoints").get("endpoints", []):
        for deployed in found.get("deployedModels", []):
            undeploy(sandbox, f"endpoints/{found['name'].rpartition('/')[2]}", int(deployed["id"]))


def upload(sandbox: RunningSandbox, name: str, image: str, env: Any = None, **spec: Any) -> Any:
    spec = {"imageUri": image, "predictRoute": "/predict", "healthRoute": "/ping", **spec}
    spec["env"] = [{"name": k, "value": v} for k, v in (env or {}).items()]
    body = {
        "modelId": name,
        "model": {"displayName": name, "containerSpec": spec, "artifactUri": "gs://b/weights"},
    }
    return sandbox.do("POST", "models:upload", body)


def endpoint(sandbox: RunningSandbox, name: str) -> str:
    sandbox.do("POST", "endpoints", {"displayName": name}, endpointId=name)
    return f"endpoints/{name}"


def deployment(number: int, model: str = "tiny", replicas: int = 1, split: Any = None) -> Any:
    resources = {"minReplicaCount": replicas, "machineSpec": {"machineType": "n1-standard-2"}}
    deployed = {"id": str(number), "model": f"{LOCATION}/models/{model}", "dedicatedResources": resources}
    return {"deployedModel": deployed, "trafficSplit": split or {"0": 100}}


def deploy(sandbox: RunningSandbox, where: str, *args: Any, **more: Any) -> Any:
    return sandbox.do("POST", f"{where}:deployModel", deployment(*args, **more))


def predict(sandbox: RunningSandbox, where: str, **parameters: Any) -> Any:
    return sandbox.do("POST", f"{where}:predict", {"instances": [1], "parameters": parameters})["predictions"][0]


def undeploy(sandbox: RunningSandbox, where: str, number: int, split: Any = None) -> Any:
    body = {"deployedModelId": str(number), **({"trafficSplit": split} if split else {})}
    return sandbox.do("POST", f"{where}:undeployModel", body)


def containers(docker_engine: docker.DockerClient, where: str = "") -> list[Container]:
    """Containers of this run, or those of an endpoint."""
    found = docker_engine.containers.list(
        all=True, filters={"label": f"{images.LABEL}={images.RUN}"}, ignore_removed=True
    )
    return [c for c in found if c.labels[LABEL + "endpoint"].endswith(where)]


def asleep(docker_engine: docker.DockerClient, where: str) -> bool:
    """Whether a container of an endpoint is in a request that makes it sleep."""
    found = containers(docker_engine, where)
    return any(one.exec_run(["test", "-f", "/tmp/asleep"]).exit_code == 0 for one in found)


def available(sandbox: RunningSandbox, where: str) -> list[int]:
    """Available replicas, by deployed model."""
    deployed = sandbox.do("GET", where).get("deployedModels", [])
    return [d["status"].get("availableReplicaCount", 0) for d in deployed]


def has_replicas(sandbox: RunningSandbox, docker_engine: docker.DockerClient, where: str, count: int) -> bool:
    """Whether so many containers run for an endpoint and are available."""
    return len(containers(docker_engine, where)) == count and available(sandbox, where) == [count] * bool(count)


def answers(sandbox: RunningSandbox, where: str) -> bool:
    return sandbox.ask("POST", f"{where}:predict", {"instances": [1]})[0] == 200


def until(condition: Callable[[], Any]) -> None:
    assert eventually(condition), "it did not happen in time"
