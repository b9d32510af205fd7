"""The sandbox runs real containers: a tiny image with the contract of the serving image.

Where no Docker engine and registry answer these tests are skipped, or fail with HEADCOUNT_REQUIRE_DOCKER=1.
"""

import collections
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from docker.models.containers import Container
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform

from sandbox.runner import LABEL
from sandbox.testing import LOCATION, RunningSandbox

REGISTRY = os.environ.get("HEADCOUNT_REGISTRY", "127.0.0.1:5000")
BASE = "python:3.11-slim-bookworm"
# A label of the image, and so of its containers: those of others on this machine are not looked at.
RUN = f"headcount.test={uuid.uuid4().hex[:8]}"

SERVER = """
import json, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

E = os.environ
if E.get("TINY_EXIT"):
    print("loading\\nno weights", flush=True)
    sys.exit(3)
started = time.monotonic()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        late = time.monotonic() - started < float(E.get("TINY_SECONDS", 0))
        bad = late or self.path != E["AIP_HEALTH_ROUTE"] or os.path.exists("/tmp/sick")
        self.answer(503 if bad else 200, b"{}")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path != E["AIP_PREDICT_ROUTE"]:
            return self.answer(404, b"not here")
        if self.headers["content-type"] != "application/json":
            return self.answer(200, body[::-1], self.headers["content-type"])
        asked = json.loads(body)
        parameters = asked.get("parameters") or {}
        time.sleep(parameters.get("sleep", 0))
        if parameters.get("status"):
            return self.answer(parameters["status"], b'{"error": "no such picture"}')
        if parameters.get("exit"):
            os._exit(9)
        shm = os.statvfs("/dev/shm")
        said = {
            "host": os.uname().nodename, "argv": sys.argv[1:], "env": dict(E),
            "shm": shm.f_blocks * shm.f_frsize,
        }
        self.answer(200, json.dumps({"predictions": [said] * len(asked["instances"])}).encode())

    def log_message(self, *args):
        pass

server = ThreadingHTTPServer(("", int(E["AIP_HTTP_PORT"])), Handler)
# Answers what is in flight before it ends, and writes that it was asked to.
def end(*_):
    threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, end)
print("tiny model listens", flush=True)
server.serve_forever()
server.server_close()
"""
DOCKERFILE = f'FROM {BASE}\nCOPY server.py /\nENTRYPOINT ["python", "/server.py"]\nCMD ["from-the-image"]\n'


RESIZE_MASK = "dedicatedResources.minReplicaCount,dedicatedResources.maxReplicaCount"
RESIZED = {"id": "7", "dedicatedResources": {"minReplicaCount": 3, "maxReplicaCount": 3}}


def absent(why: str) -> None:
    if os.environ.get("HEADCOUNT_REQUIRE_DOCKER") == "1":
        pytest.fail(f"HEADCOUNT_REQUIRE_DOCKER=1, and {why}")
    pytest.skip(why)


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    try:
        client = docker.from_env(version="auto", timeout=120)
        client.ping()
    except docker.errors.DockerException as error:
        absent(f"no Docker engine answers: {error}")
    try:
        httpx.get(f"http://{REGISTRY}/v2/", timeout=5).raise_for_status()
    except httpx.HTTPError as error:
        absent(f"no Docker registry answers at {REGISTRY}: {error}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tiny image in the registry, by digest."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "server.py").write_text(SERVER)
    (folder / "Dockerfile").write_text(DOCKERFILE)
    try:
        engine.images.get(BASE)
    except docker.errors.ImageNotFound:
        engine.images.pull(BASE)
    name = f"{REGISTRY}/sandbox-tiny"
    label, _, tag = RUN.partition("=")
    built, _ = engine.images.build(path=str(folder), tag=f"{name}:{tag}", forcerm=True, labels={label: tag})
    engine.images.push(name, tag=tag)
    built.reload()
    yield next(d for d in built.attrs["RepoDigests"] if d.startswith(name + "@"))
    for left in engine.containers.list(all=True, filters={"label": RUN}):
        left.remove(force=True)  # by a test that failed
    engine.images.remove(str(built.id), force=True)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def sandbox(engine: docker.DockerClient, image: str, state: Path) -> Iterator[RunningSandbox]:
    """One sandbox with models `tiny`, `exits` and `late`; each test makes its endpoint."""
    with RunningSandbox(runner="docker", state=state) as running:
        upload(running, "tiny", image)
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []
    assert containers(engine) == []  # a stopped sandbox leaves none


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


def containers(engine: docker.DockerClient, where: str = "") -> list[Container]:
    """Containers of this run, or those of an endpoint."""
    found = engine.containers.list(all=True, filters={"label": RUN}, ignore_removed=True)
    return [c for c in found if c.labels[LABEL + "endpoint"].endswith(where)]


