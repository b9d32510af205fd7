"""No deletion removes a resource that a later create has taken over, or leaves one that has no owner.

Each test ends with a real deletion, after which nothing is left. The engine's own behaviour in these cases is in
test_vertex_engine.py.
"""

from __future__ import annotations

import contextlib

import pytest
from vertex_harness import World, options, plugin, release, sandbox, version_inputs, world
from vertex_plugin import OTHER_IMAGE, CallFailed, Plugin, Stack, Wire

__all__ = ["options", "plugin", "sandbox", "world"]  # fixtures


class Pair:
    """A version and a rollout of it, as one stack."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.version = world.version()
        self.rollout = world.served(self.version)

    def both(self) -> list[tuple[Stack, Wire]]:
        return [(self.version, self.version.inputs), (self.rollout, self.rollout.inputs)]

    def up(self, plugin: Plugin, **options: bool) -> list[str]:
        return [stack.up(plugin, inputs, **options) for stack, inputs in self.both()]

    def refresh(self, plugin: Plugin) -> None:
        for stack, _ in self.both():
            stack.refresh(plugin)

    def serves(self) -> None:
        assert self.world.traffic == {self.world.named(1): 100}
        assert [v.version_id for v in self.world.cloud.versions(self.world.model)] == ["1"]

    def destroy(self, plugin: Plugin) -> None:
        self.rollout.delete(plugin)
        self.version.delete(plugin)

    def gone(self) -> None:
        assert self.world.deployed == {}
        assert self.world.cloud.versions(self.world.model) == []
        assert "pulumi-claim" not in self.world.cloud.look(self.world.endpoint).labels


@pytest.fixture
def pair(world: World) -> Pair:
    return Pair(world)


def test_what_is_destroyed_after_a_refresh_is_gone(pair: Pair, world: World) -> None:
    pair.refresh(world.plugin)  # `destroy --refresh`: in the process that then deletes
    pair.destroy(world.plugin)
    pair.gone()


def test_labels_of_the_endpoint_that_others_set_stay(pair: Pair, world: World) -> None:
    pair.up(world.plugin, force=True, deletes=False)
    for stack, _ in reversed(pair.both()):
        stack.delete_replaced(world.plugin)
    endpoint = world.cloud.look(world.endpoint)
    assert list(endpoint.labels) == ["pulumi-claim"]
    theirs = {"a-team": "people", "z-team": "vision"}
    endpoint.labels.update(theirs)
    world.cloud.endpoints.update_endpoint(endpoint=endpoint, update_mask="labels")
    pair.destroy(world.plugin)
    assert dict(world.cloud.look(world.endpoint).labels) == theirs


def test_an_up_with_a_refresh_changes_nothing(pair: Pair, world: World) -> None:
    pair.refresh(world.plugin)
    assert pair.up(world.plugin) == ["same", "same"]
    pair.serves()
    pair.destroy(world.plugin)
    pair.gone()


@pytest.mark.parametrize("refreshes", [False, True])
@pytest.mark.parametrize("runs_the_program", [False, True])
@pytest.mark.parametrize("other_process", [False, True])
def test_a_forced_replacement_deletes_nothing_that_serves(
    pair: Pair, world: World, refreshes: bool, runs_the_program: bool, other_process: bool
) -> None:
    """Independent of the history of the deleting process, which is a new one after a kill or for another provider."""
    assert pair.up(world.plugin, force=True, deletes=False) == ["replace", "replace"]
    assert [len(stack.replaced) for stack, _ in pair.both()] == [1, 1]
    with Plugin(world.sandbox.url) if other_process else contextlib.nullcontext(world.plugin) as next_run:
        if refreshes:
            pair.refresh(next_run)
        if runs_the_program:
            assert pair.up(next_run) == ["same", "same"]
        for stack, _ in reversed(pair.both()):
            stack.delete_replaced(next_run)
    pair.serves()
    assert pair.up(world.plugin) == ["same", "same"]
    assert pair.version.outputs["versionAliases"] == ["default"]  # a claim is no alias of the user's
    pair.destroy(world.plugin)
    pair.gone()


@pytest.mark.parametrize("refreshed", [False, True])
def test_destroyed_before_the_replaced_was_deleted_everything_is_gone(
    pair: Pair, world: World, refreshed: bool
) -> None:
    pair.up(world.plugin, force=True, deletes=False)
    with Plugin(world.sandbox.url) as next_run:
        if refreshed:
            pair.refresh(next_run)
        pair.destroy(next_run)
    pair.gone()


def test_the_live_one_survives_where_only_the_replaced_is_deleted(pair: Pair, world: World) -> None:
    """As in a destroy that is stopped, or that fails at the live resource."""
    pair.up(world.plugin, force=True, deletes=False)
    for stack, _ in reversed(pair.both()):
        stack.delete_replaced(world.plugin)
    pair.serves()
    pair.destroy(world.plugin)
    pair.gone()


def test_forced_replacements_in_a_row_keep_what_serves(pair: Pair, world: World) -> None:
    for _ in range(3):
        pair.up(world.plugin, force=True, deletes=False)
    assert [len(stack.replaced) for stack, _ in pair.both()] == [3, 3]
    pair.up(world.plugin)
    pair.serves()
    pair.destroy(world.plugin)
    pair.gone()


def test_a_change_that_is_taken_back_after_a_failed_update_keeps_what_serves(pair: Pair, world: World) -> None:
    first = pair.version.inputs
    pair.version.up(world.plugin, version_inputs(world.model, OTHER_IMAGE), deletes=False)
    assert pair.version.id.endswith("@2")
    # The rollout of it fails, so nothing is deleted; the next run has the old image again.
    pair.version.up(world.plugin, first, deletes=False)
    assert pair.version.id.endswith("@1")
    with Plugin(world.sandbox.url) as next_run:
        assert pair.up(next_run) == ["same", "same"]
    pair.serves()
    pair.destroy(world.plugin)
    pair.gone()


def test_an_endpoint_that_was_left_and_is_come_back_to_keeps_what_serves(pair: Pair, world: World) -> None:
    back, version = pair.rollout.inputs, pair.version.id
    second = world.cloud.endpoint(f"e-{world.model}-b")
    away = {**back, "endpoint": second}
    pair.rollout.up(world.plugin, away, deletes=False)
    pair.rollout.up(world.plugin, back, deletes=False)
    pair.rollout.up(world.plugin, back)
    pair.serves()
    assert world.cloud.deployed(second) == {}
    assert version == pair.version.id
    pair.destroy(world.plugin)
    pair.gone()


def test_what_is_deployed_after_an_empty_rollout_was_replaced_stays(world: World) -> None:
    version = world.version()
    rollout = world.empty_rollout()
    rollout.up(world.plugin, world.releases())
    rollout.up(world.plugin, world.releases(), force=True, deletes=False)
    rollout.up(world.plugin, world.releases(main=release(version.id)))  # and deletes what was replaced
    assert rollout.replaced == []
    assert world.traffic == {world.named(1): 100}
    rollout.delete(world.plugin)
    assert world.deployed == {}


def test_adopted_models_belong_to_who_adopted_them_last(world: World) -> None:
    version = world.version()
    world.deploy_by_hand(version.id, "123")
    rollout = world.empty_rollout()
    wanted = world.releases(main=release(version.id)) | {"adopt": True}
    rollout.up(world.plugin, wanted)
    rollout.up(world.plugin, wanted, force=True)
    assert set(world.deployed) == {"123"}
    rollout.delete(world.plugin)
    assert world.deployed == {}


def test_a_state_that_was_imported_deletes_what_it_has(pair: Pair, world: World) -> None:
    pair.up(world.plugin, force=True)  # leaves claims
    taken = Stack(pair.rollout.urn, id=world.endpoint)
    taken.refresh(world.plugin)
    version = Stack(pair.version.urn, id=pair.version.id)
    version.refresh(world.plugin)
    assert "pulumi-claim" not in str(version.inputs)
    taken.delete(world.plugin)
    version.delete(world.plugin)
    pair.gone()


def test_a_state_that_was_imported_without_any_replacement_deletes_what_it_has(pair: Pair, world: World) -> None:
    taken = Stack(pair.rollout.urn + "-elsewhere", id=world.endpoint)
    taken.refresh(world.plugin)
    taken.up(world.plugin, {**taken.inputs, "drainSeconds": 3})
    taken.up(world.plugin, world.releases(main=release(pair.version.id, minReplicas=2)))
    taken.delete(world.plugin)
    pair.version.delete(world.plugin)
    pair.gone()


def test_a_claim_that_was_never_recorded_is_repaired_by_the_next_update(pair: Pair, world: World) -> None:
    """The process was killed between the claim and the record of it in Pulumi's state."""
    before = [stack.state for stack, _ in pair.both()]
    pair.up(world.plugin, force=True, deletes=False)
    for (stack, _), state in zip(pair.both(), before, strict=True):  # the engine never heard of it
        stack.id, stack.inputs, stack.outputs, stack.replaced = state.id, state.inputs, state.outputs, []
    pair.version.up(world.plugin, {**pair.version.inputs, "versionDescription": "x"})
    pair.rollout.up(world.plugin, world.releases(main=release(pair.version.id, minReplicas=2)))
    pair.destroy(world.plugin)
    pair.gone()


