"""Schedules by the provider as a process, on the sandbox: made, changed, paused, replaced, taken over, deleted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from parameter_template import linear
from vertex_harness import Proxy, options, plugin, sandbox
from vertex_plugin import PARENT, PROJECT, CallFailed, Plugin, Plugins, Stack, Wire

from sandbox.testing import RunningSandbox

pytestmark = pytest.mark.xdist_group("provider's pipelines")
__all__ = ["options", "plugin", "sandbox"]  # fixtures

numbers = itertools.count(1)


@dataclass
class ScheduleWorld:
    """One test's schedule, and those that Vertex AI has under the same name."""

    sandbox: RunningSandbox
    plugin: Plugin
    name: str = field(default_factory=lambda: f"schedule{next(numbers)}")
    before: int = 0

    def __post_init__(self) -> None:
        self.before = len(self.writes())

    def stack(self) -> Stack:
        return Stack(f"urn:pulumi:test::people::vertex:index:Schedule::{self.name}")

    def inputs(self, **more: Any) -> Wire:
        # A schedule that fires once a year starts no run while these tests run.
        given = {"template": linear(), "pipelineRoot": "gs://a-bucket/pipelines", "cron": "0 3 1 1 *", **more}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def there(self) -> list[Wire]:
        found = self.sandbox.do("GET", "schedules").get("schedules", [])
        return [one for one in found if one["displayName"] == self.name]

    @property
    def one(self) -> Wire:
        (found,) = self.there
        return found

    def writes(self) -> list[str]:
        """The methods that have changed schedules of this test, in their order."""
        found = [r for r in self.sandbox.requests() if r["http"] != "GET" and ".schedules." in r["method"]]
        return [r["method"].rpartition(".")[2] for r in found[self.before :]]


@pytest.fixture
def world(sandbox: RunningSandbox, plugin: Plugin) -> Iterator[ScheduleWorld]:
    mine = sandbox.project(PROJECT)
    mine.ask_api("storage", "POST", f"v1/b?project={PROJECT}", {"name": "a-bucket"})
    world = ScheduleWorld(mine, plugin)
    yield world
    unused = sandbox.unused_faults()
    sandbox.clear_faults()
    assert unused == []
    assert world.there == []


@pytest.fixture(scope="module")
def plugins(sandbox: RunningSandbox) -> Iterator[Plugins]:
    with Plugins(sandbox.url) as plugins:
        yield plugins


def test_a_schedule_is_made_changed_in_place_and_deleted(world: ScheduleWorld) -> None:
    stack, wanted = world.stack(), world.inputs(timeZone="Europe/Amsterdam")
    assert stack.up(world.plugin, wanted) == "create"
    made = world.one
    assert stack.id == stack.outputs["name"] == f"{PARENT}/schedules/{made['name'].rpartition('/')[2]}"
    assert (stack.outputs["state"], stack.outputs["createTime"]) == ("ACTIVE", made["createTime"])
    assert stack.outputs["console"].endswith(f"/schedules/{made['name'].rpartition('/')[2]}?project={PROJECT}")
    assert made["cron"] == "TZ=Europe/Amsterdam 0 3 1 1 *"
    assert (made["maxConcurrentRunCount"], made["maxConcurrentActiveRunCount"], made.get("catchUp", False)) == (
        "1", "1", False,
    )  # fmt: skip
    assert any("the next run starts at " in line and "-01-01T03:00:00+01:00" in line for line in world.plugin.lines())
    assert stack.up(world.plugin, wanted) == "same"
    assert stack.refresh(world.plugin) is False
    assert stack.up(world.plugin, wanted) == "same"

    changed = wanted | {
        "cron": "0 4 1 1 *", "parameters": {"text": "bye"}, "maxConcurrentRuns": 2, "maxRunCount": 9,
        "endTime": "2090-01-01T00:00:00Z", "allowQueueing": True, "labels": {"team": "a"},
    }  # fmt: skip
    before = len(world.writes())
    assert stack.up(world.plugin, changed) == "update"
    assert world.writes()[before:] == ["patch"]
    assert world.one["name"] == made["name"]
    assert world.one["cron"] == "TZ=Europe/Amsterdam 0 4 1 1 *"
    assert (world.one["maxConcurrentRunCount"], world.one["maxRunCount"]) == ("2", "9")
    job = world.one["createPipelineJobRequest"]["pipelineJob"]
    assert job["runtimeConfig"]["parameterValues"] == {"text": "bye"}
    assert job["labels"]["team"] == "a"
    assert stack.refresh(world.plugin) is False
    assert stack.up(world.plugin, changed) == "same"
    stack.delete(world.plugin)


