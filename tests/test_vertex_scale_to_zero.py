"""Scale to zero, a preview of Google's: declared, previewed, refreshed, imported, updated and destroyed."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import eventually
from vertex_harness import World, plugin, release, sandbox, world
from vertex_plugin import ROLLOUT_URN, CallFailed, Stack

__all__ = ["plugin", "sandbox", "world"]  # fixtures

IDLE = {"minReplicas": 0, "maxReplicas": 2, "minScaleupSeconds": 300, "idleScaledownSeconds": 600}


@pytest.fixture(scope="module")
def options() -> tuple[str, ...]:
    return ("--idle-seconds", "0.2")


@pytest.fixture
def idle(world: World) -> World:
    """A world with a dedicated endpoint. Traffic points at a model without replicas, which is as it should be."""
    world._endpoint = world.cloud.endpoint(f"e-{world.model}", dedicated_endpoint_enabled=True)
    world.check_history = False
    return world


def resources(world: World) -> Any:
    path = f"v1beta1/{world.endpoint}"
    (deployed,) = world.sandbox.do("GET", path)["deployedModels"]
    return deployed["dedicatedResources"]


def replicas(world: World) -> int:
    (deployed,) = world.cloud.look(world.endpoint).deployed_models
    return int(deployed.status.available_replica_count)


def test_a_model_that_scales_to_zero_is_not_broken_and_does_not_drift(idle: World) -> None:
    version = idle.version()
    rollout = idle.empty_rollout()
    wanted = idle.releases(main=release(version.id, **IDLE))
    rollout.up(idle.plugin, wanted, preview=True)
    assert idle.plugin.lines()[-1].splitlines()[0].endswith("on n1-standard-2, 0 to 2 replicas, none while idle")
    assert rollout.up(idle.plugin, wanted) == "create"
    assert resources(idle)["scaleToZeroSpec"] == {"minScaleupPeriod": "300s", "idleScaledownPeriod": "600s"}
    assert eventually(lambda: replicas(idle) == 0)
    assert rollout.refresh(idle.plugin) is False
    assert rollout.up(idle.plugin, wanted) == "same"
    assert rollout.up(idle.plugin, wanted, force=True) == "replace"
    assert idle.cloud.requests("endpoints.deployModel", idle.endpoint) == 1
    rollout.delete(idle.plugin)
    assert idle.deployed == {}


def test_its_periods_change_in_place_and_drift_is_seen(idle: World) -> None:
    version = idle.version()
    rollout = idle.served(version, **IDLE)
    assert rollout.up(idle.plugin, idle.releases(main=release(version.id, **IDLE | {"idleScaledownSeconds": 900})))
    assert resources(idle)["scaleToZeroSpec"] == {"minScaleupPeriod": "300s", "idleScaledownPeriod": "900s"}
    by_hand = {
        "deployedModel": {
            "id": rollout.outputs["deployedModels"]["main"],
            "dedicatedResources": {"scaleToZeroSpec": {"minScaleupPeriod": "400s"}},
        },
        "updateMask": "dedicatedResources.scaleToZeroSpec",
    }
    idle.sandbox.do("POST", f"v1beta1/{idle.endpoint}:mutateDeployedModel", by_hand)
    assert rollout.refresh(idle.plugin) is True
    assert rollout.inputs["models"]["main"]["minScaleupSeconds"] == 400
    # Back to a replica that always runs, and to zero again.
    for more, least in (({}, 1), (IDLE, 0)):
        wanted = idle.releases(main=release(version.id, **more))
        assert rollout.up(idle.plugin, wanted) == "update"
        assert resources(idle).get("minReplicaCount", 0) == least
        assert ("scaleToZeroSpec" in resources(idle)) == (least == 0)
        assert rollout.refresh(idle.plugin) is False
    assert idle.cloud.requests("endpoints.deployModel", idle.endpoint) == 1


def test_a_new_version_is_deployed_beside_one_that_is_kept_awake(idle: World) -> None:
    old, new = idle.two()
    rollout = idle.served(old, **IDLE)
    rollout.up(idle.plugin, idle.releases(main=release(new.id, **IDLE)))
    assert list(idle.deployed.values()) == [(idle.named(2), 100)]
    assert resources(idle)["scaleToZeroSpec"]["idleScaledownPeriod"] == "600s"


def test_it_is_imported(idle: World) -> None:
    version = idle.version()
    idle.served(version, **IDLE)
    taken = Stack(ROLLOUT_URN + "-taken", id=idle.endpoint)
    taken.refresh(idle.plugin)
    (imported,) = taken.inputs["models"].values()
    assert {key: imported[key] for key in IDLE} == IDLE
    assert taken.up(idle.plugin, taken.inputs) == "same"


def test_a_shared_endpoint_refuses_it_and_nothing_is_left(world: World) -> None:
    version = world.version()
    rollout = world.empty_rollout()
    with pytest.raises(CallFailed, match="shared public endpoints") as failed:
        rollout.up(world.plugin, world.releases(main=release(version.id, **IDLE)))
    assert failed.value.half is None
    assert world.deployed == {}
