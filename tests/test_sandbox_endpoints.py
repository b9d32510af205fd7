"""The sandbox's endpoints keep Vertex AI's rules for deployed models and traffic."""

from collections.abc import Iterator
from typing import Any

import pytest
from sandbox_with_models import MODEL, SPEC, deploy, deployment, make_endpoint, sandbox, upload_models

from sandbox.serving import serving
from sandbox.testing import LOCATION, RunningSandbox
from sandbox.vertex_endpoints import SUPPOSITIONS

__all__ = ["sandbox"]  # a fixture


@pytest.fixture(scope="module")
def otherwise() -> Iterator[RunningSandbox]:
    """A sandbox that behaves the other way wherever Vertex AI's own behaviour is not known."""
    with RunningSandbox(*(option for name in SUPPOSITIONS for option in ("--suppose", name))) as running:
        upload_models(running)
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []


@pytest.fixture
def endpoint(sandbox: RunningSandbox) -> str:
    return make_endpoint(sandbox)


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


def test_the_first_model_gets_all_traffic_where_no_split_is_given(sandbox: RunningSandbox, endpoint: str) -> None:
    deploy(sandbox, endpoint, 7)
    deploy(sandbox, endpoint, 8)
    assert sandbox.do("GET", endpoint)["trafficSplit"] == {"7": 100}


def test_what_is_not_known_of_vertex_ai_can_be_supposed_otherwise(otherwise: RunningSandbox) -> None:
    endpoint = make_endpoint(otherwise, dedicatedEndpointEnabled=True)
    without_id = deployment(7)
    del without_id["deployedModel"]["id"]
    for refused in (deployment(7, split={"0": 100}), without_id):  # an id of one's own; no split on an empty endpoint
        assert refusal(otherwise.ask("POST", f"{endpoint}:deployModel", refused)) == (400, "INVALID_ARGUMENT")
    first = otherwise.do("POST", f"{endpoint}:deployModel", without_id | {"trafficSplit": {"0": 100}})
    otherwise.fault("endpoints.deployModel", "hold", count=2)
    running = [otherwise.ask("POST", f"{endpoint}:deployModel", without_id) for _ in range(2)]
    assert [status for status, _ in running] == [200, 200]  # at the same time
    otherwise.release()
    for _, operation in running:
        assert "response" in otherwise.done(operation)
    read = otherwise.do("GET", endpoint)
    assert read["trafficSplit"] == {first["response"]["deployedModel"]["id"]: 100}
    assert read["dedicatedEndpointDns"] == f"https://127.0.0.1:{otherwise.port}"
    assert {d["model"].rpartition("/")[2] for d in read["deployedModels"]} == {"counter@1"}
    assert not any("status" in d for d in read["deployedModels"])
    (target,) = read["deployedModels"][0]["dedicatedResources"]["autoscalingMetricSpecs"]
    assert (target["metricName"].rpartition("/")[2], target["target"]) == ("utilization", 60)


def test_a_first_deployment_may_also_get_no_traffic() -> None:
    with RunningSandbox("--suppose", "no-first-traffic") as sandbox:
        upload_models(sandbox)
        endpoint = make_endpoint(sandbox)
        deploy(sandbox, endpoint, 7)
        assert "trafficSplit" not in sandbox.do("GET", endpoint)


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


def test_an_unknown_id_in_a_split_is_named(sandbox: RunningSandbox, endpoint: str) -> None:
    deploy(sandbox, endpoint, 7)
    _, answer = sandbox.ask("PATCH", endpoint, {"trafficSplit": {"7": 50, "0": 50}}, updateMask="trafficSplit")
    assert answer["error"]["message"] == "The following DeployedModel ID(s) [0] do not exist."


TARGETS = [("cpu/utilization", 100, 101), ("request_count", 600, 0)]


@pytest.mark.parametrize(("metric", "good", "bad"), TARGETS)
def test_autoscaling_targets_are_percentages_of_use_or_requests_a_minute(
    sandbox: RunningSandbox, endpoint: str, metric: str, good: int, bad: int
) -> None:
    def body(target: int) -> Any:
        wanted = deployment(7)
        spec = {"metricName": f"aiplatform.googleapis.com/prediction/online/{metric}", "target": target}
        wanted["deployedModel"]["dedicatedResources"]["autoscalingMetricSpecs"] = [spec]
        return wanted

    assert refusal(sandbox.ask("POST", f"{endpoint}:deployModel", body(bad))) == (400, "INVALID_ARGUMENT")
    sandbox.do("POST", f"{endpoint}:deployModel", body(good))
    (read,) = sandbox.do("GET", endpoint)["deployedModels"]
    assert read["dedicatedResources"]["autoscalingMetricSpecs"][0]["target"] == good


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