def test_a_schedule_is_paused_and_resumed_without_catching_up(world: ScheduleWorld) -> None:
    stack = world.stack()
    stack.up(world.plugin, world.inputs(paused=True))
    assert world.one["state"] == stack.outputs["state"] == "PAUSED"
    assert stack.up(world.plugin, world.inputs(paused=True)) == "same"
    assert stack.up(world.plugin, world.inputs()) == "update"
    assert (world.one["state"], world.one.get("catchUp", False)) == ("ACTIVE", False)
    assert stack.up(world.plugin, world.inputs(paused=True, cron="0 5 1 1 *")) == "update"
    assert (world.one["state"], world.one["cron"]) == ("PAUSED", "TZ=UTC 0 5 1 1 *")
    assert world.writes() == ["create", "pause", "resume", "patch", "pause"]
    stack.delete(world.plugin)


def test_what_was_done_by_hand_is_seen_and_taken_back(world: ScheduleWorld) -> None:
    stack, wanted = world.stack(), world.inputs()
    stack.up(world.plugin, wanted)
    path = f"schedules/{stack.id.rpartition('/')[2]}"
    world.sandbox.do("POST", f"{path}:pause", {})
    world.sandbox.do("PATCH", path, {"cron": "0 6 1 1 *"}, updateMask="cron")
    assert stack.refresh(world.plugin) is True
    assert (stack.inputs["cron"], stack.inputs["paused"], stack.outputs["state"]) == ("0 6 1 1 *", True, "PAUSED")
    assert stack.up(world.plugin, wanted) == "update"
    assert (world.one["cron"], world.one["state"]) == ("TZ=UTC 0 3 1 1 *", "ACTIVE")
    world.sandbox.do("DELETE", path)
    assert stack.refresh(world.plugin) is True
    assert stack.id == ""
    assert stack.up(world.plugin, wanted) == "create"
    stack.delete(world.plugin)


def test_a_schedule_that_caught_up_by_hand_does_so_no_more(world: ScheduleWorld) -> None:
    stack = world.stack()
    stack.up(world.plugin, world.inputs())
    path = f"schedules/{stack.id.rpartition('/')[2]}"
    world.sandbox.do("POST", f"{path}:pause", {})
    world.sandbox.do("POST", f"{path}:resume", {"catchUp": True})
    assert world.one["catchUp"] is True
    stack.up(world.plugin, world.inputs(paused=True))
    stack.up(world.plugin, world.inputs())
    assert world.one.get("catchUp", False) is False
    stack.delete(world.plugin)


def test_an_earlier_schedule_whose_state_was_lost_and_that_cannot_be_changed_is_removed(world: ScheduleWorld) -> None:
    world.stack().up(world.plugin, world.inputs(maxRunCount=3))
    old, stack = world.one["name"], world.stack()
    assert stack.up(world.plugin, world.inputs()) == "create"
    assert world.one["name"] != old
    assert "__claim" not in stack.outputs
    stack.delete(world.plugin)


@pytest.mark.parametrize(
    "limit",
    [{"maxRunCount": 3}, {"endTime": "2090-01-01T00:00:00Z"}, {"startTime": "2090-01-01T00:00:00Z"}],
    ids=lambda limit: next(iter(limit)),
)
def test_a_limit_that_is_taken_away_makes_a_new_schedule(world: ScheduleWorld, limit: Wire) -> None:
    stack = world.stack()
    stack.up(world.plugin, world.inputs(**limit))
    old = stack.id
    assert stack.up(world.plugin, world.inputs()) == "replace"
    assert stack.id != old
    assert not limit.items() & world.one.items()
    assert any("counts its runs from 0" in line for line in world.plugin.lines())
    stack.delete(world.plugin)


def test_a_schedule_that_never_fires_is_refused_before_anything_is_made(world: ScheduleWorld) -> None:
    stack = world.stack()
    for wrong, path in (
        ({"cron": "0 3 31 2 *"}, "cron"),
        ({"cron": "0 0 3 * * *"}, "cron"),
        ({"timeZone": "X"}, "timeZone"),
    ):
        assert path in stack.failures(world.plugin, world.inputs(**wrong))
    over = world.inputs(endTime="2001-01-01T00:00:00Z")
    for preview in (True, False):
        with pytest.raises(CallFailed, match=r"the schedule never fires: .* Set a later endTime, or leave it out\."):
            stack.up(world.plugin, over, preview=preview)
    assert world.writes() == []


