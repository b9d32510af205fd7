"""Rollouts: the provider as a process, spoken to as the engine does, against the sandbox's Vertex AI."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from vertex_harness import Proxy, World, options, plugin, release, rollout_inputs, sandbox, world
from vertex_plugin import OTHER_IMAGE, PARENT, ROLLOUT_URN, CallFailed, Plugin, Stack

from pulumi_vertex.rollout.plan import Spec, deployed_id
from pulumi_vertex.wire import UNKNOWN
from sandbox.testing import RunningSandbox

__all__ = ["options", "plugin", "sandbox", "world"]  # fixtures


def test_a_rollout_once_made_has_no_diff_and_does_not_drift(world: World) -> None:
    old = world.version()
    served = world.served(old)
    assert world.traffic == {world.named(1): 100}
    assert served.up(world.plugin, world.releases(main=release(old.id))) == "same"
    assert served.up(world.plugin, world.releases(main=release(old.id, minReplicas=1, spot=False))) == "same"
    assert served.refresh(world.plugin) is False


def test_a_canary_is_promoted_without_being_deployed_again(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    served.up(world.plugin, world.releases(main=release(old.id, 90), next=release(new.id, 10)))
    assert world.traffic == {world.named(1): 90, world.named(2): 10}
    served.up(world.plugin, world.releases(main=release(new.id)))
    assert world.cloud.requests("endpoints.deployModel", world.endpoint) == 2
    assert list(world.deployed.values()) == [(world.named(2), 100)]


def test_the_preview_lists_the_steps_and_writes_nothing(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    before = world.cloud.writes()
    served.up(world.plugin, world.releases(drain=7, main=release(new.id)), preview=True)
    one, two = world.named(1), world.named(2)
    assert world.plugin.lines()[-1].splitlines() == [
        f"1. deploy main: {two} on n1-standard-2, 1 replica, no traffic",
        f"2. move traffic: main ({two}) 100 % (was {one} 100 %)",
        f"3. drain {one} for 7 s",
        f"4. undeploy {one}",
    ]
    assert world.cloud.writes() == before


def test_replicas_and_autoscaling_change_in_place(world: World) -> None:
    old = world.version()
    served = world.served(old)
    more = release(old.id, minReplicas=2, maxReplicas=3, autoscalingTargets={"cpu": 80}, containerLogging=False)
    assert served.up(world.plugin, world.releases(main=more)) == "update"
    (there,) = world.cloud.look(world.endpoint).deployed_models
    machines = there.dedicated_resources
    assert (machines.min_replica_count, machines.max_replica_count) == (2, 3)
    assert machines.autoscaling_metric_specs[0].target == 80
    assert there.disable_container_logging
    assert world.cloud.requests("endpoints.deployModel", world.endpoint) == 1
    assert served.refresh(world.plugin) is False


def targets(world: World) -> dict[str, int]:
    (there,) = world.cloud.look(world.endpoint).deployed_models
    specs = there.dedicated_resources.autoscaling_metric_specs
    return {spec.metric_name.rsplit("/online/")[-1]: spec.target for spec in specs}


def test_autoscaling_targets_are_sent_as_declared(world: World) -> None:
    old = world.version()
    declared = {"cpu": 60, "requests": 600}
    served = world.served(old, autoscalingTargets=declared)
    assert targets(world) == {"cpu/utilization": 60, "request_count": 600}
    assert served.refresh(world.plugin) is False
    served.up(world.plugin, world.releases(main=release(old.id, autoscalingTargets={"requests": 60})))
    assert targets(world) == {"cpu/utilization": 60, "request_count": 60}  # Google's default is written out
    served.up(world.plugin, world.releases(main=release(old.id)))
    assert targets(world) == {"cpu/utilization": 60}
    assert served.refresh(world.plugin) is False
    assert served.up(world.plugin, world.releases(main=release(old.id))) == "same"


def test_an_empty_rollout_undeploys_everything_and_can_come_back(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    both = world.releases(main=release(old.id, 60), next=release(new.id, 40))
    served.up(world.plugin, both)
    served.up(world.plugin, world.releases())
    assert world.deployed == {}
    assert served.up(world.plugin, world.releases()) == "same"
    served.up(world.plugin, both)
    assert world.traffic == {world.named(1): 60, world.named(2): 40}


def test_what_leaves_drains_for_the_seconds_given(world: World) -> None:
    old, new = world.two()
    world.served(old).up(world.plugin, world.releases(drain=2, main=release(new.id)))
    moved = [e for e in world.sandbox.history() if e["endpoint"].endswith(world.endpoint.rsplit("/", 1)[-1])]
    last_traffic = max(n for n, e in enumerate(moved) if len(e["available"]) == 2 and e["event"] == "patched")
    gone = next(e for e in moved[last_traffic:] if len(e["available"]) == 1)
    seconds = datetime.fromisoformat(gone["time"]) - datetime.fromisoformat(moved[last_traffic]["time"])
    assert seconds.total_seconds() >= 2


def test_a_run_killed_after_the_traffic_moved_still_drains(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    wanted = world.releases(drain=2, main=release(new.id))
    proxy = Proxy(world.sandbox.url)
    with Plugin(proxy.url) as killed:
        proxy.arm("after", 1, killed.kill)  # after the deployment and the move of the traffic
        with pytest.raises(CallFailed):
            served.up(killed, wanted)
    proxy.close()
    assert world.traffic == {world.named(2): 100}
    begun = time.monotonic()
    served.up(world.plugin, wanted)
    assert time.monotonic() - begun >= 2
    assert len(world.deployed) == 1


def test_another_endpoint_replaces_and_leaves_the_old_one_empty(world: World) -> None:
    old = world.version()
    served = world.served(old)
    second = world.cloud.endpoint(f"e-{world.model}-b")
    assert served.up(world.plugin, rollout_inputs(second, main=release(old.id))) == "replace"
    assert world.deployed == {}
    assert sum(world.cloud.traffic(second).values()) == 100


def test_another_endpoint_is_said_to_be_an_outage_once(world: World, sandbox: RunningSandbox) -> None:
    served = world.served(world.version())
    with Plugin(sandbox.url) as another:
        for _ in range(2):
            served.diff(another, served.inputs)
            served.diff(another, served.inputs | {"endpoint": UNKNOWN})
        (said,) = another.lines()
    assert said.startswith(f"The endpoint {served.id} is replaced, which is an outage")


def test_deleting_a_rollout_twice_is_no_error(world: World) -> None:
    served = world.served(world.version())
    state = served.state
    served.delete(world.plugin)
    assert world.deployed == {}
    served.delete_again(world.plugin, state)
    world.cloud.endpoints.delete_endpoint(name=world.endpoint).result(timeout=30)
    served.delete_again(world.plugin, state)


SPECIAL = {
    "acceleratorType": "NVIDIA_L4",
    "acceleratorCount": 2,
    "serviceAccount": "serving@some-project.iam.gserviceaccount.com",
    "accessLogging": True,
    "spot": True,
}


def test_another_accelerator_account_or_logging_deploys_beside_the_old(world: World) -> None:
    old = world.version()
    served = world.served(old)
    for number in range(1, len(SPECIAL) + 1):
        more: dict[str, Any] = dict(list(SPECIAL.items())[:number])
        if "acceleratorType" in more:
            more.setdefault("acceleratorCount", 1)
        wanted = world.releases(main=release(old.id, **more))
        (before,) = world.deployed
        assert served.up(world.plugin, wanted) == "update"
        (after,) = world.deployed
        assert after != before
        assert served.up(world.plugin, wanted) == "same"
        assert served.refresh(world.plugin) is False
    (there,) = world.cloud.look(world.endpoint).deployed_models
    machine = there.dedicated_resources.machine_spec
    assert (machine.accelerator_type.name, machine.accelerator_count) == ("NVIDIA_L4", 2)
    assert there.service_account == SPECIAL["serviceAccount"]
    assert (there.enable_access_logging, there.dedicated_resources.spot) == (True, True)
    taken = Stack(ROLLOUT_URN + "-taken", id=world.endpoint)
    taken.refresh(world.plugin)
    (imported,) = taken.inputs["models"].values()
    assert {key: imported[key] for key in SPECIAL} == SPECIAL


def test_drift_is_seen_and_repaired(world: World) -> None:
    plugin, (old, new) = world.plugin, world.two()
    served = world.served(old)
    wanted = world.releases(main=release(old.id, 90), next=release(new.id, 10))
    served.up(plugin, wanted)
    ids = served.outputs["deployedModels"]

    world.move_by_hand({ids["main"]: 50, ids["next"]: 50})
    assert served.refresh(plugin) is True
    assert served.inputs["models"]["main"]["traffic"] == 50
    assert served.up(plugin, wanted) == "update"

    counts = ("min_replica_count", "max_replica_count")
    world.cloud.endpoints.mutate_deployed_model(
        request={
            "endpoint": world.endpoint,
            "deployed_model": {"id": ids["main"], "dedicated_resources": dict.fromkeys(counts, 2)},
            "update_mask": {"paths": [f"dedicated_resources.{count}" for count in counts]},
        }
    ).result(timeout=30)
    assert served.refresh(plugin) is True
    assert served.inputs["models"]["main"]["minReplicas"] == 2
    assert served.up(plugin, wanted) == "update"

    world.move_by_hand({ids["main"]: 100})
    world.undeploy_by_hand(ids["next"])
    assert served.refresh(plugin) is True
    assert set(served.inputs["models"]) == {"main"}
    assert served.up(plugin, wanted) == "update"
    assert sorted(world.traffic.values()) == [10, 90]
    assert served.refresh(plugin) is False


def test_a_deployed_model_of_somebody_else_is_an_error_unless_adopted(world: World) -> None:
    old, new = world.two()
    world.deploy_by_hand(old.id, "123")
    rollout = world.empty_rollout()
    wanted = world.releases(main=release(old.id, 90), next=release(new.id, 10))
    for preview in (True, False):
        with pytest.raises(CallFailed, match=r"123 .*adopt=True"):
            rollout.up(world.plugin, wanted, preview=preview)
    assert set(world.deployed) == {"123"}
    rollout.up(world.plugin, wanted | {"adopt": True})
    assert world.deployed["123"][1] == 90  # it fits a release, so it stays
    assert rollout.outputs["deployedModels"]["main"] == "123"


def test_a_rollout_that_is_deleted_leaves_its_traffic_to_the_strangers_that_have_some(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    world.deploy_by_hand(new.id, "77")
    with pytest.raises(CallFailed, match="none of them has traffic"):
        served.delete(world.plugin)
    world.move_by_hand({served.outputs["deployedModels"]["main"]: 90, "77": 10})
    served.delete(world.plugin)
    assert list(world.deployed.values()) == [(world.named(2), 100)]


def test_a_deployed_model_id_that_is_taken_is_not_the_end(world: World) -> None:
    old, new = world.two()
    taken = deployed_id(world.endpoint, Spec(world.named(2), "n1-standard-2"))
    world.deploy_by_hand(old.id, taken)
    wanted = world.releases(main=release(old.id, 50), next=release(new.id, 50)) | {"adopt": True}
    world.empty_rollout().up(world.plugin, wanted)
    assert world.deployed[taken] == (world.named(1), 50)
    assert len(world.deployed) == 2


def test_a_stranger_that_comes_later_is_shown_by_a_refresh(world: World) -> None:
    old, new = world.two()
    served = world.served(old)
    world.deploy_by_hand(new.id, "77")
    assert served.refresh(world.plugin) is True
    assert served.outputs["otherDeployedModels"] == {"77": world.named(2)}


def test_a_rollout_is_imported_by_the_endpoint(world: World) -> None:
    old, new = world.two()
    world.deploy_by_hand(old.id, "123")
    rollout = Stack(ROLLOUT_URN + "-imported", id=world.endpoint)
    rollout.refresh(world.plugin)
    (taken,) = rollout.inputs["models"].values()
    assert taken["traffic"] == 100
    assert taken["machineType"] == "n1-standard-2"
    assert rollout.up(world.plugin, rollout.inputs) == "same"
    rollout.up(world.plugin, world.releases(renamed=taken | {"traffic": 80}, next=release(new.id, 20)))
    assert world.deployed["123"][1] == 80


def test_a_rollout_on_an_endpoint_that_does_not_exist_says_so(world: World) -> None:
    wanted = rollout_inputs(f"{PARENT}/endpoints/nowhere", main=release(world.version().id))
    with pytest.raises(CallFailed, match="There is no endpoint"):
        world.empty_rollout().up(world.plugin, wanted)


def test_two_rollouts_of_two_processes_on_one_endpoint_wait_for_each_other(world: World) -> None:
    """Two runs of one program, as after the loss of its lock. (One endpoint has one rollout, so not two programs.)"""
    old, new = world.two()
    world.sandbox.fault("endpoints.deployModel", "slow", seconds=1)
    stacks = [world.empty_rollout(), world.empty_rollout()]
    wanted = world.releases(main=release(old.id, 50), next=release(new.id, 50))
    gate = threading.Barrier(2)

    def run(stack: Stack, process: Plugin) -> None:
        gate.wait()
        stack.up(process, wanted)

    with Plugin(world.sandbox.url) as second, ThreadPoolExecutor() as pool:
        list(pool.map(run, stacks, (world.plugin, second)))
    assert sorted(world.traffic.values()) == [50, 50]


def test_progress_reaches_the_status_line_of_its_resource(world: World) -> None:
    old = world.version()
    served = world.served(old)
    new = world.version(OTHER_IMAGE)
    world.sandbox.fault("endpoints.deployModel", "slow", seconds=1)
    served.up(world.plugin, world.releases(main=release(new.id)))
    said = [line for line in world.plugin.engine.lines if line.ephemeral and line.urn == served.urn]
    assert any(line.message.startswith("deploying ") and line.message.endswith(" s)") for line in said)
