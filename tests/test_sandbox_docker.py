"""The sandbox runs real containers: of a tiny image with the contract of the serving tiny_image."""

import collections
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import httpx
import images
import pytest
from docker_sandbox import (
    RESIZE_MASK,
    asleep,
    available,
    containers,
    deploy,
    deployment,
    endpoint,
    predict,
    sandbox,
    state,
    tidy,
    undeploy,
    until,
    upload,
)
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform
from helpers import Load

from sandbox.testing import LOCATION, RunningSandbox

pytestmark = pytest.mark.slow
__all__ = ["sandbox", "state", "tidy"]  # fixtures


def test_the_container_gets_what_its_model_says(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    upload(
        sandbox,
        "spoken",
        tiny_image,
        env={
            "PLACE": "$(AIP_ENDPOINT_ID)/$(AIP_DEPLOYED_MODEL_ID)",
            "AGAIN": "<$(PLACE)>",
            "LITERAL": "$$(PLACE)",
        },
        args=["--port=$(AIP_HTTP_PORT)", "$(UNKNOWN)"],
        ports=[{"containerPort": 9001}, {"containerPort": 9002}],
        sharedMemorySizeMb="96",
        healthProbe={"exec": {"command": ["test", "-f", "/server.py"]}, "periodSeconds": 1},
        startupProbe={"httpGet": {"path": "/ping", "port": 9001}, "periodSeconds": 1},
    )
    where = endpoint(sandbox, "spoken")
    deploy(sandbox, where, 7, model="spoken")
    said = predict(sandbox, where)
    env = said["env"]
    assert said["argv"] == ["--port=9001", "$(UNKNOWN)"]
    assert said["shm"] == 96 * 2**20
    number = env["AIP_ENDPOINT_ID"]
    assert number.isdigit()  # also of an endpoint with a name
    assert (env["PLACE"], env["AGAIN"], env["LITERAL"]) == (f"{number}/7", f"<{number}/7>", "$(PLACE)")
    assert {k: v for k, v in env.items() if k.startswith("AIP_")} == {
        "AIP_ACCELERATOR_TYPE": "",
        "AIP_DEPLOYED_MODEL_ID": "7",
        "AIP_ENDPOINT_ID": number,
        "AIP_FRAMEWORK": "CUSTOM_CONTAINER",
        "AIP_HEALTH_ROUTE": "/ping",
        "AIP_HTTP_PORT": "9001",
        "AIP_MACHINE_TYPE": "n1-standard-2",
        "AIP_MODE": "PREDICTION",
        "AIP_MODEL_NAME": number,
        "AIP_MODE_VERSION": "1.0.0",
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_PROJECT_NUMBER": sandbox.do("GET", where)["name"].split("/")[1],
        "AIP_STORAGE_URI": "gs://b/weights",
        "AIP_VERSION_NAME": "7",
    }
    (container,) = containers(docker_engine, where)
    published = container.attrs["NetworkSettings"]["Ports"]["9001/tcp"]
    assert [p["HostIp"] for p in published] == ["127.0.0.1"]  # it is reached from this machine alone
    undeploy(sandbox, where, 7)
    assert containers(docker_engine, where) == []


def test_replicas_share_the_work_and_change_in_place(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient
) -> None:
    where = endpoint(sandbox, "replicas")
    deploy(sandbox, where, 7, replicas=2)
    first = collections.Counter(predict(sandbox, where)["host"] for _ in range(20))
    assert sorted(first.values()) == [10, 10]
    assert predict(sandbox, where)["argv"] == ["from-the-image"]
    for count in (3, 1):
        resources = {"minReplicaCount": count, "maxReplicaCount": count}
        body = {"deployedModel": {"id": "7", "dedicatedResources": resources}, "updateMask": RESIZE_MASK}
        assert "response" in sandbox.do("POST", f"{where}:mutateDeployedModel", body)
        assert len(containers(docker_engine, where)) == count
    assert predict(sandbox, where)["host"] in first  # one of the first two stayed
    undeploy(sandbox, where, 7)


def test_a_broken_image_fails_and_leaves_nothing(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    upload(sandbox, "exits", tiny_image, env={"TINY_EXIT": "1"})
    upload(sandbox, "late", tiny_image, env={"TINY_SECONDS": "600"}, deploymentTimeout="2s")
    missing = tiny_image.partition("@")[0] + "@sha256:" + "0" * 64
    upload(sandbox, "missing", missing)
    where = endpoint(sandbox, "broken")
    deploy(sandbox, where, 1)
    for model, says in (
        ("exits", ["exited unexpectedly (exit status 3)", "loading\nno weights"]),
        ("late", ["never became ready", "/ping answers 503", "tiny model listens"]),
        ("missing", ["Failed to pull the container image", missing]),
    ):
        operation = deploy(sandbox, where, 2, model=model, replicas=2)
        for text in says:
            assert text in operation["error"]["message"]
        read = sandbox.do("GET", where)
        assert ([d["id"] for d in read["deployedModels"]], read["trafficSplit"]) == (["1"], {"1": 100})
        assert len(containers(docker_engine, where)) == 1
        assert predict(sandbox, where)["env"]["AIP_DEPLOYED_MODEL_ID"] == "1"
    undeploy(sandbox, where, 1)


def test_a_model_scales_to_zero_and_starts_when_it_is_asked(
    docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    with RunningSandbox("--idle-seconds", "1", runner="docker") as sleepy:
        upload(sleepy, "tiny", tiny_image)
        sleepy.do("POST", "endpoints", {"displayName": "e", "dedicatedEndpointEnabled": True}, endpointId="asleep")
        body = deployment(7)
        body["deployedModel"]["dedicatedResources"] |= {"minReplicaCount": 0, "maxReplicaCount": 1}
        path = f"v1beta1/{LOCATION}/endpoints/asleep"
        assert "response" in sleepy.do("POST", f"{path}:deployModel", body)
        for _ in range(2):
            until(lambda: containers(docker_engine, "endpoints/asleep") == [])
            assert sleepy.ask("POST", f"{path}:predict", {"instances": [1]})[0] == 429
            until(lambda: sleepy.ask("POST", f"{path}:predict", {"instances": [1]})[0] == 200)


def test_undeploying_answers_what_is_in_flight(sandbox: RunningSandbox, docker_engine: docker.DockerClient) -> None:
    where = endpoint(sandbox, "flight")
    deploy(sandbox, where, 7)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(predict, sandbox, where, sleep=1.5)
        until(lambda: asleep(docker_engine, where))
        undeploy(sandbox, where, 7)
        assert answer.result()["env"]["AIP_DEPLOYED_MODEL_ID"] == "7"


def test_a_cancelled_undeployment_leaves_the_model_deployed(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient
) -> None:
    where = endpoint(sandbox, "undecided")
    deploy(sandbox, where, 7)
    with ThreadPoolExecutor() as pool:
        pool.submit(predict, sandbox, where, sleep=1.5)  # keeps the undeployment from ending at once
        until(lambda: asleep(docker_engine, where))
        _, operation = sandbox.ask("POST", f"{where}:undeployModel", {"deployedModelId": "7"})
        sandbox.do("POST", f"v1/{operation['name']}:cancel")
        assert sandbox.done(operation)["error"]["code"] == 1
    until(lambda: available(sandbox, where) == [1])
    sandbox.do("PATCH", where, {"trafficSplit": {"7": 100}}, updateMask="trafficSplit")
    assert predict(sandbox, where)["env"]["AIP_DEPLOYED_MODEL_ID"] == "7"
    undeploy(sandbox, where, 7)
    until(lambda: containers(docker_engine, where) == [])


def test_an_answer_that_takes_too_long_is_given_up(sandbox: RunningSandbox) -> None:
    body = {
        "displayName": "impatient",
        "dedicatedEndpointEnabled": True,
        "clientConnectionConfig": {"inferenceTimeout": "1s"},
    }
    sandbox.do("POST", "endpoints", body, endpointId="impatient")
    deploy(sandbox, "endpoints/impatient", 7)
    body = {"instances": [1], "parameters": {"sleep": 3}}
    status, answer = sandbox.ask("POST", "endpoints/impatient:predict", body)
    assert (status, answer["error"]["status"]) == (504, "DEADLINE_EXCEEDED")
    undeploy(sandbox, "endpoints/impatient", 7)


def test_a_change_of_versions_under_load_loses_nothing(sandbox: RunningSandbox) -> None:
    where = endpoint(sandbox, "load")
    deploy(sandbox, where, 1)
    url = f"{sandbox.url}/v1/{LOCATION}/{where}:predict"
    with Load(url, {"instances": [1]}) as load:
        deploy(sandbox, where, 2, split={"0": 0, "1": 100})
        sandbox.do("PATCH", where, {"trafficSplit": {"2": 100}}, updateMask="trafficSplit")
        undeploy(sandbox, where, 1)
        until(lambda: load.answers[200, "2"] > 20)
    assert set(load.answers) == {(200, "1"), (200, "2")}
    undeploy(sandbox, where, 2)


def test_predictions_pass_as_they_are(sandbox: RunningSandbox) -> None:
    where = endpoint(sandbox, "raw")
    deploy(sandbox, where, 7)
    url = f"{sandbox.url}/v1/{LOCATION}/{where}"
    raw = httpx.post(f"{url}:rawPredict", content=b"\xff\xd8text", headers={"content-type": "application/x-text"})
    assert (raw.content, raw.headers["content-type"]) == (b"txet\xd8\xff", "application/x-text")
    body = {"instances": [1], "parameters": {"status": 422}}
    status, answer = sandbox.ask("POST", f"{where}:predict", body)
    assert (status, json.loads(answer["error"]["message"])) == (422, {"error": "no such picture"})
    raw = httpx.post(f"{url}:rawPredict", json=body)
    assert (raw.status_code, raw.json()) == (422, {"error": "no such picture"})
    undeploy(sandbox, where, 7)


def test_a_container_that_ends_is_replaced(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    probe = {"httpGet": {"path": "/ping"}, "periodSeconds": 1, "failureThreshold": 2}
    upload(sandbox, "mortal", tiny_image, healthProbe=probe)
    where = endpoint(sandbox, "mortal")
    deploy(sandbox, where, 7, model="mortal")

    # Sick: out of the traffic, and back when it is well.
    (container,) = containers(docker_engine, where)
    container.exec_run(["touch", "/tmp/sick"])
    until(lambda: available(sandbox, where) == [0])
    status, answer = sandbox.ask("POST", f"{where}:predict", {"instances": [1]})
    assert (status, answer["error"]["status"]) == (503, "UNAVAILABLE")
    container.exec_run(["rm", "/tmp/sick"])
    until(lambda: available(sandbox, where) == [1])
    # Dead: another one in its place.
    before = predict(sandbox, where)["host"]
    status, answer = sandbox.ask("POST", f"{where}:predict", {"instances": [1], "parameters": {"exit": True}})
    assert (status, answer["error"]["status"]) == (503, "UNAVAILABLE")
    until(lambda: available(sandbox, where) == [0])
    until(lambda: available(sandbox, where) == [1])
    assert predict(sandbox, where)["host"] != before
    undeploy(sandbox, where, 7)
    assert containers(docker_engine, where) == []


def test_the_image_is_pulled_by_digest(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    where = endpoint(sandbox, "pulled")
    local = docker_engine.images.get(tiny_image)
    docker_engine.images.remove(str(local.id), force=True)
    deploy(sandbox, where, 7)
    assert docker_engine.images.get(tiny_image).id == local.id
    assert predict(sandbox, where)["argv"] == ["from-the-image"]
    undeploy(sandbox, where, 7)


def test_a_tag_is_the_image_that_it_was_at_upload(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str, tmp_path: Path
) -> None:
    name = tiny_image.partition("@")[0]
    local = docker_engine.images.get(tiny_image)
    local.tag(name, "moving")
    docker_engine.images.push(name, tag="moving")
    upload(sandbox, "tagged", f"{name}:moving")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nLABEL moved=1\n")
    images.build(tmp_path, f"{name}:moving")  # and moves
    docker_engine.images.push(name, tag="moving")
    where = endpoint(sandbox, "tagged")
    deploy(sandbox, where, 7, model="tagged")
    (container,) = containers(docker_engine, where)
    assert container.image is not None
    assert container.image.id == local.id
    undeploy(sandbox, where, 7)
    docker_engine.images.remove(f"{name}:moving")


def test_googles_client_deploys_and_predicts(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    aiplatform.init(
        project="a-project",
        location="europe-west4",
        api_endpoint=sandbox.url,
        api_transport="rest",
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
    )
    model = aiplatform.Model.upload(
        display_name="by-client",
        serving_container_image_uri=tiny_image,
        serving_container_predict_route="/predict",
        serving_container_health_route="/ping",
    )
    endpoint = aiplatform.Endpoint.create(display_name="by-client")
    model.deploy(endpoint, machine_type="n1-standard-4")
    answer = endpoint.predict(instances=[1, 2])
    assert [p["argv"] for p in answer.predictions] == [["from-the-image"]] * 2
    endpoint.undeploy_all()
    endpoint.delete()
    model.delete()
    assert containers(docker_engine, endpoint.name) == []


def test_without_docker_a_deployment_says_what_is_missing(tiny_image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with RunningSandbox(runner="docker") as sandbox:
        upload(sandbox, "tiny", tiny_image.partition("@")[0] + ":latest")  # everything else works
        where = endpoint(sandbox, "none")
        operation = deploy(sandbox, where, 7)
        assert operation["error"]["code"] == 9
        assert "The sandbox needs Docker" in operation["error"]["message"]
        sandbox.do("DELETE", where)