def test_a_schedule_is_imported_by_its_name(world: ScheduleWorld) -> None:
    stack, wanted = world.stack(), world.inputs(parameters={"text": "x"}, displayName=world.name, paused=True)
    stack.up(world.plugin, wanted)
    imported = Stack(stack.urn, id=stack.id)
    imported.refresh(world.plugin)
    assert imported.up(world.plugin, wanted) == "same"
    wrong = Stack(stack.urn, id="nightly")
    with pytest.raises(CallFailed, match="Give projects/PROJECT/locations/LOCATION/schedules/ID"):
        wrong.refresh(world.plugin)
    imported.delete(world.plugin)


# --- kills, lost answers, and two states with one schedule


def test_a_create_whose_state_was_lost_takes_the_schedule_over_and_brings_it_up_to_date(world: ScheduleWorld) -> None:
    world.stack().up(world.plugin, world.inputs())
    stack = world.stack()
    assert stack.up(world.plugin, world.inputs(cron="0 4 1 1 *", paused=True)) == "create"
    assert (world.one["cron"], world.one["state"]) == ("TZ=UTC 0 4 1 1 *", "PAUSED")
    assert any("was made by an earlier run, and is taken over" in line for line in world.plugin.lines())
    assert stack.up(world.plugin, world.inputs(cron="0 4 1 1 *", paused=True)) == "same"
    stack.delete(world.plugin)


@pytest.mark.parametrize("refreshed", [False, True])
def test_a_forced_replacement_keeps_the_schedule(world: ScheduleWorld, plugins: Plugins, refreshed: bool) -> None:
    """Two states have it then, also for another process, and the deletion of the older one must not remove it."""
    stack, wanted = world.stack(), world.inputs()
    stack.up(world.plugin, wanted)
    kept = stack.id
    assert stack.up(world.plugin, wanted, force=True, deletes=False) == "replace"
    later = plugins.take()
    if refreshed:
        stack.refresh(later)
    assert stack.up(later, wanted) == "same"
    assert stack.id == kept
    assert len(world.there) == 1
    stack.delete(later)


@pytest.mark.parametrize(
    ("method", "when"),
    [("create", "before"), ("create", "after"), ("patch", "after"), ("pause", "after"), ("delete", "after")],
)
def test_a_lost_answer_makes_no_second_schedule_and_leaves_none(world: ScheduleWorld, method: str, when: str) -> None:
    stack = world.stack()
    world.sandbox.fault(f"schedules.{method}", "drop", when=when)
    stack.up(world.plugin, world.inputs())
    assert len(world.there) == 1
    stack.up(world.plugin, world.inputs(cron="0 4 1 1 *", paused=True))
    assert (world.one["cron"], world.one["state"]) == ("TZ=UTC 0 4 1 1 *", "PAUSED")
    stack.delete(world.plugin)


def test_a_create_that_could_not_pause_is_repaired_by_the_next_up(world: ScheduleWorld) -> None:
    stack, wanted = world.stack(), world.inputs(paused=True)
    world.sandbox.fault("schedules.pause", "refuse", status="PERMISSION_DENIED", message="Not you.")
    with pytest.raises(CallFailed, match="Not you") as failed:
        stack.up(world.plugin, wanted)
    assert failed.value.half.id == stack.id
    assert stack.up(world.plugin, wanted) == "update"
    assert len(world.there) == 1
    assert world.one["state"] == stack.outputs["state"] == "PAUSED"
    stack.delete(world.plugin)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_call_of_a_create_and_run_again_there_is_one_schedule(world: ScheduleWorld) -> None:
    proxy = Proxy(world.sandbox.url)
    started = Plugins(proxy.url)
    points = 0
    try:
        for when in ("before", "after"):
            for number in itertools.count():
                one = ScheduleWorld(world.sandbox, world.plugin)
                stack, wanted = one.stack(), one.inputs(paused=True)
                killed = started.take()
                proxy.arm(when, number, killed.kill)
                try:
                    stack.up(killed, wanted)
                except CallFailed:
                    assert proxy.acted
                proxy.armed = None
                stack.up(world.plugin, wanted)
                assert [there["state"] for there in one.there] == ["PAUSED"]
                stack.delete(world.plugin)
                assert one.there == []
                if not proxy.acted:
                    break
                points += 1
    finally:
        proxy.close()
        started.close()
    assert points >= 4