def available(sandbox: RunningSandbox, where: str) -> list[int]:
    """Available replicas, by deployed model."""
    deployed = sandbox.do("GET", where).get("deployedModels", [])
    return [d["status"].get("availableReplicaCount", 0) for d in deployed]


def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_the_container_gets_what_its_model_says(
    sandbox: RunningSandbox, engine: docker.DockerClient, image: str
) -> None:
    upload(
        sandbox,
        "spoken",
        image,
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
    assert (env["PLACE"], env["AGAIN"], env["LITERAL"]) == ("spoken/7", "<spoken/7>", "$(PLACE)")
    assert {k: v for k, v in env.items() if k.startswith("AIP_")} == {
        "AIP_ACCELERATOR_TYPE": "",
        "AIP_DEPLOYED_MODEL_ID": "7",
        "AIP_ENDPOINT_ID": "spoken",
        "AIP_FRAMEWORK": "CUSTOM_CONTAINER",
        "AIP_HEALTH_ROUTE": "/ping",
        "AIP_HTTP_PORT": "9001",
        "AIP_MACHINE_TYPE": "n1-standard-2",
        "AIP_MODE": "PREDICTION",
        "AIP_MODE_VERSION": "1.0.0",
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_PROJECT_NUMBER": sandbox.do("GET", where)["name"].split("/")[1],
        "AIP_STORAGE_URI": "gs://b/weights",
    }
    (container,) = containers(engine, where)
    published = container.attrs["NetworkSettings"]["Ports"]["9001/tcp"]
    assert [p["HostIp"] for p in published] == ["127.0.0.1"]  # nobody else reaches it
    undeploy(sandbox, where, 7)
    assert containers(engine, where) == []


def test_replicas_share_the_work_and_change_in_place(sandbox: RunningSandbox, engine: docker.DockerClient) -> None:
    where = endpoint(sandbox, "replicas")
    deploy(sandbox, where, 7, replicas=2)
    first = collections.Counter(predict(sandbox, where)["host"] for _ in range(20))
    assert sorted(first.values()) == [10, 10]
    assert predict(sandbox, where)["argv"] == ["from-the-image"]
    for count in (3, 1):
        resources = {"minReplicaCount": count, "maxReplicaCount": count}
        body = {"deployedModel": {"id": "7", "dedicatedResources": resources}, "updateMask": RESIZE_MASK}
        assert "response" in sandbox.do("POST", f"{where}:mutateDeployedModel", body)
        assert len(containers(engine, where)) == count
    assert predict(sandbox, where)["host"] in first  # one of the first two stayed
    undeploy(sandbox, where, 7)


def test_a_broken_image_fails_and_leaves_nothing(
    sandbox: RunningSandbox, engine: docker.DockerClient, image: str
) -> None:
    upload(sandbox, "exits", image, env={"TINY_EXIT": "1"})
    upload(sandbox, "late", image, env={"TINY_SECONDS": "600"}, deploymentTimeout="2s")
    missing = image.partition("@")[0] + "@sha256:" + "0" * 64
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
        assert len(containers(engine, where)) == 1
        assert predict(sandbox, where)["env"]["AIP_DEPLOYED_MODEL_ID"] == "1"
    undeploy(sandbox, where, 1)


def test_a_cancelled_deployment_leaves_nothing(
    sandbox: RunningSandbox, engine: docker.DockerClient, image: str
) -> None:
    upload(sandbox, "sleepy", image, env={"TINY_SECONDS": "600"})
    where = endpoint(sandbox, "cancelled")
    _, operation = sandbox.ask("POST", f"{where}:deployModel", deployment(7, model="sleepy"))
    until(lambda: containers(engine, where))
    sandbox.do("POST", f"v1/{operation['name']}:cancel")
    assert sandbox.done(operation)["error"]["code"] == 1
    assert containers(engine, where) == []


def test_undeploying_answers_what_is_in_flight(sandbox: RunningSandbox, engine: docker.DockerClient) -> None:
    where = endpoint(sandbox, "flight")
    deploy(sandbox, where, 7)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(predict(sandbox, where, sleep=1.5)))
    thread.start()
    time.sleep(0.5)
    undeploy(sandbox, where, 7)
    thread.join()
    assert answers[0]["env"]["AIP_DEPLOYED_MODEL_ID"] == "7"


