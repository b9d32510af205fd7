"""The sandbox's endpoints keep Vertex AI's rules for deployed models and traffic."""

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
    options = ("--hold-after-undeploy", "0.5", "--service-account", "known@a-project.iam.gserviceaccount.com")
    with RunningSandbox(*options) as running:
        specs = {
            "counter": SPEC,
            "slow": env(STUB_SECONDS="60"),
            "exits": env(STUB_HEALTH="exit", STUB_LOG="loading\nno weights"),
            "never-ready": {**env(STUB_HEALTH="never", STUB_LOG="still here"), "deploymentTimeout": "0.6s"},
        }
        for name, spec in specs.items():
            body = {"modelId": name, "model": {"displayName": name, "containerSpec": spec}}
            running.do("POST", "models:upload", body)
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []


@pytest.fixture
def endpoint(sandbox: RunningSandbox) -> str:
    """The path of a new endpoint."""
    number = next(_numbers)
    sandbox.do("POST", "endpoints", {"displayName": "people"}, endpointId=number)
    return f"endpoints/{number}"


def deployment(number: int, model: str = MODEL, replicas: int = 1, split: Any = None, **more: Any) -> dict[str, Any]:
    resources = {"minReplicaCount": replicas, "machineSpec": {"machineType": "c3-highcpu-4"}}
    deployed = {"id": str(number), "model": model, "dedicatedResources": resources, **more}
    return {"deployedModel": deployed, "trafficSplit": split or {}}


def deploy(sandbox: RunningSandbox, endpoint: str, *args: Any, **more: Any) -> Any:
    return sandbox.do("POST", f"{endpoint}:deployModel", deployment(*args, **more))


def refusal(answer: tuple[int, Any]) -> tuple[int, str]:
    status, body = answer
    assert body["error"]["code"] == status
    return status, body["error"]["status"]


def test_deploying_moves_traffic_as_told(sandbox: RunningSandbox, endpoint: str) -> None:
    first = deploy(sandbox, endpoint, 7, split={"0": 100}, replicas=2)["response"]["deployedModel"]
    assert (first["id"], first["modelVersionId"], first["displayName"]) == ("7", "1", "counter")
    deploy(sandbox, endpoint, 8)  # without a split the traffic stays
    read = sandbox.do("GET", endpoint)
    assert read["trafficSplit"] == {"7": 100}
    assert {d["id"]: d["status"]["availableReplicaCount"] for d in read["deployedModels"]} == {"7": 2, "8": 1}
    assert all("/models/counter" in d["model"] for d in read["deployedModels"])
    deploy(sandbox, endpoint, 9, split={"0": 10, "7": 90})
    assert sandbox.do("GET", endpoint)["trafficSplit"] == {"9": 10, "7": 90}


def test_an_id_is_made_where_none_is_given(sandbox: RunningSandbox, endpoint: str) -> None:
    body = deployment(1, split={"0": 100})
    del body["deployedModel"]["id"]
    made = sandbox.do("POST", f"{endpoint}:deployModel", body)["response"]["deployedModel"]["id"]
    assert made.isdigit()
    assert 1 <= len(made) <= 10
    assert sandbox.do("GET", endpoint)["trafficSplit"] == {made: 100}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"id": "x1"}, (400, "INVALID_ARGUMENT")),
        ({"id": "12345678901"}, (400, "INVALID_ARGUMENT")),
        ({"id": "0"}, (400, "INVALID_ARGUMENT")),
        ({"model": f"{LOCATION}/models/nobody"}, (404, "NOT_FOUND")),
        ({"dedicatedResources": {"minReplicaCount": 0}}, (400, "INVALID_ARGUMENT")),
        ({"dedicatedResources": {"minReplicaCount": 3, "maxReplicaCount": 2}}, (400, "INVALID_ARGUMENT")),
        ({"dedicatedResources": None}, (400, "INVALID_ARGUMENT")),
        ({"automaticResources": {"minReplicaCount": 1}}, (501, "UNIMPLEMENTED")),
        ({"serviceAccount": "stranger@a-project.iam.gserviceaccount.com"}, (400, "INVALID_ARGUMENT")),
    ],
)
def test_wrong_deployments_are_refused(
    sandbox: RunningSandbox, endpoint: str, change: Any, status: tuple[int, str]
) -> None:
    body = deployment(7)
    body["deployedModel"] |= change
    assert refusal(sandbox.ask("POST", f"{endpoint}:deployModel", body)) == status
    assert "deployedModels" not in sandbox.do("GET", endpoint)


def test_a_known_service_account_may_be_used(sandbox: RunningSandbox, endpoint: str) -> None:
    deploy(sandbox, endpoint, 7, serviceAccount="known@a-project.iam.gserviceaccount.com")


def test_a_deployed_id_is_taken(sandbox: RunningSandbox, endpoint: str) -> None:
    deploy(sandbox, endpoint, 7)
    answer = sandbox.ask("POST", f"{endpoint}:deployModel", deployment(7))
    assert refusal(answer) == (409, "ALREADY_EXISTS")


