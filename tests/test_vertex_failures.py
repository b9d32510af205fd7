"""Refusals, losses and failures of Vertex AI, and how a rollout handles them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from vertex_harness import World, options, plugin, release, sandbox, world
from vertex_plugin import OTHER_IMAGE, ROLLOUT_URN, CallFailed, Plugin, Stack

from pulumi_vertex.access import Access
from pulumi_vertex.engine_call import EngineCall
from pulumi_vertex.rollout import RolloutType, runner
from pulumi_vertex.rollout.endpoint import Ours
from pulumi_vertex.vertex_api import VertexApi
from sandbox.testing import RunningSandbox
from sandbox.vertex_endpoints import SUPPOSITIONS

__all__ = ["options", "plugin", "sandbox", "world"]  # fixtures

DEPLOY = "endpoints.deployModel"


def half(error: CallFailed) -> bool:
    return error.half is not None


# --- deployments that fail ----------------------------------------------------------------------------------


def test_a_container_that_cannot_start_leaves_the_traffic_where_it_was(world: World) -> None:
    old = world.version()
    broken = world.version(OTHER_IMAGE, env={"STUB_HEALTH": "exit", "STUB_LOG": "loading\nno such file: model.pt"})
    served = world.served(old)
    before, state = world.deployed, dict(served.outputs)
    with pytest.raises(CallFailed) as failed:
        served.up(world.plugin, world.releases(main=release(broken.id)))
    said = str(failed.value)
    assert said.startswith("Could not deploy main: ")
    assert "The traffic was not touched." in said
    assert said.endswith("no such file: model.pt")
    assert not half(failed.value)
    assert world.deployed == before
    assert served.outputs == state


def test_a_second_release_that_fails_takes_the_first_new_one_back_too(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    before = world.deployed
    quota = "The following quotas are exceeded: CustomModelServingCPUsPerProjectPerRegion"
    world.sandbox.fault(DEPLOY, "operation_error", skip=1, status="RESOURCE_EXHAUSTED", message=quota)
    wanted = world.releases(a=release(new.id, 50), b=release(old.id, 50, machineType="n1-standard-4"))
    with pytest.raises(CallFailed, match=r"undeployed again\. The traffic was not touched.*quotas are exceeded"):
        served.up(world.plugin, wanted)
    assert world.deployed == before


@pytest.mark.parametrize(
    "words",
    ["Machine type temporarily unavailable", "Model server never became ready"],
)
def test_a_failed_deployment_that_stays_on_the_endpoint_is_undeployed(world: World, words: str) -> None:
    old, new = world.two()
    served = world.served(old)
    before = world.deployed
    world.sandbox.fault(DEPLOY, "operation_error", when="half", status="FAILED_PRECONDITION", message=words)
    with pytest.raises(CallFailed, match=rf"undeployed again\. The traffic was not touched.*{words}") as failed:
        served.up(world.plugin, world.releases(main=release(new.id)))
    assert not half(failed.value)
    assert world.deployed == before


def test_a_failed_first_deployment_is_undeployed_although_it_has_all_traffic(world: World) -> None:
    version, rollout = world.version(), world.empty_rollout()
    world.sandbox.fault(DEPLOY, "operation_error", when="half", message="out of capacity")
    wanted = world.releases(main=release(version.id))
    with pytest.raises(CallFailed, match=r"undeployed again\. Nothing was served before") as failed:
        rollout.up(world.plugin, wanted)
    assert not half(failed.value)
    assert world.deployed == {}
    world.check_history = False  # Vertex AI itself gave traffic to what has no replica
    rollout.up(world.plugin, wanted)
    assert world.traffic == {world.named(1): 100}


def test_a_failed_first_deployment_that_nobody_undid_is_not_taken_for_served(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that met the failure was killed before it could undeploy: a model with all traffic and no replica."""
    monkeypatch.setattr(runner, "AVAILABLE_SECONDS", 1.5)
    version = world.version()
    world.sandbox.fault(DEPLOY, "operation_error", when="half", message="out of capacity")
    mark = Ours.of(f"{ROLLOUT_URN}-{world.model}", {}).mark
    with pytest.raises(Exception, match="out of capacity"):
        world.deploy_by_hand(version.id, "7", display_name=f"{world.named(1)} {mark}")
    assert world.deployed == {"7": (world.named(1), 100)}
    RolloutType().create(call(world), VertexApi(access(world)), world.releases(main=release(version.id)))
    (deployed,) = world.deployed
    assert deployed != "7"
    assert world.traffic == {world.named(1): 100}
    (there,) = world.cloud.look(world.endpoint).deployed_models
    assert there.status.available_replica_count == 1
    world.check_history = False


def call(world: World) -> EngineCall:
    return EngineCall(f"{ROLLOUT_URN}-{world.model}", 60, threading.Event())


def access(world: World) -> Access:
    return Access("some-project", "europe-west4", world.sandbox.url)