def test_replaced_and_changed_at_once(pair: Pair, world: World) -> None:
    new = world.version(OTHER_IMAGE)
    pair.rollout.up(
        world.plugin, world.releases(a=release(pair.version.id, 50), b=release(new.id, 50)), force=True, deletes=False
    )
    with Plugin(world.sandbox.url) as next_run:
        pair.rollout.delete_replaced(next_run)
    assert world.traffic == {world.named(1): 50, world.named(2): 50}
    pair.rollout.delete(world.plugin)
    new.delete(world.plugin)
    pair.version.delete(world.plugin)
    pair.gone()


def test_a_replacement_that_fails_leaves_both_states_right(pair: Pair, world: World) -> None:
    broken = world.version(OTHER_IMAGE, env={"STUB_HEALTH": "exit"})
    wanted = world.releases(a=release(pair.version.id, 50), b=release(broken.id, 50))
    with pytest.raises(CallFailed, match="exited unexpectedly"):
        pair.rollout.up(world.plugin, wanted, force=True)
    assert world.traffic == {world.named(1): 100}
    pair.rollout.up(world.plugin, world.releases(main=release(pair.version.id)))
    assert world.traffic == {world.named(1): 100}
    pair.rollout.delete(world.plugin)
    broken.delete(world.plugin)
    pair.version.delete(world.plugin)
    pair.gone()