@pytest.mark.parametrize("split", [{"7": 99}, {"7": 50, "8": 60}, {"7": 50, "5": 50}, {"7": 150, "8": -50}])
def test_traffic_sums_to_100_over_deployed_models(sandbox: RunningSandbox, endpoint: str, split: Any) -> None:
    deploy(sandbox, endpoint, 7, split={"0": 100})
    deploy(sandbox, endpoint, 8)
    body = {"trafficSplit": split}
    assert refusal(sandbox.ask("PATCH", endpoint, body, updateMask="trafficSplit")) == (
        400,
        "INVALID_ARGUMENT",
    )
    wrong = deployment(9, split={**split, "0": 0})
    assert refusal(sandbox.ask("POST", f"{endpoint}:deployModel", wrong)) == (400, "INVALID_ARGUMENT")
    assert sandbox.do("GET", endpoint)["trafficSplit"] == {"7": 100}


def test_traffic_is_patched_and_emptied(sandbox: RunningSandbox, endpoint: str) -> None:
    deploy(sandbox, endpoint, 7, split={"0": 100})
    deploy(sandbox, endpoint, 8)
    split = {"7": 25, "8": 75}
    assert sandbox.do("PATCH", endpoint, {"trafficSplit": split}, updateMask="traffic_split")["trafficSplit"] == split
    assert "trafficSplit" not in sandbox.do("PATCH", endpoint, {}, updateMask="trafficSplit")


def test_undeploying_needs_the_traffic_elsewhere(sandbox: RunningSandbox, endpoint: str) -> None:
    deploy(sandbox, endpoint, 7, split={"0": 100})
    deploy(sandbox, endpoint, 8)
    undeploy = f"{endpoint}:undeployModel"
    assert refusal(sandbox.ask("POST", undeploy, {"deployedModelId": "7"})) == (400, "FAILED_PRECONDITION")
    assert refusal(sandbox.ask("POST", undeploy, {"deployedModelId": "6"})) == (404, "NOT_FOUND")
    sandbox.do("POST", undeploy, {"deployedModelId": "7", "trafficSplit": {"8": 100}})
    assert sandbox.do("GET", endpoint)["trafficSplit"] == {"8": 100}
    sandbox.do("POST", undeploy, {"deployedModelId": "8"})  # the last may go with its traffic
    assert not {"trafficSplit", "deployedModels"} & set(sandbox.do("GET", endpoint))


def test_replicas_change_in_place_and_nothing_else(sandbox: RunningSandbox, endpoint: str) -> None:
    deploy(sandbox, endpoint, 7, split={"0": 100})

    def mutate(mask: str, **resources: Any) -> tuple[int, Any]:
        deployed = {"id": "7", "dedicatedResources": resources}
        return sandbox.ask("POST", f"{endpoint}:mutateDeployedModel", {"deployedModel": deployed, "updateMask": mask})

    paths = "dedicated_resources.min_replica_count,dedicatedResources.maxReplicaCount"
    for count in (3, 1):
        status, operation = mutate(paths, minReplicaCount=count, maxReplicaCount=4)
        assert status == 200
        assert "response" in sandbox.done(operation)
        (read,) = sandbox.do("GET", endpoint)["deployedModels"]
        assert read["dedicatedResources"]["minReplicaCount"] == count
        assert read["dedicatedResources"]["maxReplicaCount"] == 4
        assert read["status"]["availableReplicaCount"] == count
    refused = mutate("dedicatedResources.machineSpec", machineSpec={"machineType": "n1-standard-4"})
    assert refusal(refused) == (400, "INVALID_ARGUMENT")
    assert refusal(mutate("dedicatedResources.minReplicaCount", minReplicaCount=0)) == (
        400,
        "INVALID_ARGUMENT",
    )


