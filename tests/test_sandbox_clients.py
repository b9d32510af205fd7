"""Google's own high-level client, unchanged, against the sandbox (stub containers)."""

import pytest
from google.api_core.exceptions import BadRequest, Conflict
from google.cloud import aiplatform
from google_clients import anonymous

from sandbox.testing import RunningSandbox

IMAGE = "europe-west4-docker.pkg.dev/a-project/images/people@sha256:" + "0" * 64


@pytest.fixture(autouse=True)
def _client(stub_sandbox: RunningSandbox, project: str) -> None:
    aiplatform.init(
        project=project,
        location="europe-west4",
        api_endpoint=stub_sandbox.url,
        api_transport="rest",
        credentials=anonymous(),
    )


def upload(**options: object) -> aiplatform.Model:
    model: aiplatform.Model = aiplatform.Model.upload(
        serving_container_image_uri=IMAGE,
        serving_container_predict_route="/predictions/people",
        serving_container_health_route="/ping",
        serving_container_ports=[8080],
        serving_container_args=["--port=$(AIP_HTTP_PORT)"],
        serving_container_environment_variables={"WORKERS": "1"},
        serving_container_shared_memory_size_mb=256,
        serving_container_deployment_timeout=600,
        serving_container_startup_probe_exec=["true"],
        serving_container_startup_probe_period_seconds=1,
        **options,
    )
    return model


def test_the_life_of_a_model() -> None:
    model = upload(model_id="people", display_name="people", labels={"team": "a"}, version_aliases=["blue"])
    assert sorted(model.version_aliases) == ["blue", "default"]
    assert model.gca_resource.container_spec.shared_memory_size_mb == 256
    second = upload(parent_model=model.resource_name, display_name="people", is_default_version=True)
    assert second.versioned_resource_name.endswith("/models/people@2")
    assert [v.version_id for v in model.versioning_registry.list_versions()] == ["1", "2"]

    endpoint = aiplatform.Endpoint.create(display_name="people", labels={"stack": "test"})
    model.deploy(endpoint, machine_type="n1-standard-4", traffic_percentage=100)
    endpoint.deploy(
        second,
        machine_type="n1-standard-4",
        min_replica_count=2,
        max_replica_count=3,
        accelerator_type="NVIDIA_TESLA_T4",
        accelerator_count=1,
        traffic_percentage=10,
        autoscaling_target_cpu_utilization=70,
    )
    old, new = (next(d for d in endpoint.list_models() if d.model_version_id == v) for v in ("1", "2"))
    assert endpoint.traffic_split == {old.id: 90, new.id: 10}
    assert new.dedicated_resources.machine_spec.accelerator_type == aiplatform.gapic.AcceleratorType.NVIDIA_TESLA_T4

    answer = endpoint.predict(instances=[{"image": {"b64": ""}}, {"image": {"b64": ""}}], parameters={"a": 1})
    assert [p["imageUri"] for p in answer.predictions] == [IMAGE, IMAGE]
    assert answer.deployed_model_id in (old.id, new.id)

    endpoint.update(display_name="crowd", traffic_split={old.id: 50, new.id: 50})
    assert [e.name for e in aiplatform.Endpoint.list(filter='display_name="crowd"')] == [endpoint.name]
    model.versioning_registry.add_version_aliases(["old"], "1")
    model.update(description="counts people", labels={"team": "b"})
    assert aiplatform.Model("people@old").description == "counts people"

    endpoint.undeploy_all()
    assert endpoint.list_models() == []
    model.versioning_registry.delete_version("1")
    endpoint.delete()
    second.delete()
    assert aiplatform.Model.list() == []
    assert aiplatform.Endpoint.list() == []


def test_errors_reach_the_client_as_its_exceptions(stub_sandbox: RunningSandbox, project: str) -> None:
    upload(model_id="people", display_name="people")
    with pytest.raises(Conflict, match="already exists"):
        upload(model_id="people", display_name="people")
    endpoint = aiplatform.Endpoint.create(display_name="people")
    with pytest.raises(BadRequest, match="doesn't have traffic_split"):
        endpoint.predict(instances=[1])
    fault = {"status": "RESOURCE_EXHAUSTED", "message": "no quota", "match": project}
    stub_sandbox.fault("endpoints.deployModel", "operation_error", **fault)
    with pytest.raises(Exception, match="no quota"):
        aiplatform.Model("people").deploy(endpoint, machine_type="n1-standard-4")
