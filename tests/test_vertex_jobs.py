"""Jobs by the provider as a process, on the sandbox: they run once, are waited for, repaired, taken over, deleted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from helpers import eventually
from vertex_harness import Proxy, in_background, options, plugin, sandbox
from vertex_jobs import JobWorld
from vertex_plugin import OTHER_IMAGE, PARENT, PROJECT, CallFailed, Plugin, Plugins, Stack

from sandbox.testing import RunningSandbox

__all__ = ["options", "plugin", "sandbox"]  # fixtures


@pytest.fixture
def world(sandbox: RunningSandbox, plugin: Plugin) -> Iterator[JobWorld]:
    """At its end every ordered fault must have been met."""
    world = JobWorld(sandbox.project(PROJECT), plugin)
    yield world
    unused = sandbox.unused_faults()
    sandbox.clear_faults()
    sandbox.release()
    assert unused == []


@pytest.fixture(scope="module")
def plugins(sandbox: RunningSandbox) -> Iterator[Plugins]:
    with Plugins(sandbox.url) as plugins:
        yield plugins


def test_a_job_runs_once_and_tells_what_came_out(world: JobWorld) -> None:
    stack, wanted = world.stack(), world.inputs(env={"STUB_LOG": "step 7 of 9"})
    world.up_held(stack, wanted, "running, ", " s: step 7 of 9")
    (job,) = world.there
    assert stack.id == stack.outputs["name"] == f"{PARENT}/customJobs/{job['name'].rpartition('/')[2]}"
    assert stack.outputs["state"] == "SUCCEEDED"
    assert [stack.outputs[when] for when in ("createTime", "startTime", "endTime")] == [
        job[when] for when in ("createTime", "startTime", "endTime")
    ]
    directory = job["jobSpec"]["baseOutputDirectory"]["outputUriPrefix"]
    assert stack.outputs["outputDirectory"] == directory == f"gs://a-bucket/out/{job['labels']['pulumi_job']}"
    assert stack.outputs["artifactUri"] == f"{directory}/model"
    assert any(job["name"].rpartition("/")[2] in line and "https://console" in line for line in world.plugin.lines())
    assert stack.up(world.plugin, wanted) == "same"
    assert stack.refresh(world.plugin) is False
    assert stack.up(world.plugin, wanted) == "same"
    stack.delete(world.plugin)
    assert world.there == []


def test_another_specification_runs_anew_and_the_old_record_goes_last(world: JobWorld) -> None:
    stack = world.stack()
    stack.up(world.plugin, world.inputs("--steps=1"))
    (old,) = world.there
    before = len(world.writes())
    assert stack.up(world.plugin, world.inputs("--steps=1", image=OTHER_IMAGE)) == "replace"
    (new,) = world.there
    assert old["name"] != new["name"]
    assert world.writes()[before:] == ["create", "delete"]
    assert stack.outputs["outputDirectory"] != old["jobSpec"]["baseOutputDirectory"]["outputUriPrefix"]
    stack.delete(world.plugin)


def test_what_is_no_specification_changes_in_place_and_says_so(world: JobWorld) -> None:
    stack = world.stack()
    stack.up(world.plugin, world.inputs())
    assert stack.up(world.plugin, world.inputs(labels={"a": "b"}, displayName=world.name, wait=False)) == "update"
    assert len(world.there) == 1
    assert any("displayName and labels of a job" in line for line in world.plugin.lines())
    stack.delete(world.plugin)


def test_a_failed_job_says_why_and_the_next_up_runs_it_again(world: JobWorld) -> None:
    stack, wanted = world.stack(), world.inputs(env={"STUB_LOG": "reading adult.data"})
    world.fail("The replica ran out of memory.")
    with pytest.raises(CallFailed) as failed:
        stack.up(world.plugin, wanted)
    said = str(failed.value)
    page = f"https://console.cloud.google.com/agent-platform/locations/europe-west4/training/{stack.id[-19:]}?project="
    first, second, third, *lines = said.splitlines()
    assert first == f"The job has failed, and the next `pulumi up` runs it again: {page}{PROJECT}"
    assert (second, third) == ("The replica ran out of memory.", "The last lines of its log:")
    assert second not in lines, "the log says so too, and once is enough"
    assert "reading adult.data" in said
    assert stack.outputs["state"] == "FAILED"
    assert failed.value.half.id == stack.id
    assert stack.up(world.plugin, wanted, preview=True) == "replace"
    assert stack.up(world.plugin, wanted) == "replace"
    assert world.states == ["SUCCEEDED"]
    assert stack.up(world.plugin, wanted) == "same"
    stack.delete(world.plugin)


def test_a_job_that_always_fails_leaves_nothing_when_it_is_destroyed(world: JobWorld) -> None:
    stack, wanted = world.stack(), world.inputs(env={"STUB_EXIT": "3", "STUB_ERRORS": "ValueError: no rows"})
    for attempt in (1, 2):
        with pytest.raises(CallFailed, match="exited with a non-zero status of 3") as failed:
            stack.up(world.plugin, wanted)
        assert str(failed.value).count("ValueError: no rows") == 1
        assert world.states == ["FAILED"] * attempt
    stack.delete(world.plugin)
    assert world.there == []


def test_a_create_whose_state_was_lost_takes_the_job_over(world: JobWorld) -> None:
    wanted = world.inputs()
    world.stack().up(world.plugin, wanted)
    stack = world.stack()
    assert stack.up(world.plugin, wanted) == "create"
    assert world.states == ["SUCCEEDED"]
    assert stack.up(world.plugin, wanted) == "same"
    stack.delete(world.plugin)
    assert world.there == []


def test_a_create_whose_state_was_lost_waits_for_the_job_that_runs(world: JobWorld) -> None:
    wanted, stack = world.inputs(), world.stack()
    world.hold()
    world.stack().up(world.plugin, wanted | {"wait": False})
    with in_background(lambda: stack.up(world.plugin, wanted)) as failed:
        assert eventually(lambda: any("earlier run" in line for line in world.plugin.lines()))
        world.sandbox.release()
    assert failed == []
    assert world.states == ["SUCCEEDED"]
    assert stack.outputs["state"] == "SUCCEEDED"
    stack.delete(world.plugin)


def test_a_create_whose_state_was_lost_runs_a_failed_job_again(world: JobWorld) -> None:
    wanted = world.inputs()
    world.fail()
    with pytest.raises(CallFailed):
        world.stack().up(world.plugin, wanted)
    stack = world.stack()
    stack.up(world.plugin, wanted)
    assert world.states == ["FAILED", "SUCCEEDED"]
    stack.delete(world.plugin)


def test_after_ctrl_c_the_job_goes_on_and_the_next_up_waits_for_it(world: JobWorld, plugins: Plugins) -> None:
    stack, wanted = world.stack(), world.inputs()
    world.hold()
    error = world.stop(plugins, stack, wanted)
    assert "The job goes on: the next `pulumi up` waits for it, and `pulumi destroy` cancels it." in str(error)
    assert error.half.id == stack.id
    assert stack.outputs["state"] in ("QUEUED", "PENDING", "RUNNING")  # as it was last seen
    stack.refresh(world.plugin)
    assert stack.outputs["state"] == "RUNNING"
    assert stack.up(world.plugin, wanted, preview=True) == "update"
    with in_background(lambda: stack.up(world.plugin, wanted)) as failed:
        assert eventually(lambda: any(line.urn == stack.urn for line in world.plugin.engine.lines))
        world.sandbox.release()
    assert failed == []
    assert (world.states, stack.outputs["state"]) == (["SUCCEEDED"], "SUCCEEDED")
    assert stack.up(world.plugin, wanted) == "same"
    stack.delete(world.plugin)


def test_a_job_that_failed_after_ctrl_c_says_so_and_then_runs_again(world: JobWorld, plugins: Plugins) -> None:
    stack, wanted = world.stack(), world.inputs(env={"STUB_EXIT": "1", "STUB_SECONDS": "2"})
    world.stop(plugins, stack, wanted)
    with pytest.raises(CallFailed, match="The job has failed"):
        stack.up(world.plugin, wanted)
    assert stack.outputs["state"] == "FAILED"
    assert stack.up(world.plugin, wanted, preview=True) == "replace"
    stack.delete(world.plugin)
    assert world.there == []


def test_ctrl_c_cancels_the_job_where_that_is_wanted(world: JobWorld, plugins: Plugins) -> None:
    stack, wanted = world.stack(), world.inputs(cancelOnInterrupt=True)
    world.hold()
    error = world.stop(plugins, stack, wanted)
    assert "The job was cancelled. The next `pulumi up` runs it again." in str(error)
    assert stack.up(world.plugin, wanted) == "replace"
    assert world.states == ["SUCCEEDED"]
    stack.delete(world.plugin)


def test_a_timeout_of_the_program_s_own_leaves_the_job_running(world: JobWorld) -> None:
    stack, wanted = world.stack(), world.inputs()
    world.hold()
    with pytest.raises(CallFailed, match="Not done within 2 s") as failed:
        stack.up(world.plugin, wanted, timeout=2)
    assert "The job goes on" in str(failed.value)
    stack.delete(world.plugin)
    assert world.there == []


def test_a_job_that_is_not_waited_for_is_deleted_while_it_runs(world: JobWorld) -> None:
    stack = world.stack()
    world.hold()
    assert stack.up(world.plugin, world.inputs(wait=False)) == "create"
    assert stack.outputs["state"] in ("QUEUED", "PENDING", "RUNNING")
    assert stack.up(world.plugin, world.inputs(wait=False)) == "same"
    state = stack.state
    stack.delete(world.plugin)
    assert world.there == []
    stack.delete_again(world.plugin, state)


def test_a_replacement_of_a_job_that_runs_says_that_it_is_cancelled(world: JobWorld) -> None:
    stack = world.stack()
    world.hold()
    stack.up(world.plugin, world.inputs(wait=False))
    assert stack.up(world.plugin, world.inputs("--steps=2")) == "replace"
    assert f"{world.stack().urn}" in stack.urn
    assert any("still runs. It is cancelled when the new job" in line for line in world.plugin.lines())
    assert world.states == ["SUCCEEDED"]
    stack.delete(world.plugin)


def test_a_refresh_sees_what_happened_by_hand(world: JobWorld) -> None:
    stack, wanted = world.stack(), world.inputs()
    world.hold()
    stack.up(world.plugin, wanted | {"wait": False})
    path = f"customJobs/{stack.id.rpartition('/')[2]}"
    world.sandbox.do("POST", f"{path}:cancel", {})
    assert eventually(lambda: world.states == ["CANCELLED"])
    assert stack.refresh(world.plugin) is True
    assert stack.outputs["state"] == "CANCELLED"
    assert stack.up(world.plugin, wanted) == "replace"
    assert world.states == ["SUCCEEDED"]
    world.sandbox.do("DELETE", f"customJobs/{stack.id.rpartition('/')[2]}")
    assert stack.refresh(world.plugin) is True
    assert stack.id == ""
    assert stack.up(world.plugin, wanted) == "create"
    stack.delete(world.plugin)


def test_a_job_that_was_deleted_while_it_is_waited_for_is_no_half_made_one(world: JobWorld) -> None:
    stack, wanted = world.stack(), world.inputs()
    world.hold()
    stack.up(world.plugin, wanted | {"wait": False})
    held = stack.state
    stack.delete(world.plugin)
    stack.id, stack.inputs, stack.outputs = held.id, held.inputs, held.outputs
    with pytest.raises(CallFailed, match=r"is gone\. Run `pulumi refresh`, then `pulumi up`") as failed:
        stack.up(world.plugin, wanted)
    assert failed.value.half is None


@pytest.mark.parametrize(
    ("method", "when"),
    [("create", "before"), ("create", "after"), ("get", "before"), ("list", "after")],
)
def test_a_lost_answer_starts_no_second_job(world: JobWorld, method: str, when: str) -> None:
    stack = world.stack()
    world.drop(method, when)
    stack.up(world.plugin, world.inputs())
    assert world.states == ["SUCCEEDED"]
    assert "__claim" not in stack.outputs
    stack.delete(world.plugin)


@pytest.mark.parametrize(
    ("method", "when"), [("cancel", "before"), ("cancel", "after"), ("delete", "before"), ("delete", "after")]
)
def test_a_lost_answer_leaves_no_job(world: JobWorld, method: str, when: str) -> None:
    stack = world.stack()
    world.hold()
    stack.up(world.plugin, world.inputs(wait=False))
    world.drop(method, when)
    stack.delete(world.plugin)
    assert world.there == []


def test_a_log_that_may_not_be_read_stops_no_job(world: JobWorld) -> None:
    stack = world.stack()
    full = "logging.entries.list"
    world.sandbox.admin("POST", "faults", {
        "method": full, "kind": "refuse", "status": "PERMISSION_DENIED", "message": "Not you.", "count": 100,
    })  # fmt: skip
    world.fail()
    with pytest.raises(CallFailed, match=r"Its log could not be read, which needs roles/logging.viewer: .*Not you\."):
        stack.up(world.plugin, world.inputs(env={"STUB_SECONDS": "1"}))
    world.sandbox.clear_faults()
    stack.delete(world.plugin)


def test_a_job_is_imported_by_its_name(world: JobWorld) -> None:
    stack, wanted = world.stack(), world.inputs("--steps=1", labels={"a": "b"}, displayName=world.name)
    del wanted["env"]
    stack.up(world.plugin, wanted)
    imported = Stack(stack.urn, id=stack.id)
    imported.refresh(world.plugin)
    assert imported.inputs == wanted | {"bootDiskGb": 100, "replicas": 1}
    assert imported.up(world.plugin, wanted) == "same"
    wrong = Stack(stack.urn, id="census")
    with pytest.raises(CallFailed, match="Give projects/PROJECT/locations/LOCATION/customJobs/ID"):
        wrong.refresh(world.plugin)
    imported.delete(world.plugin)
    assert world.there == []


# --- two states with one job


def test_a_forced_replacement_takes_the_job_over_and_keeps_it(world: JobWorld) -> None:
    stack, wanted = world.stack(), world.inputs()
    stack.up(world.plugin, wanted)
    assert stack.up(world.plugin, wanted, force=True) == "replace"
    assert world.states == ["SUCCEEDED"]
    assert stack.up(world.plugin, wanted) == "same"
    stack.delete(world.plugin)
    assert world.there == []


Run = Callable[[JobWorld, Plugins], Plugin]
SAME: Run = lambda world, plugins: world.plugin  # noqa: E731
OTHER: Run = lambda world, plugins: plugins.take()  # noqa: E731


@pytest.mark.parametrize("later", [SAME, OTHER], ids=["same process", "another process"])
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_change_that_failed_is_taken_back_to_the_job_that_succeeded(
    world: JobWorld, plugins: Plugins, later: Run, refreshed: bool
) -> None:
    """Two states have one job then, and the deletion of the replaced one must not remove it."""
    stack, first = world.stack(), world.inputs("--steps=1")
    stack.up(world.plugin, first)
    (job,) = world.there
    world.fail()
    with pytest.raises(CallFailed):
        stack.up(world.plugin, world.inputs("--steps=2"))
    assert stack.up(world.plugin, first, deletes=False) == "replace"
    assert [stack.id, *(s.id for s in stack.replaced)].count(stack.id) == 2
    process = later(world, plugins)
    if refreshed:
        stack.refresh(process)
    assert stack.up(process, first) == "same"
    assert [found["name"] for found in world.there] == [job["name"]]
    stack.delete(process)
    assert world.there == []


@pytest.mark.parametrize("refreshed", [False, True])
def test_destroy_deletes_a_job_that_two_states_have(world: JobWorld, plugins: Plugins, refreshed: bool) -> None:
    stack, wanted = world.stack(), world.inputs()
    stack.up(world.plugin, wanted)
    stack.up(world.plugin, wanted, force=True, deletes=False)
    process = plugins.take()
    if refreshed:
        stack.refresh(process)
    stack.delete(process)
    assert world.there == []


# --- kills


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_call_of_a_create_and_run_again_there_is_one_job(world: JobWorld) -> None:
    """Also after the calls that only read: the kill then meets a job that runs."""
    proxy = Proxy(world.sandbox.url)
    started = Plugins(proxy.url)
    points = 0
    try:
        for when in ("before", "after"):
            proxy.writes_only = when == "before"
            for number in itertools.count():
                one = JobWorld(world.sandbox, world.plugin)
                stack, wanted = one.stack(), one.inputs(env={"STUB_SECONDS": "0.3"})
                killed = started.take()
                proxy.arm(when, number, killed.kill)
                try:
                    stack.up(killed, wanted)
                except CallFailed:
                    assert proxy.acted
                proxy.armed = None
                stack.up(world.plugin, wanted)
                assert one.states == ["SUCCEEDED"]
                stack.delete(world.plugin)
                assert one.there == []
                if not proxy.acted:
                    break
                points += 1
    finally:
        proxy.close()
        started.close()
    assert points >= 6
