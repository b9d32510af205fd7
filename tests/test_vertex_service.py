"""The provider as the engine first meets it: its schema, its configuration, and the checks of a preview."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf import empty_pb2
from googleapiclient.discovery_cache import get_static_doc
from pulumi.runtime import rpc
from pulumi.runtime.proto import provider_pb2
from vertex_harness import World, options, plugin, release, sandbox, version_inputs, world
from vertex_plugin import PARENT, ROLLOUT_URN, VERSION_URN, CallFailed, Plugin, Stack, struct

__all__ = ["options", "plugin", "sandbox", "world"]  # fixtures

UNKNOWN = rpc.UNKNOWN


def test_the_schema_is_complete(plugin: Plugin) -> None:
    schema = json.loads(plugin.call("GetSchema", provider_pb2.GetSchemaRequest()).schema)
    kinds = ("CustomJob", "ModelVersion", "PipelineJob", "ReleasedImage", "Rollout", "Schedule", "TuningJob")
    assert set(schema["resources"]) == {f"vertex:index:{kind}" for kind in kinds}
    types = ("Deployed", "Metric", "Parameter", "Probe", "Scheduling", "Task", "Trial")
    assert set(schema["types"]) == {f"vertex:index:{kind}" for kind in types}
    assert schema["config"]["variables"]["accessToken"]["secret"] is True

    def walk(value: object) -> Iterator[dict[str, object]]:
        if isinstance(value, dict):
            yield value
            for item in value.values():
                yield from walk(item)

    for part in walk(schema):
        if part.get("$ref", "pulumi.json#/Any") != "pulumi.json#/Any":
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
    schedule = schema["resources"]["vertex:index:Schedule"]["inputProperties"]
    assert schedule["timeZone"]["description"].endswith(" Default: UTC.")
    assert schedule["paused"]["description"].endswith(" Default: false.")
    version = schema["resources"]["vertex:index:ModelVersion"]
    assert version["inputProperties"]["image"]["willReplaceOnChanges"]


JOBS_IN_PLACE = {"displayName", "labels", "wait", "cancelOnInterrupt"}


def test_what_vertex_ai_cannot_change_replaces(plugin: Plugin) -> None:
    """A new input belongs into this table if Vertex AI or the provider can change it in place."""
    schema = json.loads(plugin.call("GetSchema", provider_pb2.GetSchemaRequest()).schema)["resources"]
    inputs = {token.rpartition(":")[2]: resource["inputProperties"] for token, resource in schema.items()}
    in_place = {
        kind: {name for name, one in properties.items() if not one.get("willReplaceOnChanges")}
        for kind, properties in inputs.items()
    }
    assert in_place == {
        "ModelVersion": {"serviceAccount", "displayName", "versionDescription", "aliases", "labels"},
        "Rollout": {"models", "drainSeconds", "adopt"},
        "ReleasedImage": {"digest", "sources"},
        "CustomJob": JOBS_IN_PLACE,
        "TuningJob": JOBS_IN_PLACE,
        "PipelineJob": JOBS_IN_PLACE,
        "Schedule": set(inputs["Schedule"]),
    }
    document = json.loads(get_static_doc("aiplatform", "v1"))  # Google's client library carries it
    ports = document["schemas"]["GoogleCloudAiplatformV1ModelContainerSpec"]["properties"]["ports"]
    port = inputs["ModelVersion"]["port"]["description"].rpartition(" Default: ")[2].rstrip(".")
    assert f'"containerPort": {port} ' in ports["description"]


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


def test_an_unknown_resource_is_a_sentence_not_a_traceback(plugin: Plugin) -> None:
    with pytest.raises(CallFailed, match="has no resource vertex:index:Job") as failed:
        Stack("urn:pulumi:test::people::vertex:index:Job::x").check(plugin, {})
    assert failed.value.code == grpc.StatusCode.FAILED_PRECONDITION


def test_a_provider_whose_engine_is_gone_ends_by_itself() -> None:
    with Plugin("", configure=False) as plugin:
        plugin.call("GetPluginInfo", empty_pb2.Empty())
        plugin.stop_engine()
        assert plugin.process.wait(60) == 1


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
    models = {
        "main": release(model, 80, minReplicas=3, maxReplicas=2, autoscalingTargets={"cpu": 600, "requests": 600}),
        "Next": release(f"{PARENT}/models/m@live", 10, acceleratorType="NVIDIA_L4"),
        "twin": {**release(model, 0), "machineType": "big"},
        "copy": release(model, 0, idleScaledownSeconds=299),
        "idle": release(f"{PARENT}/models/m@3", 0, minReplicas=0),
    }
    for order in itertools.islice(itertools.permutations(models), 0, None, 17):  # a map comes in any order
        failures = Stack(ROLLOUT_URN).failures(plugin, {"endpoint": "1234", "models": {n: models[n] for n in order}})
        twins = {"models.main", "models.copy"} & set(failures)
        assert len(twins) == 1  # whichever comes second is the same as the other
        assert set(failures) - twins == {
            "endpoint",
            "models",
            "models.Next",
            "models.Next.model",
            "models.Next.acceleratorCount",
            "models.main.maxReplicas",
            "models.main.autoscalingTargets.cpu",
            "models.twin.machineType",
            "models.copy.idleScaledownSeconds",
            "models.idle.minReplicas",
        }
        assert "90 %" in failures["models"]
        assert "main 80" in failures["models"]


@pytest.mark.parametrize("shares", [(60, 39), (60, 41), (0, 0)])
def test_shares_of_another_sum_than_100_are_refused(plugin: Plugin, shares: tuple[int, int]) -> None:
    models = {name: release(f"{PARENT}/models/m@{n}", shares[n]) for n, name in enumerate(("a", "b"))}
    failures = Stack(ROLLOUT_URN).failures(plugin, {"endpoint": f"{PARENT}/endpoints/1", "models": models})
    assert list(failures) == ["models"]
    assert f"not {sum(shares)} % (" in failures["models"]


def test_unknown_values_pass_every_check_and_stay_unknown(world: World) -> None:
    plugin, before = world.plugin, world.cloud.writes()
    version = world.stack()
    inputs = version.check(plugin, version_inputs(UNKNOWN, UNKNOWN, env=UNKNOWN))
    assert inputs["image"] == UNKNOWN
    outputs = version.create(plugin, inputs, preview=True)
    assert {outputs[name] for name in ("name", "versionId", "createTime", "versionAliases")} == {UNKNOWN}
    rollout = world.empty_rollout()
    wanted = {"endpoint": UNKNOWN, "models": {"main": release(UNKNOWN, UNKNOWN)}}
    outputs = rollout.create(plugin, rollout.check(plugin, wanted), preview=True)
    assert outputs["deployedModels"] == UNKNOWN
    assert "a version that is not known yet" in plugin.lines()[-1]
    assert world.cloud.writes() == before
