"""The provider as a process, spoken to over gRPC as the engine does, against the sandbox's Vertex AI."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import grpc
import pytest
from google.cloud import aiplatform_v1
from google.protobuf import empty_pb2
from pulumi.runtime import rpc
from pulumi.runtime.proto import provider_pb2
from vertex_harness import (
    IMAGE,
    OTHER_IMAGE,
    PARENT,
    ROLLOUT_URN,
    VERSION_URN,
    CallFailed,
    Cloud,
    Plugin,
    Proxy,
    Stack,
    cloud,
    in_background,
    plugin,
    release,
    rollout_inputs,
    struct,
    unstruct,
    version_inputs,
)

from pulumi_vertex.plan import Spec, deployed_id
from sandbox.testing import RunningSandbox

__all__ = ["cloud", "plugin"]  # fixtures

pytestmark = pytest.mark.timeout(180)
UNKNOWN = rpc.UNKNOWN
names = (f"m{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox() as running:
        yield running
        assert running.violations() == []  # everything sent and answered fits Google's discovery documents


@pytest.fixture(autouse=True)
def _clean(sandbox: RunningSandbox) -> Iterator[None]:
    yield
    sandbox.clear_faults()


@pytest.fixture
def later(sandbox: RunningSandbox) -> Iterator[Plugin]:
    """The provider of a later `pulumi` command: a process of its own."""
    with Plugin(sandbox.url) as running:
        yield running


@pytest.fixture
def model() -> str:
    return next(names)


@pytest.fixture
def endpoint(cloud: Cloud, model: str) -> str:
    return cloud.endpoint(f"e-{model}")


@pytest.fixture
def old(plugin: Plugin, model: str) -> Stack:
    version = Stack(VERSION_URN + "old")
    version.up(plugin, version_inputs(model))
    return version


@pytest.fixture
def new(plugin: Plugin, model: str, old: Stack) -> Stack:
    version = Stack(VERSION_URN + "new")
    version.up(plugin, version_inputs(model, OTHER_IMAGE))
    return version


@pytest.fixture
def served(plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack) -> Iterator[Stack]:
    """A rollout that serves the old version; afterwards its history is looked through."""
    rollout = Stack(f"{ROLLOUT_URN}-{endpoint}")
    rollout.up(plugin, rollout_inputs(endpoint, main=release(old.id)))
    yield rollout
    cloud.check_history(endpoint)


# --- start, schema, configuration ---------------------------------------------------------------------------


def test_the_first_answer_comes_within_one_and_a_half_seconds() -> None:
    def seconds() -> float:
        begun = time.monotonic()
        with Plugin("", configure=False) as plugin:
            plugin.call("GetPluginInfo", empty_pb2.Empty())
            return time.monotonic() - begun

    best = min(seconds() for _ in range(5))
    print(f"plugin start to first answer: {best:.2f} s")
    assert best < 1.5


def test_the_schema_is_complete(plugin: Plugin) -> None:
    schema = json.loads(plugin.call("GetSchema", provider_pb2.GetSchemaRequest()).schema)
    assert set(schema["resources"]) == {"vertex:index:ModelVersion", "vertex:index:Rollout"}
    assert set(schema["types"]) == {"vertex:index:Deployed", "vertex:index:Probe"}
    assert schema["config"]["variables"]["accessToken"]["secret"] is True

    def walk(value: object) -> Iterator[dict[str, object]]:
        if isinstance(value, dict):
            yield value
            for item in value.values():
                yield from walk(item)

    for part in walk(schema):
        if "$ref" in part:
            assert str(part["$ref"]).removeprefix("#/types/") in schema["types"]
        for key in ("properties", "inputProperties"):
            for name, prop in part.get(key, {}).items():  # type: ignore[attr-defined]
                assert len(prop["description"]) > 15, name
    for resource in schema["resources"].values():
        assert set(resource["requiredInputs"]) <= set(resource["inputProperties"])
        assert set(resource["inputProperties"]) < set(resource["properties"])
        assert resource["description"]
    deployed = schema["types"]["vertex:index:Deployed"]
    assert deployed["required"] == ["model", "traffic", "machineType"]
    assert deployed["properties"]["minReplicas"]["type"] == "integer"
    version = schema["resources"]["vertex:index:ModelVersion"]
    assert version["inputProperties"]["image"]["willReplaceOnChanges"]


def test_a_provider_without_a_project_says_how_to_set_one() -> None:
    with Plugin("", configure=False) as plugin, pytest.raises(CallFailed) as failed:
        plugin.call("Configure", provider_pb2.ConfigureRequest(args=struct({"location": "europe-west4"})))
    assert "pulumi config set vertex:project" in str(failed.value)


@pytest.mark.parametrize(
    ("settings", "property_"),
    [
        ({"endpoint": "http://example.com"}, "endpoint"),
        ({"endpoint": "127.0.0.1:80"}, "endpoint"),
        ({"location": "Europe"}, "location"),
        ({"impersonateServiceAccount": "me"}, "impersonateServiceAccount"),
        ({"token": "x"}, "token"),
    ],
)
def test_a_wrong_setting_is_named(plugin: Plugin, settings: dict[str, str], property_: str) -> None:
    answer = plugin.call("CheckConfig", provider_pb2.CheckRequest(urn="", news=struct(settings)))
    assert [failure.property for failure in answer.failures] == [property_]


def test_another_project_replaces_and_another_token_does_not(plugin: Plugin) -> None:
    def replaces(**new: str) -> list[str]:
        olds = struct({"project": "a", "accessToken": "x"})
        request = provider_pb2.DiffRequest(old_inputs=olds, news=struct({"project": "a", "accessToken": "x", **new}))
        return list(plugin.call("DiffConfig", request).replaces)

    assert replaces(project="b") == ["project"]
    assert replaces(accessToken="y") == []


# --- checks -------------------------------------------------------------------------------------------------


def test_every_mistake_in_a_model_version_is_told_at_once(plugin: Plugin) -> None:
    wrong = {
        "modelId": "1st",
        "image": "repository/image:latest",
        "aliases": ["default", "Live"],
        "port": 70000,
        "predictRoute": "predict",
        "env": {"AIP_MODE": "x", "fine": "y"},
        "healthProbe": {"path": "/", "command": ["true"]},
        "deploymentTimeoutSeconds": 9000,
        "artifactUri": "s3://bucket",
        "sharedMemory": 1,
        "labels": {"Team": "x"},
    }
    failures = Stack(VERSION_URN + "x").failures(plugin, wrong)
    assert set(failures) == {
        "modelId",
        "image",
        "aliases[0]",
        "aliases[1]",
        "port",
        "predictRoute",
        "env.AIP_MODE",
        "healthProbe",
        "deploymentTimeoutSeconds",
        "artifactUri",
        "sharedMemory",
        "labels.Team",
    }
    assert "@sha256:" in failures["image"]
    assert "gcloud" in failures["image"]
    assert failures["port"] == "must be at most 65535, not 70000."


def test_every_mistake_in_a_rollout_is_told_at_once(plugin: Plugin) -> None:
    model = f"{PARENT}/models/m@1"
    wrong = {
        "endpoint": "1234",
        "models": {
            "main": release(model, 80, minReplicas=3, maxReplicas=2),
            "Next": release(f"{PARENT}/models/m@live", 10, acceleratorType="NVIDIA_L4"),
            "twin": {**release(model, 0), "machineType": "big"},
            "copy": release(model, 0),
        },
    }
    failures = Stack(ROLLOUT_URN).failures(plugin, wrong)
    assert set(failures) == {
        "endpoint",
        "models",
        "models.Next",
        "models.Next.model",
        "models.Next.acceleratorCount",
        "models.main.maxReplicas",
        "models.twin.machineType",
        "models.copy",
    } or set(failures) == (set(failures) - {"models.main"}) | {"models.main"}
    assert "90 %" in failures["models"]
    assert "main 80" in failures["models"]


def test_unknown_values_pass_every_check_and_stay_unknown(plugin: Plugin, cloud: Cloud) -> None:
    before = cloud.writes()
    version = Stack(VERSION_URN + "unknown")
    inputs = version.check(plugin, version_inputs(UNKNOWN, UNKNOWN, env=UNKNOWN))
    assert inputs["image"] == UNKNOWN
    outputs = version.create(plugin, inputs, preview=True)
    assert {outputs[name] for name in ("name", "versionId", "createTime", "versionAliases")} == {UNKNOWN}
    rollout = Stack(ROLLOUT_URN)
    wanted = {"endpoint": UNKNOWN, "models": {"main": release(UNKNOWN, UNKNOWN)}}
    outputs = rollout.create(plugin, rollout.check(plugin, wanted), preview=True)
    assert outputs["deployedModels"] == UNKNOWN
    assert "a version that is not known yet" in plugin.lines()[-1]
    assert cloud.writes() == before


# --- model versions -----------------------------------------------------------------------------------------


def test_a_created_version_has_no_diff_and_does_not_drift(plugin: Plugin, cloud: Cloud, model: str) -> None:
    version = Stack(VERSION_URN + "a")
    inputs = version_inputs(
        model,
        aliases=["live", "blue"],
        labels={"team": "vision"},
        versionDescription="first",
        env={"A": "1"},
        args=["--fast"],
        port=9000,
        sharedMemoryMb=128,
        deploymentTimeoutSeconds=1200,
        startupProbe={"path": "/ready", "periodSeconds": 2},
    )
    assert version.up(plugin, inputs) == "create"
    assert version.outputs["versionAliases"] == ["blue", "default", "live"]
    assert version.id == version.outputs["name"] == f"{PARENT}/models/{model}@1"
    assert version.up(plugin, inputs) == "same"
    assert version.up(plugin, inputs | {"aliases": ["blue", "live"]}) == "same"
    assert version.refresh(plugin) is False
    (there,) = cloud.versions(model)
    assert there.container_spec.image_uri == IMAGE
    assert there.container_spec.ports[0].container_port == 9000
    assert there.container_spec.startup_probe.http_get.path == "/ready"


def test_aliases_labels_and_description_change_in_place(plugin: Plugin, cloud: Cloud, model: str) -> None:
    version = Stack(VERSION_URN + "a")
    inputs = version_inputs(model, aliases=["live"], labels={"a": "1", "b": "2"}, versionDescription="x")
    version.up(plugin, inputs)
    inputs |= {"aliases": ["blue"], "labels": {"a": "3"}, "displayName": "People"}
    del inputs["versionDescription"]
    found = version.diff(plugin, inputs)
    kinds = provider_pb2.PropertyDiff
    assert {path: d.kind for path, d in found.detailedDiff.items()} == {
        "aliases": kinds.UPDATE,
        "labels.a": kinds.UPDATE,
        "labels.b": kinds.DELETE,
        "versionDescription": kinds.DELETE,
        "displayName": kinds.ADD,
    }
    assert version.up(plugin, inputs) == "update"
    (there,) = cloud.versions(model)
    assert set(there.version_aliases) == {"blue", "default"}
    assert dict(there.labels) == {"a": "3"}
    assert there.version_description == ""
    assert there.display_name == "People"
    assert version.refresh(plugin) is False


def test_another_image_makes_the_new_version_first(plugin: Plugin, later: Plugin, cloud: Cloud, model: str) -> None:
    version = Stack(VERSION_URN + "a")
    version.up(plugin, version_inputs(model, aliases=["live"]))
    marks = len(cloud.sandbox.requests())
    assert version.up(later, version_inputs(model, OTHER_IMAGE, aliases=["live"])) == "replace"
    methods = [r["method"].rsplit(".", 1)[-1] for r in cloud.sandbox.requests()[marks:] if r["status"] < 400]
    assert methods.index("upload") < methods.index("deleteVersion")
    (there,) = cloud.versions(model)
    assert there.version_id == "2"
    assert set(there.version_aliases) == {"live", "default"}
    assert version.id.endswith("@2")


def test_deleting_twice_is_no_error_and_the_last_version_takes_the_model_along(
    plugin: Plugin, later: Plugin, cloud: Cloud, model: str, old: Stack, new: Stack
) -> None:
    first = old.id
    old.delete(later)  # the default version: the alias moves on
    (there,) = cloud.versions(model)
    assert list(there.version_aliases) == ["default"]
    old.id = first
    old.delete(later)
    new.delete(later)
    assert cloud.versions(model) == []
    old.id = first
    old.delete(later)


def test_several_versions_of_a_new_model_at_once_are_several_versions(plugin: Plugin, cloud: Cloud, model: str) -> None:
    before = {what: cloud.refused(f"models.{what}", "") for what in ("upload", "mergeVersionAliases")}
    versions = [Stack(f"{VERSION_URN}{n}") for n in range(4)]
    images = [IMAGE[:-1] + str(n) for n in range(4)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda v, image: v.up(plugin, version_inputs(model, image)), versions, images))
    there = {v.version_id: v.container_spec.image_uri for v in cloud.versions(model)}
    assert {v.outputs["versionId"]: v.inputs["image"] for v in versions} == there
    assert len(there) == 4
    assert all(cloud.refused(f"models.{what}", "") == refused for what, refused in before.items())


def test_a_model_that_somebody_makes_in_between_gets_a_second_version(
    plugin: Plugin, sandbox: RunningSandbox, cloud: Cloud, model: str
) -> None:
    proxy, mine, other = Proxy(sandbox.url), Stack(VERSION_URN + "mine"), Stack(VERSION_URN + "other")
    with Plugin(proxy.url) as late:
        proxy.arm("before", 0, lambda: other.up(plugin, version_inputs(model, OTHER_IMAGE)), forward=True)
        mine.up(late, version_inputs(model))
    proxy.close()
    assert cloud.refused("models.upload", "") >= 1
    assert {v.version_id: v.container_spec.image_uri for v in cloud.versions(model)} == {"1": OTHER_IMAGE, "2": IMAGE}
    assert mine.outputs["versionId"] == "2"


def test_two_processes_that_make_the_same_model_get_a_version_each(
    plugin: Plugin, later: Plugin, cloud: Cloud, model: str
) -> None:
    versions = [Stack(f"{VERSION_URN}{n}") for n in range(2)]
    images = [IMAGE[:-1] + str(n) for n in range(2)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda v, p, i: v.up(p, version_inputs(model, i)), versions, (plugin, later), images))
    assert sorted(v.outputs["versionId"] for v in versions) == ["1", "2"]
    assert len(cloud.versions(model)) == 2


def test_a_version_that_is_gone_reads_as_gone(plugin: Plugin, later: Plugin, cloud: Cloud, old: Stack) -> None:
    cloud.models.delete_model(name=old.id.split("@")[0]).result(timeout=30)
    assert old.refresh(plugin) is True
    assert old.id == ""


def test_an_alias_moved_by_hand_is_seen_and_moved_back(
    plugin: Plugin, cloud: Cloud, model: str, old: Stack, new: Stack
) -> None:
    inputs = version_inputs(model, aliases=["live"])
    assert old.up(plugin, inputs) == "update"
    cloud.models.merge_version_aliases(name=new.id, version_aliases=["live"])
    assert old.refresh(plugin) is True
    assert old.inputs["aliases"] == []
    assert old.up(plugin, inputs) == "update"
    assert old.outputs["versionAliases"] == ["default", "live"]


def test_a_version_is_imported_by_its_name(plugin: Plugin, cloud: Cloud, model: str) -> None:
    made = Stack(VERSION_URN + "a")
    inputs = version_inputs(
        model,
        aliases=["live"],
        labels={"a": "b"},
        env={"A": "1"},
        port=9000,
        livenessProbe={"command": ["true"], "failureThreshold": 5},
        deploymentTimeoutSeconds=600,
    )
    made.up(plugin, inputs)
    taken = Stack(VERSION_URN + "b", id=made.id)
    taken.refresh(plugin)
    assert taken.inputs == unstruct(struct(inputs))
    assert taken.up(plugin, inputs) == "same"


@pytest.mark.parametrize("name", ["people", f"{PARENT}/models/people", f"{PARENT}/models/people@live"])
def test_a_wrong_import_id_says_what_a_right_one_is(plugin: Plugin, name: str) -> None:
    with pytest.raises(CallFailed, match="models/ID@VERSION"):
        Stack(VERSION_URN + "a", id=name).refresh(plugin)


def test_secrets_stay_secret_in_outputs_and_after_a_refresh(plugin: Plugin, model: str) -> None:
    secret = rpc.wrap_rpc_secret("hunter2")
    version = Stack(VERSION_URN + "a")
    version.up(plugin, version_inputs(model, env={"KEY": secret, "PLAIN": "x"}))
    for _ in range(2):
        assert version.outputs["env"]["KEY"] == secret
        assert version.outputs["env"]["PLAIN"] == "x"
        assert json.dumps(version.outputs).count("hunter2") == 1
        assert json.dumps(version.inputs).count("hunter2") == 1
        version.refresh(plugin)
    assert "hunter2" not in "".join(plugin.lines() + plugin.lines(ephemeral=True))
    failures = version.failures(plugin, version_inputs(model, secret, serviceAccount=secret))
    assert set(failures) == {"image", "serviceAccount"}
    assert "hunter2" not in str(failures)


def test_a_version_whose_alias_is_refused_is_kept_as_half_made_and_finished_later(
    plugin: Plugin, sandbox: RunningSandbox, cloud: Cloud, model: str
) -> None:
    sandbox.fault("models.mergeVersionAliases", "status", code=403)
    version = Stack(VERSION_URN + "a")
    inputs = version_inputs(model, aliases=["live"])
    with pytest.raises(CallFailed, match="was uploaded, but") as failed:
        version.up(plugin, inputs)
    assert failed.value.half.id == f"{PARENT}/models/{model}@1"
    assert version.up(plugin, inputs) == "update"
    assert "live" in version.outputs["versionAliases"]
    assert cloud.requests("models.upload") >= 1
    assert len(cloud.versions(model)) == 1


def test_a_version_just_undeployed_is_deleted_once_vertex_ai_lets_go_of_it() -> None:
    with RunningSandbox("--hold-after-undeploy", "1.5") as held:
        cloud = Cloud(held)
        endpoint = cloud.endpoint("e")
        version, rollout = Stack(VERSION_URN + "a"), Stack(ROLLOUT_URN)
        with Plugin(held.url) as plugin:
            version.up(plugin, version_inputs("people"))
            rollout.up(plugin, rollout_inputs(endpoint, main=release(version.id)))
        with Plugin(held.url) as plugin:
            rollout.delete(plugin)
            version.delete(plugin)
        assert cloud.versions("people") == []
        assert any(r["status"] == 400 and "deleteModel" not in r["name"] for r in held.requests())


# --- rollouts -----------------------------------------------------------------------------------------------


def test_a_rollout_once_made_has_no_diff_and_does_not_drift(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, served: Stack
) -> None:
    assert cloud.traffic(endpoint) == {f"{old.id.rsplit('/', 1)[-1]}": 100}
    assert served.up(plugin, rollout_inputs(endpoint, main=release(old.id))) == "same"
    assert served.up(plugin, rollout_inputs(endpoint, main=release(old.id, minReplicas=1, spot=False))) == "same"
    assert served.refresh(plugin) is False


def test_a_canary_is_promoted_without_being_deployed_again(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, new: Stack, served: Stack
) -> None:
    deploys = cloud.requests("endpoints.deployModel")
    served.up(plugin, rollout_inputs(endpoint, main=release(old.id, 90), next=release(new.id, 10)))
    assert sorted(cloud.traffic(endpoint).values()) == [10, 90]
    served.up(plugin, rollout_inputs(endpoint, main=release(new.id)))
    assert cloud.requests("endpoints.deployModel") == deploys + 1
    assert list(cloud.deployed(endpoint).values()) == [(new.id.rsplit("/", 1)[-1], 100)]


def test_the_preview_lists_the_steps_and_writes_nothing(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, new: Stack, served: Stack
) -> None:
    before = cloud.writes()
    served.up(plugin, rollout_inputs(endpoint, drain=7, main=release(new.id)), preview=True)
    name = old.id.rsplit("/", 1)[-1].split("@")[0]
    assert plugin.lines()[-1].splitlines() == [
        f"1. deploy main: {name}@2 on n1-standard-2, 1 replica, no traffic",
        f"2. move traffic: main ({name}@2) 100 % (was {name}@1 100 %)",
        f"3. drain {name}@1 for 7 s",
        f"4. undeploy {name}@1",
    ]
    assert cloud.writes() == before


def test_replicas_and_autoscaling_change_in_place(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, served: Stack
) -> None:
    deploys = cloud.requests("endpoints.deployModel")
    more = release(old.id, minReplicas=2, maxReplicas=3, autoscalingTargets={"cpu": 80}, containerLogging=False)
    assert served.up(plugin, rollout_inputs(endpoint, main=more)) == "update"
    (there,) = cloud.look(endpoint).deployed_models
    machines = there.dedicated_resources
    assert (machines.min_replica_count, machines.max_replica_count) == (2, 3)
    assert machines.autoscaling_metric_specs[0].target == 80
    assert there.disable_container_logging
    assert cloud.requests("endpoints.deployModel") == deploys
    assert served.refresh(plugin) is False


def test_an_empty_rollout_undeploys_everything_and_can_come_back(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, new: Stack, served: Stack
) -> None:
    both = rollout_inputs(endpoint, main=release(old.id, 60), next=release(new.id, 40))
    served.up(plugin, both)
    served.up(plugin, rollout_inputs(endpoint))
    assert cloud.deployed(endpoint) == {}
    assert served.up(plugin, rollout_inputs(endpoint)) == "same"
    served.up(plugin, both)
    assert sorted(cloud.traffic(endpoint).values()) == [40, 60]


def test_what_leaves_drains_for_the_seconds_given(
    plugin: Plugin, cloud: Cloud, endpoint: str, new: Stack, served: Stack
) -> None:
    served.up(plugin, rollout_inputs(endpoint, drain=2, main=release(new.id)))
    moved = [e for e in cloud.sandbox.history() if e["endpoint"].endswith(endpoint.rsplit("/", 1)[-1])]
    last_traffic = max(n for n, e in enumerate(moved) if len(e["available"]) == 2 and e["event"] == "patched")
    gone = next(e for e in moved[last_traffic:] if len(e["available"]) == 1)
    seconds = datetime.fromisoformat(gone["time"]) - datetime.fromisoformat(moved[last_traffic]["time"])
    assert seconds.total_seconds() >= 2


def test_a_run_killed_after_the_traffic_moved_still_drains(
    sandbox: RunningSandbox, cloud: Cloud, endpoint: str, new: Stack, served: Stack, later: Plugin
) -> None:
    wanted = rollout_inputs(endpoint, drain=2, main=release(new.id))
    proxy = Proxy(sandbox.url)
    with Plugin(proxy.url) as killed:
        proxy.arm("after", 1, killed.kill)  # after the deployment and the move of the traffic
        with pytest.raises(CallFailed):
            served.up(killed, wanted)
    proxy.close()
    assert cloud.traffic(endpoint) == {new.id.rsplit("/", 1)[-1]: 100}
    begun = time.monotonic()
    served.up(later, wanted)
    assert time.monotonic() - begun >= 2
    assert len(cloud.deployed(endpoint)) == 1


def test_another_endpoint_replaces_and_leaves_the_old_one_empty(
    plugin: Plugin, later: Plugin, cloud: Cloud, endpoint: str, old: Stack, served: Stack
) -> None:
    second = cloud.endpoint(endpoint.rsplit("/", 1)[-1] + "-b")
    assert served.up(later, rollout_inputs(second, main=release(old.id))) == "replace"
    assert cloud.deployed(endpoint) == {}
    assert sum(cloud.traffic(second).values()) == 100


def test_deleting_a_rollout_twice_is_no_error(later: Plugin, cloud: Cloud, endpoint: str, served: Stack) -> None:
    served.delete(later)
    assert cloud.deployed(endpoint) == {}
    served.id = endpoint
    served.delete(later)
    cloud.endpoints.delete_endpoint(name=endpoint).result(timeout=30)
    served.id = endpoint
    served.delete(later)


def test_a_forced_replacement_with_the_same_content_deletes_nothing(
    plugin: Plugin, later: Plugin, cloud: Cloud, endpoint: str, model: str, old: Stack, served: Stack
) -> None:
    before = cloud.deployed(endpoint)
    for resource in (old, served):  # `up --replace` asks for no diff
        first = resource.id
        resource.create(later, resource.check(later, resource.inputs))
        assert resource.id == first
    for resource in (served, old):
        resource.delete(later, id_=resource.id)
    assert cloud.deployed(endpoint) == before
    # and when that run was killed before its deletes, the next one still knows which of the two stays
    with Plugin(cloud.sandbox.url) as next_run:
        for resource in (old, served):
            assert resource.up(next_run, resource.inputs) == "same"
        for resource in (served, old):
            resource.delete(next_run, id_=resource.id)
    assert cloud.deployed(endpoint) == before
    assert len(cloud.versions(model)) == 1


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"STUB_HEALTH": "exit", "STUB_LOG": "loading\nno such file: model.pt"}, "no such file: model.pt"),
    ],
)
def test_a_container_that_cannot_start_leaves_the_traffic_where_it_was(
    plugin: Plugin,
    cloud: Cloud,
    endpoint: str,
    model: str,
    old: Stack,
    served: Stack,
    env: dict[str, str],
    says: str,
) -> None:
    broken = Stack(VERSION_URN + "broken")
    broken.up(plugin, version_inputs(model, OTHER_IMAGE, env=env))
    before, state = cloud.deployed(endpoint), dict(served.outputs)
    with pytest.raises(CallFailed) as failed:
        served.up(plugin, rollout_inputs(endpoint, main=release(broken.id)))
    said = str(failed.value)
    assert said.startswith("Could not deploy main: ")
    assert says in said
    assert "undeployed again, and the traffic was not touched" in said
    assert failed.value.half is None
    assert cloud.deployed(endpoint) == before
    assert served.outputs == state


def test_a_second_release_that_fails_takes_the_first_new_one_back_too(
    plugin: Plugin, sandbox: RunningSandbox, cloud: Cloud, endpoint: str, old: Stack, new: Stack, served: Stack
) -> None:
    before = cloud.deployed(endpoint)
    sandbox.fault(
        "endpoints.deployModel",
        "operation_error",
        skip=1,
        status="RESOURCE_EXHAUSTED",
        message="The following quotas are exceeded: CustomModelServingCPUsPerProjectPerRegion",
    )
    wanted = rollout_inputs(
        endpoint,
        a=release(new.id, 50),
        b=release(old.id, 50, machineType="n1-standard-4"),
    )
    with pytest.raises(CallFailed, match="quotas are exceeded"):
        served.up(plugin, wanted)
    assert cloud.deployed(endpoint) == before


def test_a_failed_deployment_that_stays_on_the_endpoint_is_undeployed(
    plugin: Plugin, sandbox: RunningSandbox, cloud: Cloud, endpoint: str, new: Stack, served: Stack
) -> None:
    before = cloud.deployed(endpoint)
    sandbox.fault("endpoints.deployModel", "operation_error", when="after", message="out of capacity")
    with pytest.raises(CallFailed, match="out of capacity"):
        served.up(plugin, rollout_inputs(endpoint, main=release(new.id)))
    assert cloud.deployed(endpoint) == before


def test_a_deployment_that_takes_too_long_is_undone(
    plugin: Plugin, sandbox: RunningSandbox, cloud: Cloud, endpoint: str, new: Stack, served: Stack
) -> None:
    before = cloud.deployed(endpoint)
    sandbox.fault("endpoints.deployModel", "slow", seconds=60)
    with pytest.raises(CallFailed, match="Not done within 2 s"):
        served.up(plugin, rollout_inputs(endpoint, main=release(new.id)), timeout=2)
    assert cloud.deployed(endpoint) == before
    assert served.up(plugin, rollout_inputs(endpoint, main=release(new.id))) == "update"


def test_cancel_stops_at_once_and_the_next_run_goes_on(
    sandbox: RunningSandbox, cloud: Cloud, endpoint: str, old: Stack, new: Stack, served: Stack, later: Plugin
) -> None:
    deploys = cloud.requests("endpoints.deployModel")
    sandbox.fault("endpoints.deployModel", "slow", seconds=4)
    wanted = rollout_inputs(endpoint, main=release(new.id))
    with Plugin(sandbox.url) as cancelled:
        with in_background(lambda: served.up(cancelled, wanted)) as failed:
            while not any("deploying" in line for line in cancelled.lines(ephemeral=True)):
                time.sleep(0.05)
            begun = time.monotonic()
            cancelled.call("Cancel", empty_pb2.Empty())
        assert time.monotonic() - begun < 3
        assert "next `pulumi up` continues" in str(failed[0])
    assert served.up(later, wanted) == "update"
    assert cloud.requests("endpoints.deployModel") == deploys + 1
    assert cloud.refused("endpoints.deployModel", endpoint) == 0  # it waits for what runs, it does not run into it
    assert list(cloud.deployed(endpoint).values()) == [(new.id.rsplit("/", 1)[-1], 100)]


MACHINES: Any = {"machine_spec": {"machine_type": "n1-standard-2"}, "min_replica_count": 1}
WRITES = ["endpoints.deployModel", "endpoints.patch", "endpoints.undeployModel", "endpoints.mutateDeployedModel"]


@pytest.mark.parametrize("method", WRITES)
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "code": 503, "count": 2},
        {"kind": "status", "code": 429},
        {"kind": "drop", "when": "before"},
        {"kind": "drop", "when": "after"},
    ],
    ids=["503 twice", "429", "lost on the way", "answer lost"],
)
def test_passing_faults_are_waited_out(
    plugin: Plugin,
    sandbox: RunningSandbox,
    cloud: Cloud,
    endpoint: str,
    old: Stack,
    new: Stack,
    served: Stack,
    method: str,
    fault: Any,
) -> None:
    sandbox.fault(method, **fault)
    served.up(plugin, rollout_inputs(endpoint, main=release(old.id, 0, minReplicas=2), b=release(new.id, 100)))
    served.up(plugin, rollout_inputs(endpoint, main=release(new.id)))
    assert list(cloud.deployed(endpoint).values()) == [(new.id.rsplit("/", 1)[-1], 100)]


@pytest.mark.parametrize("method", ["models.upload", "models.mergeVersionAliases", "models.patch"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_dropped_connection_makes_no_second_version(
    plugin: Plugin, sandbox: RunningSandbox, cloud: Cloud, model: str, method: str, when: str
) -> None:
    sandbox.fault(method, "drop", when=when)
    version = Stack(VERSION_URN + "a")
    version.up(plugin, version_inputs(model, aliases=["live"]))
    version.up(plugin, version_inputs(model, aliases=["live"], versionDescription="x"))
    (there,) = cloud.versions(model)
    assert there.version_description == "x"
    assert set(there.version_aliases) == {"live", "default"}


def test_drift_is_seen_and_repaired(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, new: Stack, served: Stack
) -> None:
    wanted = rollout_inputs(endpoint, main=release(old.id, 90), next=release(new.id, 10))
    served.up(plugin, wanted)
    ids = served.outputs["deployedModels"]

    move(cloud, endpoint, {ids["main"]: 50, ids["next"]: 50})
    assert served.refresh(plugin) is True
    assert served.inputs["models"]["main"]["traffic"] == 50
    assert served.up(plugin, wanted) == "update"

    cloud.endpoints.mutate_deployed_model(
        request={
            "endpoint": endpoint,
            "deployed_model": {
                "id": ids["main"],
                "dedicated_resources": {"min_replica_count": 2, "max_replica_count": 2},
            },
            "update_mask": {
                "paths": ["dedicated_resources.min_replica_count", "dedicated_resources.max_replica_count"]
            },
        }
    ).result(timeout=30)
    assert served.refresh(plugin) is True
    assert served.inputs["models"]["main"]["minReplicas"] == 2
    assert served.up(plugin, wanted) == "update"

    move(cloud, endpoint, {ids["main"]: 100})
    cloud.endpoints.undeploy_model(endpoint=endpoint, deployed_model_id=ids["next"]).result(timeout=30)
    assert served.refresh(plugin) is True
    assert set(served.inputs["models"]) == {"main"}
    assert served.up(plugin, wanted) == "update"
    assert sorted(cloud.traffic(endpoint).values()) == [10, 90]
    assert served.refresh(plugin) is False


def move(cloud: Cloud, endpoint: str, traffic: dict[str, int]) -> None:
    cloud.endpoints.update_endpoint(
        endpoint=aiplatform_v1.Endpoint(name=endpoint, traffic_split=traffic),
        update_mask={"paths": ["traffic_split"]},
    )


def by_hand(cloud: Cloud, endpoint: str, model: str, id_: str) -> None:
    request = aiplatform_v1.DeployModelRequest(
        endpoint=endpoint,
        deployed_model=aiplatform_v1.DeployedModel(
            id=id_,
            model=model,
            dedicated_resources=MACHINES,
        ),
        traffic_split={"0": 100},
    )
    cloud.endpoints.deploy_model(request=request).result(timeout=30)


def test_a_deployed_model_of_somebody_else_is_an_error_unless_adopted(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, new: Stack
) -> None:
    by_hand(cloud, endpoint, old.id, "123")
    rollout = Stack(ROLLOUT_URN)
    wanted = rollout_inputs(endpoint, main=release(old.id, 90), next=release(new.id, 10))
    for preview in (True, False):
        with pytest.raises(CallFailed, match=r"123 .*adopt=True"):
            rollout.up(plugin, wanted, preview=preview)
    assert set(cloud.deployed(endpoint)) == {"123"}
    rollout.up(plugin, wanted | {"adopt": True})
    assert cloud.deployed(endpoint)["123"][1] == 90  # it fits a release, so it stays
    assert rollout.outputs["deployedModels"]["main"] == "123"


def test_a_rollout_that_is_deleted_leaves_its_traffic_to_the_strangers_that_have_some(
    later: Plugin, cloud: Cloud, endpoint: str, old: Stack, new: Stack, served: Stack
) -> None:
    request = aiplatform_v1.DeployModelRequest(
        endpoint=endpoint,
        deployed_model=aiplatform_v1.DeployedModel(id="77", model=new.id, dedicated_resources=MACHINES),
    )
    cloud.endpoints.deploy_model(request=request).result(timeout=30)
    with pytest.raises(CallFailed, match="none of them has traffic"):
        served.delete(later)
    move(cloud, endpoint, {served.outputs["deployedModels"]["main"]: 90, "77": 10})
    served.delete(later)
    assert list(cloud.deployed(endpoint).values()) == [(new.id.rsplit("/", 1)[-1], 100)]


def test_a_deployed_model_id_that_is_taken_is_not_the_end(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, new: Stack
) -> None:
    taken = deployed_id(endpoint, Spec(new.id.rsplit("/", 1)[-1], "n1-standard-2"))
    by_hand(cloud, endpoint, old.id, taken)
    wanted = rollout_inputs(endpoint, main=release(old.id, 50), next=release(new.id, 50)) | {"adopt": True}
    Stack(f"{ROLLOUT_URN}-{endpoint}").up(plugin, wanted)
    assert cloud.deployed(endpoint)[taken] == (old.id.rsplit("/", 1)[-1], 50)
    assert len(cloud.deployed(endpoint)) == 2


def test_a_stranger_that_comes_later_is_shown_by_a_refresh(
    plugin: Plugin, cloud: Cloud, endpoint: str, new: Stack, served: Stack
) -> None:
    request = aiplatform_v1.DeployModelRequest(
        endpoint=endpoint,
        deployed_model=aiplatform_v1.DeployedModel(
            id="77",
            model=new.id,
            dedicated_resources=MACHINES,
        ),
    )
    cloud.endpoints.deploy_model(request=request).result(timeout=30)
    assert served.refresh(plugin) is True
    assert served.outputs["otherDeployedModels"] == {"77": new.id.rsplit("/", 1)[-1]}


def test_a_rollout_is_imported_by_the_endpoint(
    plugin: Plugin, cloud: Cloud, endpoint: str, old: Stack, new: Stack
) -> None:
    by_hand(cloud, endpoint, old.id, "123")
    rollout = Stack(ROLLOUT_URN + "-imported", id=endpoint)
    rollout.refresh(plugin)
    (taken,) = rollout.inputs["models"].values()
    assert taken["traffic"] == 100
    assert taken["machineType"] == "n1-standard-2"
    assert rollout.up(plugin, rollout.inputs) == "same"
    rollout.up(plugin, rollout_inputs(endpoint, renamed=taken | {"traffic": 80}, next=release(new.id, 20)))
    assert cloud.deployed(endpoint)["123"][1] == 80


def test_a_rollout_on_an_endpoint_that_does_not_exist_says_so(plugin: Plugin, old: Stack) -> None:
    wanted = rollout_inputs(f"{PARENT}/endpoints/nowhere", main=release(old.id))
    with pytest.raises(CallFailed, match="There is no endpoint"):
        Stack(ROLLOUT_URN).up(plugin, wanted)


def test_two_rollouts_of_two_processes_on_one_endpoint_wait_for_each_other(
    plugin: Plugin, later: Plugin, sandbox: RunningSandbox, cloud: Cloud, endpoint: str, old: Stack, new: Stack
) -> None:
    """Not two programs (one endpoint has one rollout) but two runs of one, such as one that lost its lock."""
    sandbox.fault("endpoints.deployModel", "slow", seconds=1)
    stacks = [Stack(ROLLOUT_URN), Stack(ROLLOUT_URN)]
    wanted = rollout_inputs(endpoint, main=release(old.id, 50), next=release(new.id, 50))
    gate = threading.Barrier(2)

    def run(stack: Stack, process: Plugin) -> None:
        gate.wait()
        stack.up(process, wanted)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, stacks, (plugin, later)))
    assert sorted(cloud.traffic(endpoint).values()) == [50, 50]
    cloud.check_history(endpoint)


def test_progress_reaches_the_status_line_of_its_resource(
    plugin: Plugin, sandbox: RunningSandbox, endpoint: str, new: Stack, served: Stack
) -> None:
    sandbox.fault("endpoints.deployModel", "slow", seconds=1)
    served.up(plugin, rollout_inputs(endpoint, main=release(new.id)))
    said = [line for line in plugin.engine.lines if line.ephemeral and line.urn == served.urn]
    assert any(line.message.startswith("deploying ") and line.message.endswith(" s)") for line in said)


def test_an_unknown_resource_is_a_sentence_not_a_traceback(plugin: Plugin) -> None:
    with pytest.raises(CallFailed, match="has no resource vertex:index:Job") as failed:
        Stack("urn:pulumi:test::people::vertex:index:Job::x").check(plugin, {})
    assert failed.value.code == grpc.StatusCode.FAILED_PRECONDITION


def test_a_provider_whose_engine_is_gone_ends_by_itself() -> None:
    plugin = Plugin("", configure=False)
    plugin.stop_engine()
    assert plugin.process.wait(20) == 1