def test_a_cancelled_undeployment_leaves_the_model_deployed(
    sandbox: RunningSandbox, engine: docker.DockerClient
) -> None:
    where = endpoint(sandbox, "undecided")
    deploy(sandbox, where, 7)
    thread = threading.Thread(target=lambda: predict(sandbox, where, sleep=1.5))  # keeps it from ending at once
    thread.start()
    time.sleep(0.5)
    _, operation = sandbox.ask("POST", f"{where}:undeployModel", {"deployedModelId": "7"})
    sandbox.do("POST", f"v1/{operation['name']}:cancel")
    assert sandbox.done(operation)["error"]["code"] == 1
    thread.join()
    until(lambda: available(sandbox, where) == [1])
    sandbox.do("PATCH", where, {"trafficSplit": {"7": 100}}, updateMask="trafficSplit")
    assert predict(sandbox, where)["env"]["AIP_DEPLOYED_MODEL_ID"] == "7"
    undeploy(sandbox, where, 7)
    until(lambda: containers(engine, where) == [])


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
    answers: collections.Counter[Any] = collections.Counter()
    stop = threading.Event()

    def load() -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                url = f"{sandbox.url}/v1/{LOCATION}/{where}:predict"
                answer = client.post(url, json={"instances": [1]}, timeout=30)
                answers[answer.status_code, answer.json().get("deployedModelId")] += 1

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    deploy(sandbox, where, 2, split={"0": 0, "1": 100})
    sandbox.do("PATCH", where, {"trafficSplit": {"2": 100}}, updateMask="trafficSplit")
    undeploy(sandbox, where, 1)
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(answers) == {(200, "1"), (200, "2")}
    undeploy(sandbox, where, 2)


def test_predictions_pass_as_they_are(sandbox: RunningSandbox) -> None:
    where = endpoint(sandbox, "raw")
    deploy(sandbox, where, 7)
    url = f"{sandbox.url}/v1/{LOCATION}/{where}"
    raw = httpx.post(f"{url}:rawPredict", content=b"\xff\xd8picture", headers={"content-type": "image/jpeg"})
    assert (raw.content, raw.headers["content-type"]) == (b"erutcip\xd8\xff", "image/jpeg")
    body = {"instances": [1], "parameters": {"status": 422}}
    status, answer = sandbox.ask("POST", f"{where}:predict", body)
    assert (status, json.loads(answer["error"]["message"])) == (422, {"error": "no such picture"})
    raw = httpx.post(f"{url}:rawPredict", json=body)
    assert (raw.status_code, raw.json()) == (422, {"error": "no such picture"})
    undeploy(sandbox, where, 7)


def test_a_container_that_ends_is_replaced(sandbox: RunningSandbox, engine: docker.DockerClient, image: str) -> None:
    probe = {"httpGet": {"path": "/ping"}, "periodSeconds": 1, "failureThreshold": 2}
    upload(sandbox, "mortal", image, healthProbe=probe)
    where = endpoint(sandbox, "mortal")
    deploy(sandbox, where, 7, model="mortal")

    # Sick: out of the traffic, and back when it is well.
    (container,) = containers(engine, where)
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
    assert containers(engine, where) == []


def test_the_image_is_pulled_by_digest(sandbox: RunningSandbox, engine: docker.DockerClient, image: str) -> None:
    where = endpoint(sandbox, "pulled")
    local = engine.images.get(image)
    engine.images.remove(str(local.id), force=True)
    deploy(sandbox, where, 7)
    assert engine.images.get(image).id == local.id
    assert predict(sandbox, where)["argv"] == ["from-the-image"]
    undeploy(sandbox, where, 7)


def test_a_tag_is_the_image_that_it_was_at_upload(
    sandbox: RunningSandbox, engine: docker.DockerClient, image: str
) -> None:
    name = image.partition("@")[0]
    local = engine.images.get(image)
    local.tag(name, "moving")
    engine.images.push(name, tag="moving")
    upload(sandbox, "tagged", f"{name}:moving")
    engine.images.get(BASE).tag(name, "moving")  # and moves
    engine.images.push(name, tag="moving")
    where = endpoint(sandbox, "tagged")
    deploy(sandbox, where, 7, model="tagged")
    (container,) = containers(engine, where)
    assert container.image is not None
    assert container.image.id == local.id
    undeploy(sandbox, where, 7)
    engine.images.remove(f"{name}:moving")