def test_one_mutation_of_an_endpoint_at_a_time(sandbox: RunningSandbox, endpoint: str) -> None:
    slow = deployment(7, model=f"{LOCATION}/models/slow")
    _, operation = sandbox.ask("POST", f"{endpoint}:deployModel", slow)
    assert "deployedModels" not in sandbox.do("GET", endpoint)  # not there before it is done
    pending = sandbox.do("GET", f"{endpoint}/operations", filter="done=false")["operations"]
    assert [o["name"] for o in pending] == [operation["name"]]
    second = sandbox.ask("POST", f"{endpoint}:deployModel", deployment(8))
    assert refusal(second) == (400, "FAILED_PRECONDITION")
    assert operation["name"].rpartition("/")[2] in second[1]["error"]["message"]
    patch = sandbox.ask("PATCH", endpoint, {"description": "x"}, updateMask="description")
    assert refusal(patch) == (400, "FAILED_PRECONDITION")
    assert refusal(sandbox.ask("DELETE", endpoint)) == (400, "FAILED_PRECONDITION")
    assert refusal(sandbox.ask("DELETE", "models/slow")) == (400, "FAILED_PRECONDITION")  # being deployed
    sandbox.do("POST", f"v1/{operation['name']}:cancel")
    assert sandbox.done(operation)["error"]["code"] == 1  # CANCELLED
    deploy(sandbox, endpoint, 7)  # and nothing is left of it


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            "exits",
            "Model server exited unexpectedly (exit status 1). Last log lines of the container:\nloading\nno weights",
        ),
        ("never-ready", "Model server never became ready"),
    ],
)
def test_a_container_that_fails_fails_the_deployment(
    sandbox: RunningSandbox, endpoint: str, model: str, says: str
) -> None:
    deploy(sandbox, endpoint, 6, split={"0": 100})
    operation = deploy(sandbox, endpoint, 7, model=f"{LOCATION}/models/{model}", split={"0": 100}, replicas=2)
    assert operation["error"]["code"] == 9  # FAILED_PRECONDITION
    assert says in operation["error"]["message"]
    assert operation["metadata"]["deploymentStage"] == "FAILED_TO_DEPLOY"
    read = sandbox.do("GET", endpoint)
    assert [d["id"] for d in read["deployedModels"]] == ["6"]
    assert read["trafficSplit"] == {"6": 100}


def test_what_is_deployed_is_not_deleted(sandbox: RunningSandbox, endpoint: str) -> None:
    parent = f"{LOCATION}/models/counter"
    body = {"parentModel": parent, "model": {"displayName": "counter", "containerSpec": SPEC}}
    version = sandbox.do("POST", "models:upload", body)["response"]["modelVersionId"]
    deploy(sandbox, endpoint, 7, model=f"{MODEL}@{version}")
    (ref,) = sandbox.do("GET", f"models/counter@{version}")["deployedModels"]
    assert ref["deployedModelId"] == "7"
    delete_version = ("DELETE", f"models/counter@{version}:deleteVersion")
    for request in (("DELETE", endpoint), delete_version, ("DELETE", "models/counter")):
        assert refusal(sandbox.ask(*request)) == (400, "FAILED_PRECONDITION")
    sandbox.do("POST", f"{endpoint}:undeployModel", {"deployedModelId": "7"})
    assert refusal(sandbox.ask(*delete_version)) == (400, "FAILED_PRECONDITION")  # held for a while
    sandbox.do("DELETE", endpoint)
    while sandbox.ask(*delete_version)[0] != 200:
        pass
    assert refusal(sandbox.ask("GET", endpoint)) == (404, "NOT_FOUND")


@pytest.mark.parametrize("wrong", ["0123", "1234567890", "Upper", "ends-", "a" * 64])
def test_endpoint_ids_follow_the_pattern(sandbox: RunningSandbox, wrong: str) -> None:
    answer = sandbox.ask("POST", "endpoints", {"displayName": "e"}, endpointId=wrong)
    assert refusal(answer) == (400, "INVALID_ARGUMENT")


def test_a_dedicated_endpoint_has_an_address(sandbox: RunningSandbox) -> None:
    body = {"displayName": "own", "dedicatedEndpointEnabled": True}
    made = sandbox.do("POST", "endpoints", body, endpointId="own")["response"]
    assert made["dedicatedEndpointDns"] == f"127.0.0.1:{sandbox.port}"


def test_history_shows_every_state_of_the_traffic(sandbox: RunningSandbox, endpoint: str) -> None:
    deploy(sandbox, endpoint, 7, split={"0": 100})
    deploy(sandbox, endpoint, 8, split={"0": 10, "7": 90})
    sandbox.do("POST", f"{endpoint}:undeployModel", {"deployedModelId": "7", "trafficSplit": {"8": 100}})
    seen = [
        (h["event"], h["trafficSplit"], h["available"])
        for h in sandbox.history()
        if h["endpoint"].endswith(f"/{endpoint}") and h["event"] != "replicas"
    ]
    assert seen == [
        ("created", {}, {}),
        ("deployed", {"7": 100}, {"7": 1}),
        ("deployed", {"8": 10, "7": 90}, {"7": 1, "8": 1}),
        ("undeploying", {"8": 100}, {"7": 1, "8": 1}),
        ("undeployed", {"8": 100}, {"8": 1}),
    ]


def test_v1beta1_speaks_of_the_same_resources(sandbox: RunningSandbox, endpoint: str) -> None:
    beta = f"v1beta1/{LOCATION}"
    body = deployment(7, split={"0": 100}, enableContainerLogging=True)
    status, operation = sandbox.ask("POST", f"{beta}/{endpoint}:deployModel", body)
    assert (status, operation["metadata"]["@type"].split(".")[-2]) == (200, "v1beta1")
    operation = sandbox.done(operation)  # asked under v1
    assert operation["response"]["@type"] == "type.googleapis.com/google.cloud.aiplatform.v1.DeployModelResponse"
    assert sandbox.do("GET", f"{beta}/{endpoint}")["trafficSplit"] == {"7": 100}
