"""The sandbox scales models to zero under Vertex AI's conditions."""

from typing import Any

from helpers import eventually
from sandbox_with_models import MODEL, deployment, make_endpoint, sandbox

from sandbox.testing import LOCATION, RunningSandbox

__all__ = ["sandbox"]  # a fixture


def sleepy(number: int = 7, model: str = MODEL, **more: Any) -> dict[str, Any]:
    """A deployment that scales to zero."""
    body = deployment(number, model)
    body["deployedModel"]["dedicatedResources"] |= {"minReplicaCount": 0, "maxReplicaCount": 2, **more}
    return body


def test_scale_to_zero_has_its_conditions(sandbox: RunningSandbox) -> None:
    own, shared = make_endpoint(sandbox, dedicatedEndpointEnabled=True), make_endpoint(sandbox)

    def refused(path: str, body: Any, version: str = "v1beta1") -> str:
        status, answer = sandbox.ask("POST", f"{version}/{LOCATION}/{path}:deployModel", body)
        assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT")
        return str(answer["error"]["message"])

    assert "greater than or equal to 1" in refused(own, sleepy(), "v1")
    assert "shared public endpoints" in refused(shared, sleepy())
    assert "between 300 and 28800" in refused(own, sleepy(scaleToZeroSpec={"idleScaledownPeriod": "299s"}))
    assert "initial_replica_count" in refused(own, sleepy(initialReplicaCount=3))
    assert "needs a min_replica_count of 0" in refused(
        own, sleepy(minReplicaCount=1, scaleToZeroSpec={"idleScaledownPeriod": "300s"})
    )
    sandbox.do("POST", f"v1beta1/{LOCATION}/{own}:deployModel", sleepy())
    assert "one model per endpoint" in refused(own, deployment(8), "v1")


def test_an_idle_model_scales_to_zero_and_comes_back_when_it_is_asked(sandbox: RunningSandbox) -> None:
    endpoint = make_endpoint(sandbox, dedicatedEndpointEnabled=True)
    body = sleepy(model=f"{LOCATION}/models/starting", scaleToZeroSpec={"minScaleupPeriod": "300s"})
    sandbox.do("POST", f"v1beta1/{LOCATION}/{endpoint}:deployModel", body)

    def read(version: str) -> Any:
        (deployed,) = sandbox.do("GET", f"{version}/{LOCATION}/{endpoint}")["deployedModels"]
        return deployed

    def asked() -> tuple[int, Any]:
        return sandbox.ask("POST", f"{endpoint}:predict", {"instances": [1]})

    def available() -> int:
        return int(read("v1")["status"].get("availableReplicaCount", 0))

    assert eventually(lambda: available() == 0)
    # v1 does not show fields that it lacks, and leaves out a count of zero.
    assert set(read("v1")["dedicatedResources"]) == {"maxReplicaCount", "machineSpec"}
    assert read("v1beta1")["dedicatedResources"]["scaleToZeroSpec"] == {
        "minScaleupPeriod": "300s",
        "idleScaledownPeriod": "3600s",
    }
    status, cold = asked()
    assert (status, cold["error"]["status"]) == (429, "RESOURCE_EXHAUSTED")
    assert cold["error"]["message"].startswith("Model is not yet ready for inference.")
    assert asked()[0] == 429  # it is starting
    assert eventually(lambda: asked()[0] == 200)
    assert eventually(lambda: available() == 0)
    # In place: never to zero again.
    mask = "dedicatedResources.minReplicaCount,dedicatedResources.scaleToZeroSpec"
    change = {"deployedModel": {"id": "7", "dedicatedResources": {"minReplicaCount": 1}}, "updateMask": mask}
    sandbox.do("POST", f"v1beta1/{LOCATION}/{endpoint}:mutateDeployedModel", change)
    assert asked()[0] == 200
    assert "scaleToZeroSpec" not in read("v1beta1")["dedicatedResources"]