def test_a_killed_sandbox_finds_its_containers_again(
    sandbox: RunningSandbox, engine: docker.DockerClient, image: str
) -> None:
    upload(sandbox, "slow-start", image, env={"TINY_SECONDS": "3"})
    kept, going, gone = (endpoint(sandbox, n) for n in ("kept", "going", "gone"))
    deploy(sandbox, kept, 7, replicas=2)
    deploy(sandbox, gone, 7)
    before = {c.id for c in containers(engine, kept)}
    _, operation = sandbox.ask("POST", f"{going}:deployModel", deployment(7, model="slow-start"))
    until(lambda: containers(engine, going))
    pending = {c.id for c in containers(engine, going)}
    sandbox.kill()
    assert len(containers(engine)) == 4  # SIGKILL: nobody stopped them
    # One of two is lost meanwhile, and one belongs to nothing.
    containers(engine, kept)[0].remove(force=True)
    labels = {**containers(engine, gone)[0].labels, LABEL + "deployed-model": "99"}
    engine.containers.run(image, detach=True, environment={"AIP_HTTP_PORT": "8080"}, labels=labels)
    sandbox.start()
    assert "response" in sandbox.done(operation)
    assert {c.id for c in containers(engine, going)} == pending  # picked up, not started twice

    def settled() -> bool:
        now = [len(containers(engine, e)) for e in (kept, going, gone)]
        return now == [2, 1, 1]

    until(settled)
    assert len(before & {c.id for c in containers(engine, kept)}) == 1
    for where in (kept, going, gone):
        until(lambda where=where: sandbox.ask("POST", f"{where}:predict", {"instances": [1]})[0] == 200)
        undeploy(sandbox, where, 7)
    assert containers(engine) == []


@pytest.mark.parametrize("moment", [0.05, 0.4, 1.0])
def test_a_kill_amid_a_resize_or_an_undeployment_ends_right(
    sandbox: RunningSandbox, engine: docker.DockerClient, moment: float
) -> None:
    where = endpoint(sandbox, f"amid-{moment}".replace(".", "-"))
    deploy(sandbox, where, 7)
    for verb, body, left in (
        ("mutateDeployedModel", {"deployedModel": RESIZED, "updateMask": RESIZE_MASK}, 3),
        ("undeployModel", {"deployedModelId": "7"}, 0),
    ):
        _, operation = sandbox.ask("POST", f"{where}:{verb}", body)
        time.sleep(moment)
        sandbox.kill()
        sandbox.start()
        assert "response" in sandbox.done(operation)
        until(lambda left=left: len(containers(engine, where)) == left)
        until(lambda left=left: available(sandbox, where) == ([left] if left else []))


def test_replicas_that_are_being_brought_back_can_be_undeployed(
    sandbox: RunningSandbox, engine: docker.DockerClient, image: str
) -> None:
    upload(sandbox, "tardy", image, env={"TINY_SECONDS": "2"})
    where = endpoint(sandbox, "tardy")
    deploy(sandbox, where, 7, model="tardy")
    sandbox.kill()
    containers(engine, where)[0].remove(force=True)
    sandbox.start()
    until(lambda: containers(engine, where))
    undeploy(sandbox, where, 7)
    time.sleep(2)  # what brings them back would start another one now
    assert containers(engine, where) == []


def test_a_fresh_start_removes_the_containers_of_before(
    engine: docker.DockerClient, image: str, tmp_path: Path
) -> None:
    with RunningSandbox(runner="docker", state=tmp_path) as killed:
        upload(killed, "tiny", image)
        deploy(killed, endpoint(killed, "before"), 7)
        killed.kill()
    assert len(containers(engine, "before")) == 1
    with RunningSandbox("--fresh", runner="docker", state=tmp_path) as fresh:
        assert fresh.do("GET", "endpoints") == {}
        until(lambda: containers(engine, "before") == [])


def test_a_stop_ends_the_containers_and_a_start_brings_them_back(
    sandbox: RunningSandbox, engine: docker.DockerClient
) -> None:
    where = endpoint(sandbox, "restart")
    deploy(sandbox, where, 7)
    sandbox.stop()
    assert containers(engine) == []
    sandbox.start()
    until(lambda: sandbox.ask("POST", f"{where}:predict", {"instances": [1]})[0] == 200)
    undeploy(sandbox, where, 7)


def test_googles_client_deploys_and_predicts(sandbox: RunningSandbox, engine: docker.DockerClient, image: str) -> None:
    aiplatform.init(
        project="a-project",
        location="europe-west4",
        api_endpoint=sandbox.url,
        api_transport="rest",
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
    )
    model = aiplatform.Model.upload(
        display_name="by-client",
        serving_container_image_uri=image,
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
    assert containers(engine) == []


def test_without_docker_a_deployment_says_what_is_missing(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with RunningSandbox(runner="docker") as sandbox:
        upload(sandbox, "tiny", image.partition("@")[0] + ":latest")  # everything else works
        where = endpoint(sandbox, "none")
        operation = deploy(sandbox, where, 7)
        assert operation["error"]["code"] == 9
        assert "The sandbox needs Docker" in operation["error"]["message"]
        sandbox.do("DELETE", where)