def test_a_deployment_that_takes_too_long_goes_on_and_is_continued(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    before = world.deployed
    world.sandbox.fault(DEPLOY, "hold")
    with pytest.raises(CallFailed, match="Not done within 2 s") as failed:
        served.up(world.plugin, world.releases(main=release(new.id)), timeout=2)
    assert "The deployment goes on" in str(failed.value)
    assert "The traffic was not touched." in str(failed.value)
    assert half(failed.value)
    assert world.deployed == before
    world.sandbox.release()
    assert served.up(world.plugin, world.releases(main=release(new.id))) == "update"
    assert world.traffic == {world.named(2): 100}
    assert world.cloud.requests(DEPLOY, world.endpoint) == 2


def test_a_deployment_may_take_the_version_s_timeout_and_the_time_to_find_a_machine(world: World) -> None:
    version = world.version(deploymentTimeoutSeconds=5400)
    run = runner.Runner(call(world), VertexApi(access(world)), world.releases(main=release(version.id)), Ours("mark"))
    assert run._deployment_seconds(world.named(1)) == 5400 + runner.MACHINE_SECONDS
    silent = world.version(OTHER_IMAGE)
    run = runner.Runner(call(world), VertexApi(access(world)), world.releases(main=release(silent.id)), Ours("mark"))
    assert run._deployment_seconds(world.named(2)) == runner.DEPLOYMENT_SECONDS + runner.MACHINE_SECONDS


# --- faults that pass ---------------------------------------------------------------------------------------

WRITES = ["deployModel", "patch", "undeployModel", "mutateDeployedModel"]
FAULTS: dict[str, Any] = {
    "503 twice": {"kind": "status", "code": 503, "count": 2},
    "429": {"kind": "status", "code": 429},
    "lost on the way": {"kind": "drop", "when": "before"},
    "answer lost": {"kind": "drop", "when": "after"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_are_waited_out(world: World, fault: str) -> None:
    """One rollout meets the fault at every request that changes something."""
    old, new = world.two()
    served = world.served(old)
    for method in WRITES:
        world.sandbox.fault(f"endpoints.{method}", **FAULTS[fault])
    served.up(world.plugin, world.releases(main=release(old.id, 0, minReplicas=2), b=release(new.id, 100)))
    served.up(world.plugin, world.releases(main=release(new.id)))
    assert list(world.deployed.values()) == [(world.named(2), 100)]


def test_a_deployment_that_still_runs_is_waited_for_and_not_run_into(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    words = 'DeployedModel with ID "7" remains involved in the rolling update on Endpoint e.'
    world.sandbox.fault("endpoints.undeployModel", "refuse", count=2, status="FAILED_PRECONDITION", message=words)
    served.up(world.plugin, world.releases(main=release(new.id)))
    assert list(world.deployed.values()) == [(world.named(2), 100)]


@pytest.mark.parametrize("method", ["undeployModel", "mutateDeployedModel"])
def test_what_another_run_undeployed_first_is_looked_at_again(world: World, method: str) -> None:
    old, new = world.two()
    served = world.served(old)
    served.up(world.plugin, world.releases(main=release(old.id, 50), next=release(new.id, 50)))
    message = 'DeployedModel with ID "7" is not found on Endpoint e.'
    world.sandbox.fault(f"endpoints.{method}", "refuse", status="NOT_FOUND", message=message)
    served.up(world.plugin, world.releases(main=release(new.id, minReplicas=2)))
    assert list(world.deployed.values()) == [(world.named(2), 100)]
    assert not world.sandbox.unused_faults()


# --- unknown behaviour of Vertex AI, both ways --------------------------------------------------------------


@pytest.fixture(scope="module", params=["no-first-traffic", "all"])
def otherwise(request: pytest.FixtureRequest) -> Iterator[World]:
    names = SUPPOSITIONS if request.param == "all" else [request.param]
    with RunningSandbox(*(o for name in names for o in ("--suppose", name))) as running, Plugin(running.url) as plugin:
        yield World(running, plugin)
        assert running.violations() == []


def test_a_rollout_works_whichever_way_vertex_ai_behaves(otherwise: World) -> None:
    world, (old, new) = otherwise, otherwise.two()
    rollout = world.served(old)
    assert rollout.refresh(world.plugin) is False
    assert rollout.up(world.plugin, world.releases(main=release(old.id))) == "same"
    rollout.up(world.plugin, world.releases(main=release(old.id, 90), next=release(new.id, 10)))
    assert world.traffic == {world.named(1): 90, world.named(2): 10}
    rollout.up(world.plugin, world.releases(next=release(new.id, minReplicas=2)))
    assert list(world.deployed.values()) == [(world.named(2), 100)]
    rollout.up(world.plugin, rollout.inputs, force=True)
    assert rollout.refresh(world.plugin) is False
    assert list(world.deployed.values()) == [(world.named(2), 100)]
    taken = Stack(rollout.urn, id=world.endpoint)
    taken.refresh(world.plugin)
    taken.delete(world.plugin)
    assert world.deployed == {}
    for version in (old, new):
        version.delete(world.plugin)
    assert world.cloud.versions(world.model) == []


def test_a_name_with_the_word_traffic_moves_none(world: World) -> None:
    """Only on an empty endpoint is a deployment that is refused sent again with all the traffic."""
    world.model = f"traffic-{world.model}"
    old, new = world.two()
    served = world.served(old)
    words = f"Machine type is not supported for model {world.named(2)}."
    world.sandbox.fault(DEPLOY, "refuse", count=2, status="INVALID_ARGUMENT", message=words)
    with pytest.raises(CallFailed, match="is not supported"):
        served.up(world.plugin, world.releases(main=release(old.id, 90), next=release(new.id, 10)))
    assert world.traffic == {world.named(1): 100}
    world.cloud.check_history(world.endpoint)
