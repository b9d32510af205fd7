"""Model versions: the provider as a process, spoken to as the engine does, against the sandbox's Vertex AI."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from pulumi.runtime import rpc
from pulumi.runtime.proto import provider_pb2
from vertex_harness import Cloud, Proxy, World, options, plugin, release, rollout_inputs, sandbox, version_inputs, world
from vertex_plugin import (
    IMAGE,
    LOCATION,
    OTHER_IMAGE,
    PARENT,
    VERSION_URN,
    CallFailed,
    Plugin,
    Stack,
    struct,
    unstruct,
)

from sandbox.testing import RunningSandbox

__all__ = ["options", "plugin", "sandbox", "world"]  # fixtures


def test_a_created_version_has_no_diff_and_does_not_drift(world: World) -> None:
    version, plugin = world.stack(), world.plugin
    inputs = version_inputs(
        world.model,
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
    assert version.id == version.outputs["name"] == f"{PARENT}/models/{world.model}@1"
    assert version.up(plugin, inputs) == "same"
    assert version.up(plugin, inputs | {"aliases": ["blue", "live"]}) == "same"
    assert version.refresh(plugin) is False
    (there,) = world.cloud.versions(world.model)
    assert there.container_spec.image_uri == IMAGE
    assert there.container_spec.ports[0].container_port == 9000
    assert there.container_spec.startup_probe.http_get.path == "/ready"
    assert there.container_spec.shared_memory_size_mb == 128


def test_aliases_labels_and_description_change_in_place(world: World) -> None:
    version, plugin = world.stack(), world.plugin
    inputs = version_inputs(world.model, aliases=["live"], labels={"a": "1", "b": "2"}, versionDescription="x")
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
    (there,) = world.cloud.versions(world.model)
    assert set(there.version_aliases) == {"blue", "default"}
    assert dict(there.labels) == {"a": "3"}
    assert there.version_description == ""
    assert there.display_name == "People"
    assert version.refresh(plugin) is False


def test_another_image_makes_the_new_version_first(world: World) -> None:
    version, plugin = world.stack(), world.plugin
    version.up(plugin, version_inputs(world.model, aliases=["live"]))
    marks = len(world.sandbox.requests())
    assert version.up(plugin, version_inputs(world.model, OTHER_IMAGE, aliases=["live"])) == "replace"
    methods = [r["method"].rsplit(".", 1)[-1] for r in world.sandbox.requests()[marks:] if r["status"] < 400]
    assert methods.index("upload") < methods.index("deleteVersion")
    (there,) = world.cloud.versions(world.model)
    assert there.version_id == "2"
    assert set(there.version_aliases) == {"live", "default"}
    assert version.id.endswith("@2")


def test_a_version_is_encrypted_with_a_key_that_cannot_change(world: World) -> None:
    def key(name: str) -> str:
        return f"projects/p/locations/{LOCATION}/keyRings/r/cryptoKeys/{name}"

    version, plugin = world.stack(), world.plugin
    version.up(plugin, version_inputs(world.model, encryptionKey=key("one")))
    (there,) = world.cloud.versions(world.model)
    assert there.encryption_spec.kms_key_name == key("one")
    assert version.refresh(plugin) is False
    imported = Stack(version.urn, id=version.id)
    imported.refresh(plugin)
    assert imported.inputs["encryptionKey"] == key("one")
    assert version.up(plugin, version_inputs(world.model, encryptionKey=key("two"))) == "replace"
    (there,) = world.cloud.versions(world.model)
    assert there.encryption_spec.kms_key_name == key("two")
    assert set(version.failures(plugin, version_inputs(world.model, encryptionKey="two"))) == {"encryptionKey"}


def test_deleting_twice_is_no_error_and_the_last_version_takes_the_model_along(world: World) -> None:
    old, new = world.two()
    first = old.state
    old.delete(world.plugin)  # the default version: the alias moves on
    (there,) = world.cloud.versions(world.model)
    assert list(there.version_aliases) == ["default"]
    old.delete_again(world.plugin, first)
    new.delete(world.plugin)
    assert world.cloud.versions(world.model) == []
    old.delete_again(world.plugin, first)


def test_several_versions_of_a_new_model_at_once_are_several_versions(world: World) -> None:
    versions = [Stack(f"{VERSION_URN}{n}") for n in range(4)]
    images = [IMAGE[:-1] + str(n) for n in range(4)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda v, image: v.up(world.plugin, version_inputs(world.model, image)), versions, images))
    there = {v.version_id: v.container_spec.image_uri for v in world.cloud.versions(world.model)}
    assert {v.outputs["versionId"]: v.inputs["image"] for v in versions} == there
    assert len(there) == 4
    assert world.cloud.refused("models.mergeVersionAliases", world.model) == 0


def test_a_model_that_somebody_makes_in_between_gets_a_second_version(world: World) -> None:
    proxy, mine, other = Proxy(world.sandbox.url), Stack(VERSION_URN + "mine"), Stack(VERSION_URN + "other")
    before = world.cloud.refused("models.upload", "")
    with Plugin(proxy.url) as late:
        proxy.arm("before", 0, lambda: other.up(world.plugin, version_inputs(world.model, OTHER_IMAGE)), forward=True)
        mine.up(late, version_inputs(world.model))
    proxy.close()
    assert world.cloud.refused("models.upload", "") == before + 1
    images = {v.version_id: v.container_spec.image_uri for v in world.cloud.versions(world.model)}
    assert images == {"1": OTHER_IMAGE, "2": IMAGE}
    assert mine.outputs["versionId"] == "2"


def test_two_processes_that_make_the_same_model_get_a_version_each(world: World) -> None:
    versions = [Stack(f"{VERSION_URN}{n}") for n in range(2)]
    images = [IMAGE[:-1] + str(n) for n in range(2)]
    with Plugin(world.sandbox.url) as second, ThreadPoolExecutor() as pool:
        plugins = (world.plugin, second)
        list(pool.map(lambda v, p, i: v.up(p, version_inputs(world.model, i)), versions, plugins, images))
    assert sorted(v.outputs["versionId"] for v in versions) == ["1", "2"]
    assert len(world.cloud.versions(world.model)) == 2


def test_a_version_that_is_gone_reads_as_gone(world: World) -> None:
    old = world.version()
    world.cloud.models.delete_model(name=old.id.split("@")[0]).result(timeout=30)
    assert old.refresh(world.plugin) is True
    assert old.id == ""


def test_an_alias_moved_by_hand_is_seen_and_moved_back(world: World) -> None:
    old, new = world.two()
    inputs = version_inputs(world.model, aliases=["live"])
    assert old.up(world.plugin, inputs) == "update"
    world.cloud.models.merge_version_aliases(name=new.id, version_aliases=["live"])
    assert old.refresh(world.plugin) is True
    assert old.inputs["aliases"] == []
    assert old.up(world.plugin, inputs) == "update"
    assert old.outputs["versionAliases"] == ["default", "live"]


def test_a_version_is_imported_by_its_name(world: World) -> None:
    inputs = version_inputs(
        world.model,
        aliases=["live"],
        labels={"a": "b"},
        env={"A": "1"},
        port=9000,
        sharedMemoryMb=96,
        livenessProbe={"command": ["true"], "failureThreshold": 5},
        deploymentTimeoutSeconds=600,
    )
    made = world.stack()
    made.up(world.plugin, inputs)
    taken = Stack(VERSION_URN + "b", id=made.id)
    taken.refresh(world.plugin)
    assert taken.inputs == unstruct(struct(inputs))
    assert taken.up(world.plugin, inputs) == "same"


@pytest.mark.parametrize("name", ["people", f"{PARENT}/models/people", f"{PARENT}/models/people@live"])
def test_a_wrong_import_id_says_what_a_right_one_is(world: World, name: str) -> None:
    with pytest.raises(CallFailed, match="models/ID@VERSION"):
        Stack(VERSION_URN + "a", id=name).refresh(world.plugin)


def test_secrets_stay_secret_in_outputs_and_after_a_refresh(world: World) -> None:
    plugin, version = world.plugin, world.stack()
    secret = rpc.wrap_rpc_secret("hunter2")
    version.up(plugin, version_inputs(world.model, env={"KEY": secret, "PLAIN": "x"}))
    for _ in range(2):
        assert version.outputs["env"]["KEY"] == secret
        assert version.outputs["env"]["PLAIN"] == "x"
        assert json.dumps(version.outputs).count("hunter2") == 1
        assert json.dumps(version.inputs).count("hunter2") == 1
        version.refresh(plugin)
    assert "hunter2" not in "".join(plugin.lines() + plugin.lines(ephemeral=True))
    failures = version.failures(plugin, version_inputs(world.model, secret, serviceAccount=secret))
    assert set(failures) == {"image", "serviceAccount"}
    assert "hunter2" not in str(failures)


def test_a_version_whose_alias_is_refused_is_kept_as_half_made_and_finished_later(world: World) -> None:
    world.sandbox.fault("models.mergeVersionAliases", "status", code=403)
    version = world.stack()
    inputs = version_inputs(world.model, aliases=["live"])
    with pytest.raises(CallFailed, match="was uploaded, but") as failed:
        version.up(world.plugin, inputs)
    assert failed.value.half.id == f"{PARENT}/models/{world.model}@1"
    assert version.up(world.plugin, inputs) == "update"
    assert "live" in version.outputs["versionAliases"]
    assert len(world.cloud.versions(world.model)) == 1


@pytest.mark.parametrize("method", ["models.upload", "models.mergeVersionAliases", "models.patch"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_dropped_connection_makes_no_second_version(world: World, method: str, when: str) -> None:
    world.sandbox.fault(method, "drop", when=when)
    version = world.stack()
    version.up(world.plugin, version_inputs(world.model, aliases=["live"]))
    version.up(world.plugin, version_inputs(world.model, aliases=["live"], versionDescription="x"))
    (there,) = world.cloud.versions(world.model)
    assert there.version_description == "x"
    assert set(there.version_aliases) == {"live", "default"}


def test_an_internal_error_after_a_deletion_is_no_failure(world: World) -> None:
    old, new = world.two()
    world.sandbox.fault(
        "models.deleteVersion",
        "operation_error",
        when="after",
        status="INTERNAL",
        message="Internal error encountered.",
    )
    new.delete(world.plugin)
    assert [v.version_id for v in world.cloud.versions(world.model)] == ["1"]
    old.delete(world.plugin)


def test_a_version_just_undeployed_is_deleted_once_vertex_ai_lets_go_of_it() -> None:
    with RunningSandbox("--hold-after-undeploy", "1.5") as held, Plugin(held.url) as plugin:
        cloud, version, rollout = Cloud.of(held), Stack(VERSION_URN + "a"), World(held, plugin).empty_rollout()
        endpoint = cloud.endpoint("e")
        version.up(plugin, version_inputs("people"))
        rollout.up(plugin, rollout_inputs(endpoint, main=release(version.id)))
        rollout.delete(plugin)
        version.delete(plugin)
        assert cloud.versions("people") == []
        assert cloud.refused("models.delete", "/models/people") >= 1  # held, and waited for
        assert cloud.requests("models.delete", "/models/people") == 1
