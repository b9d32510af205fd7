"""Ctrl-C, `pulumi cancel`, a timeout: started work is in the state, and the next run destroys or continues it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import eventually
from vertex_harness import Proxy, World, in_background, options, plugin, release, sandbox, version_inputs, world
from vertex_plugin import OTHER_IMAGE, PARENT, CallFailed, Plugin, Plugins, Stack, Wire

from sandbox.testing import RunningSandbox

__all__ = ["options", "plugin", "sandbox", "world"]  # fixtures

DEPLOY, UPLOAD = "endpoints.deployModel", "models.upload"


@pytest.fixture(scope="module")
def plugins(sandbox: RunningSandbox) -> Plugins:
    return Plugins(sandbox.url)


@pytest.fixture(scope="module", autouse=True)
def _closed(plugins: Plugins) -> object:
    yield
    plugins.close()


def interrupt(world: World, plugins: Plugins, stack: Stack, wanted: Wire, method: str, resource: str) -> CallFailed:
    """`pulumi up` stopped by Ctrl-C while an operation runs, which goes on. The error that it ends with."""
    before = world.cloud.requests(method)
    world.sandbox.fault(method, "hold", match=resource)
    stopped = plugins.take()
    with in_background(lambda: stack.up(stopped, wanted)) as failed:
        assert eventually(lambda: world.cloud.requests(method) > before)
        stopped.cancel()
    (error,) = failed
    assert isinstance(error, CallFailed)
    return error


def time_out(world: World, plugins: Plugins, stack: Stack, wanted: Wire, method: str, resource: str) -> CallFailed:
    world.sandbox.fault(method, "hold", match=resource)
    with pytest.raises(CallFailed, match="Not done within 2 s") as failed:
        stack.up(world.plugin, wanted, timeout=2)
    return failed.value


def attached(world: World, stack: Stack) -> bool:
    """Whether the provider waits for an operation of an earlier run."""
    lines = [line.message for line in world.plugin.engine.lines if line.urn == stack.urn]
    return any("already running" in line for line in lines)


Ending = Callable[[World, Plugins, Stack, Wire, str, str], CallFailed]
ENDINGS: list[Ending] = [interrupt, time_out]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_first_deployment_that_was_not_waited_for_is_continued(
    world: World, plugins: Plugins, ending: Ending
) -> None:
    version, rollout = world.version(), world.empty_rollout()
    wanted = world.releases(main=release(version.id))
    error = ending(world, plugins, rollout, wanted, DEPLOY, world.endpoint)
    assert "next `pulumi up` continues" in str(error)
    assert error.half.id == world.endpoint == rollout.id
    with in_background(lambda: rollout.up(world.plugin, wanted)) as failed:
        assert eventually(lambda: attached(world, rollout))
        world.sandbox.release()
    assert failed == []
    assert list(world.deployed.values()) == [(world.named(1), 100)]
    assert world.cloud.requests(DEPLOY, world.endpoint) == 1
    assert world.cloud.refused(DEPLOY, world.endpoint) == 0
    assert rollout.up(world.plugin, wanted) == "same"
    assert rollout.refresh(world.plugin) is False


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_first_deployment_that_was_not_waited_for_is_destroyed(
    world: World, plugins: Plugins, ending: Ending, refreshed: bool
) -> None:
    version, rollout = world.version(), world.empty_rollout()
    ending(world, plugins, rollout, world.releases(main=release(version.id)), DEPLOY, world.endpoint)
    if refreshed:
        rollout.refresh(world.plugin)
    with in_background(lambda: rollout.delete(world.plugin)) as failed:
        assert world.cloud.running(world.endpoint) == 1
        world.sandbox.release()
    assert failed == []
    assert world.deployed == {}
    version.delete(world.plugin)
    world.cloud.endpoints.delete_endpoint(name=world.endpoint).result(timeout=30)


def test_a_stop_leaves_the_traffic_and_says_what_goes_on(world: World, plugins: Plugins) -> None:
    old, new = world.two()
    served = world.served(old)
    error = interrupt(world, plugins, served, world.releases(main=release(new.id)), DEPLOY, world.endpoint)
    assert "The deployment goes on" in str(error)
    assert world.traffic == {world.named(1): 100}
    world.sandbox.release()
    # One changes one's mind: the new release is not wanted any more.
    served.up(world.plugin, world.releases(main=release(old.id)))
    assert list(world.deployed.values()) == [(world.named(1), 100)]


def test_a_stop_before_anything_was_started_leaves_no_state(world: World, plugins: Plugins) -> None:
    version, rollout = world.version(), world.empty_rollout()
    stopped = plugins.take()
    stopped.cancel()
    with pytest.raises(CallFailed, match=r"Stopped\. The next `pulumi up` continues from there") as failed:
        rollout.up(stopped, world.releases(main=release(version.id)))
    assert failed.value.half is None
    assert rollout.id == ""


def test_a_stop_between_the_steps_keeps_what_is_deployed(world: World, plugins: Plugins) -> None:
    """Ctrl-C just after the request for the first deployment was sent, and before its answer came."""
    version, rollout = world.version(), world.empty_rollout()
    proxy = Proxy(world.sandbox.url)
    with Plugin(proxy.url) as stopped:
        proxy.arm("after", 0, stopped.cancel)
        with pytest.raises(CallFailed) as failed:
            rollout.up(stopped, world.releases(main=release(version.id)))
    proxy.close()
    assert failed.value.half.id == world.endpoint
    rollout.delete(world.plugin)
    assert world.deployed == {}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_upload_that_was_not_waited_for_is_continued(world: World, plugins: Plugins, ending: Ending) -> None:
    version, wanted = world.stack(), version_inputs(world.model, aliases=["live"])
    error = ending(world, plugins, version, wanted, UPLOAD, f'"{world.model}"')
    assert "The upload goes on" in str(error)
    assert f"/models/{world.model}/operations/" in version.id
    assert version.up(world.plugin, wanted, preview=True) == "replace"
    with in_background(lambda: version.up(world.plugin, wanted)) as failed:
        assert eventually(lambda: attached(world, version))
        world.sandbox.release()
    assert failed == []
    assert version.id == f"{PARENT}/models/{world.model}@1"
    assert version.outputs["versionAliases"] == ["default", "live"]
    assert [v.version_id for v in world.cloud.versions(world.model)] == ["1"]
    assert version.up(world.plugin, wanted) == "same"
    version.delete(world.plugin)
    assert world.cloud.versions(world.model) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_upload_that_was_not_waited_for_is_destroyed(world: World, plugins: Plugins, ending: Ending) -> None:
    version = world.stack()
    ending(world, plugins, version, version_inputs(world.model), UPLOAD, f'"{world.model}"')
    assert version.refresh(world.plugin) is False  # still running
    with in_background(lambda: version.delete(world.plugin)) as failed:
        world.sandbox.release()
    assert failed == []
    assert world.cloud.versions(world.model) == []


def test_an_upload_that_has_ended_meanwhile_is_refreshed_to_its_version(world: World, plugins: Plugins) -> None:
    version, wanted = world.stack(), version_inputs(world.model)
    interrupt(world, plugins, version, wanted, UPLOAD, f'"{world.model}"')
    world.sandbox.release()
    assert eventually(lambda: world.cloud.versions(world.model))
    assert version.refresh(world.plugin) is True
    assert version.id == f"{PARENT}/models/{world.model}@1"
    assert version.up(world.plugin, wanted) == "same"


def test_an_upload_that_has_failed_meanwhile_is_refreshed_away(world: World, plugins: Plugins) -> None:
    version, wanted = world.stack(), version_inputs(world.model)
    interrupt(world, plugins, version, wanted, UPLOAD, f'"{world.model}"')
    world.sandbox.do("POST", f"v1/{version.id}:cancel")
    assert eventually(lambda: "done" in world.sandbox.do("GET", f"v1/{version.id}"))
    version.refresh(world.plugin)
    assert version.id == ""


def test_a_second_upload_that_was_not_waited_for_leaves_the_first_version_alone(world: World, plugins: Plugins) -> None:
    version = world.version()
    interrupt(
        world, plugins, version, version_inputs(world.model, OTHER_IMAGE), UPLOAD, f'"{PARENT}/models/{world.model}"'
    )
    assert len(version.replaced) == 1
    world.sandbox.release()
    version.delete(world.plugin)
    assert world.cloud.versions(world.model) == []


def test_a_deployment_of_an_earlier_run_that_fails_is_told_and_not_repeated(world: World, plugins: Plugins) -> None:
    broken = world.version(env={"STUB_HEALTH": "exit", "STUB_LOG": "no such file: model.pt"})
    rollout = world.empty_rollout()
    wanted = world.releases(main=release(broken.id))
    interrupt(world, plugins, rollout, wanted, DEPLOY, world.endpoint)
    with in_background(lambda: rollout.up(world.plugin, wanted)) as failed:
        assert eventually(lambda: attached(world, rollout))
        world.sandbox.release()
    (error,) = failed
    assert "no such file: model.pt" in str(error)
    assert "An earlier run had started it" in str(error)
    assert world.cloud.requests(DEPLOY, world.endpoint) == 1
    assert world.deployed == {}
    rollout.delete(world.plugin)