def test_a_running_deployment_is_seen_and_can_not_be_stopped(sandbox: RunningSandbox, endpoint: str) -> None:
    sandbox.fault("endpoints.deployModel", "hold")
    _, operation = sandbox.ask("POST", f"{endpoint}:deployModel", deployment(7, model=f"{LOCATION}/models/starting"))
    assert "deployedModels" not in sandbox.do("GET", endpoint)  # not there before it is done
    (seen,) = sandbox.do("GET", endpoint, allDeploymentStates="true")["deployedModels"]
    assert (seen["id"], seen["state"]) == ("7", "BEING_DEPLOYED")
    pending = sandbox.do("GET", f"{endpoint}/operations", filter="done=false")["operations"]
    assert [o["name"] for o in pending] == [operation["name"]]
    second = sandbox.ask("POST", f"{endpoint}:deployModel", deployment(8))
    assert refusal(second) == (400, "FAILED_PRECONDITION")
    assert operation["name"].rpartition("/")[2] in second[1]["error"]["message"]
    patch = sandbox.ask("PATCH", endpoint, {"description": "x"}, updateMask="description")
    assert refusal(patch) == (400, "FAILED_PRECONDITION")
    assert refusal(sandbox.ask("DELETE", endpoint)) == (400, "FAILED_PRECONDITION")
    assert refusal(sandbox.ask("DELETE", "models/starting")) == (400, "FAILED_PRECONDITION")  # being deployed
    cancelled = sandbox.ask("POST", f"v1/{operation['name']}:cancel")
    assert refusal(cancelled) == (400, "FAILED_PRECONDITION")
    assert cancelled[1]["error"]["message"].endswith("is not cancellable.")
    undeployed = sandbox.ask("POST", f"{endpoint}:undeployModel", {"deployedModelId": "7"})
    assert refusal(undeployed) == (400, "FAILED_PRECONDITION")
    assert "remains involved in the rolling update" in undeployed[1]["error"]["message"]
    sandbox.release()
    assert "response" in sandbox.done(operation)
    sandbox.do("POST", f"{endpoint}:undeployModel", {"deployedModelId": "7"})


def test_an_upload_can_be_cancelled(sandbox: RunningSandbox) -> None:
    sandbox.fault("models.upload", "hold")
    body = {"modelId": "cancelled", "model": {"displayName": "m", "containerSpec": SPEC}}
    _, operation = sandbox.ask("POST", "models:upload", body)
    sandbox.do("POST", f"v1/{operation['name']}:cancel")
    assert sandbox.done(operation)["error"]["code"] == 1  # CANCELLED
    assert sandbox.ask("GET", "models/cancelled")[0] == 404


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
    sandbox.do(*delete_version)
    sandbox.do("DELETE", endpoint)
    assert refusal(sandbox.ask("GET", endpoint)) == (404, "NOT_FOUND")


def test_a_version_is_held_for_a_while_after_its_undeployment() -> None:
    with RunningSandbox("--hold-after-undeploy", "3600") as sandbox:
        upload_models(sandbox)
        endpoint = make_endpoint(sandbox)
        deploy(sandbox, endpoint, 7)
        sandbox.do("POST", f"{endpoint}:undeployModel", {"deployedModelId": "7"})
        status, answer = sandbox.ask("DELETE", "models/counter")
        assert (status, answer["error"]["status"]) == (400, "FAILED_PRECONDITION")
        assert "deployed at the following Endpoint(s)" in answer["error"]["message"]


def test_deleting_a_model_is_an_operation_of_the_model(sandbox: RunningSandbox) -> None:
    body = {"modelId": "short-lived", "model": {"displayName": "m", "containerSpec": SPEC}}
    sandbox.do("POST", "models:upload", body)
    assert "/models/short-lived/operations/" in sandbox.do("DELETE", "models/short-lived")["name"]


@pytest.mark.parametrize("wrong", ["0123", "1234567890", "Upper", "ends-", "a" * 64])
def test_endpoint_ids_follow_the_pattern(sandbox: RunningSandbox, wrong: str) -> None:
    answer = sandbox.ask("POST", "endpoints", {"displayName": "e"}, endpointId=wrong)
    assert refusal(answer) == (400, "INVALID_ARGUMENT")


def test_a_dedicated_endpoint_has_an_address_once_something_was_deployed(sandbox: RunningSandbox) -> None:
    endpoint = make_endpoint(sandbox, dedicatedEndpointEnabled=True)
    deploy(sandbox, endpoint, 6, model=f"{LOCATION}/models/exits")
    assert "dedicatedEndpointDns" not in sandbox.do("GET", endpoint)
    deploy(sandbox, endpoint, 7)
    sandbox.do("POST", f"{endpoint}:undeployModel", {"deployedModelId": "7"})
    assert sandbox.do("GET", endpoint)["dedicatedEndpointDns"] == f"127.0.0.1:{sandbox.port}"


def test_a_container_learns_who_it_is() -> None:
    version = {"resource": {"containerSpec": SPEC}, "image": "i"}
    resources = {"minReplicaCount": 1, "machineSpec": {"machineType": "n1-standard-2"}}
    for endpoint, number in (("people", None), ("123", "123")):
        deployed = {"id": "7", "dedicatedResources": resources}
        env = serving("state", f"{LOCATION}/endpoints/{endpoint}", deployed, f"{MODEL}@1", version).launch.env
        assert env["AIP_ENDPOINT_ID"].isdigit()  # also of an endpoint with a name
        assert number in (None, env["AIP_ENDPOINT_ID"])
        assert (env["AIP_MODEL_NAME"], env["AIP_VERSION_NAME"]) == (env["AIP_ENDPOINT_ID"], "7")


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
