"""The provider killed at every point of a run, and run again: it ends as if nothing had happened."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from vertex_harness import Cloud, Proxy, release, rollout_inputs, sandbox, version_inputs
from vertex_plugin import IMAGE, OTHER_IMAGE, ROLLOUT_URN, VERSION_URN, CallFailed, Plugin, Plugins, Stack, Wire

from pulumi_vertex.ownership import without_claims
from sandbox.testing import RunningSandbox

__all__ = ["sandbox"]  # a fixture
FIRST_PAUSE = 0.02  # seconds; an operation takes 0.05

names = (f"k{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def options() -> tuple[str, ...]:
    return ("--operation-seconds", "0.05")  # so that a kill also meets operations that still run


@pytest.fixture(scope="module")
def cloud(sandbox: RunningSandbox) -> Cloud:
    return Cloud.of(sandbox)


@pytest.fixture
def proxy(sandbox: RunningSandbox) -> Iterator[Proxy]:
    proxy = Proxy(sandbox.url)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def plugin(sandbox: RunningSandbox) -> Iterator[Plugin]:
    with Plugin(sandbox.url, first_pause=FIRST_PAUSE) as running:
        yield running


@pytest.fixture
def plugins(proxy: Proxy) -> Iterator[Plugins]:
    """Processes to be killed, which reach the sandbox through the proxy."""
    with Plugins(proxy.url, FIRST_PAUSE) as plugins:
        yield plugins


class Scenario(ABC):
    """One run of the engine over a stack of its own: first what is there before, then the steps that a kill
    meets."""

    def __init__(self, cloud: Cloud, plugin: Plugin) -> None:
        self.cloud = cloud
        self.model = next(names)
        self.endpoint = cloud.endpoint(f"e-{self.model}")
        self.old, self.new = Stack(f"{VERSION_URN}{self.model}-old"), Stack(f"{VERSION_URN}{self.model}-new")
        self.rollout = Stack(ROLLOUT_URN + self.model)
        self.prepare(plugin)
        self.left = self.steps()

    def run(self, plugin: Plugin) -> None:
        """What is left of the steps. The engine, too, keeps what has succeeded and begins with what has
        not."""
        while self.left:
            self.left[0](plugin)
            self.left.pop(0)

    def prepare(self, plugin: Plugin) -> None:  # noqa: B027 - the first run has nothing before it
        pass

    @abstractmethod
    def steps(self) -> list[Callable[[Plugin], object]]: ...

    @abstractmethod
    def check(self) -> None: ...

    def destroy(self, plugin: Plugin) -> None:
        """`pulumi destroy`, which leaves nothing, whatever happened before."""
        for stack in (self.rollout, self.old, self.new):
            stack.delete(plugin)
        assert self.cloud.deployed(self.endpoint) == {}
        assert self.cloud.versions(self.model) == []

    def roll_out(self, plugin: Plugin, **models: Any) -> None:
        self.rollout.up(plugin, rollout_inputs(self.endpoint, **models))


class FirstUp(Scenario):
    """Nothing is there: a version with an alias and labels, and a rollout of it."""

    def steps(self) -> list[Callable[[Plugin], object]]:
        return [
            lambda p: self.old.up(p, version_inputs(self.model, aliases=["live"], labels={"a": "b"})),
            lambda p: self.roll_out(p, main=release(self.old.id)),
        ]

    def check(self) -> None:
        (there,) = self.cloud.versions(self.model)
        assert without_claims(there.version_aliases) == ["default", "live"]
        assert dict(there.labels) == {"a": "b"}
        assert list(self.cloud.deployed(self.endpoint).values()) == [(f"{self.model}@1", 100)]


class NewVersion(Scenario):
    """A second version at 60 % beside the first one, which shrinks; then alone; then the first one is
    deleted."""

    def prepare(self, plugin: Plugin) -> None:
        self.old.up(plugin, version_inputs(self.model, aliases=["live"]))
        self.roll_out(plugin, main=release(self.old.id, minReplicas=2))

    def steps(self) -> list[Callable[[Plugin], object]]:
        return [
            lambda p: self.new.up(p, version_inputs(self.model, OTHER_IMAGE, aliases=["live"])),
            lambda p: self.roll_out(p, a=release(self.old.id, 40), b=release(self.new.id, 60)),
            lambda p: self.roll_out(p, a=release(self.new.id)),
            lambda p: self.old.delete(p),
        ]

    def check(self) -> None:
        (there,) = self.cloud.versions(self.model)
        assert there.version_id == "2"
        assert without_claims(there.version_aliases) == ["default", "live"]
        assert list(self.cloud.deployed(self.endpoint).values()) == [(f"{self.model}@2", 100)]


class BrokenVersion(Scenario):
    """One of two new releases cannot start: both are undone, also when the undoing is killed."""

    def prepare(self, plugin: Plugin) -> None:
        self.old.up(plugin, version_inputs(self.model))
        self.new.up(plugin, version_inputs(self.model, OTHER_IMAGE, env={"STUB_HEALTH": "exit"}))
        self.roll_out(plugin, main=release(self.old.id))

    def steps(self) -> list[Callable[[Plugin], object]]:
        return [self.fail, lambda p: self.roll_out(p, main=release(self.old.id, minReplicas=2))]

    def fail(self, plugin: Plugin) -> None:
        bigger = release(self.old.id, 50) | {"machineType": "n1-standard-4"}
        try:
            self.roll_out(plugin, a=bigger, b=release(self.new.id, 50))
        except CallFailed as error:
            if "exited unexpectedly" not in str(error):
                raise
            return
        raise AssertionError("a container that cannot start was rolled out")

    def check(self) -> None:
        assert list(self.cloud.deployed(self.endpoint).values()) == [(f"{self.model}@1", 100)]


class Destroy(Scenario):
    """Everything goes: two releases with traffic, two versions, the model."""

    def prepare(self, plugin: Plugin) -> None:
        self.old.up(plugin, version_inputs(self.model))
        self.new.up(plugin, version_inputs(self.model, OTHER_IMAGE))
        self.roll_out(plugin, a=release(self.old.id, 40), b=release(self.new.id, 60))

    def steps(self) -> list[Callable[[Plugin], object]]:
        return [self.rollout.delete, self.old.delete, self.new.delete]

    def check(self) -> None:
        assert self.cloud.deployed(self.endpoint) == {}
        assert self.cloud.versions(self.model) == []


class ForcedReplacement(Scenario):
    """Everything is replaced by force, with the same content: `up --replace`."""

    def prepare(self, plugin: Plugin) -> None:
        self.old.up(plugin, version_inputs(self.model, aliases=["live"]))
        self.roll_out(plugin, main=release(self.old.id))

    def steps(self) -> list[Callable[[Plugin], object]]:
        return [
            lambda p: self.old.up(p, self.old.inputs, force=True, deletes=False),
            lambda p: self.rollout.up(p, self.rollout.inputs, force=True, deletes=False),
            self.rollout.delete_replaced,
            self.old.delete_replaced,
        ]

    def check(self) -> None:
        assert [v.version_id for v in self.cloud.versions(self.model)] == ["1"]
        assert list(self.cloud.deployed(self.endpoint).values()) == [(f"{self.model}@1", 100)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "when", "reads"),
    [
        *((kind, "after", False) for kind in (NewVersion, BrokenVersion, Destroy, ForcedReplacement)),
        *((kind, "before", False) for kind in (FirstUp, NewVersion, Destroy)),
        # Reads change nothing, so a kill beside one is a kill after the last write, only later: once is enough.
        (FirstUp, "after", True),
    ],
)
def test_killed_anywhere_and_run_again_it_ends_as_if_nothing_had_happened(
    kind: type[Scenario], when: str, reads: bool, cloud: Cloud, proxy: Proxy, plugins: Plugins, plugin: Plugin
) -> None:
    points = 0
    proxy.writes_only = not reads
    killed = plugins.take()
    for number in itertools.count():
        scenario = kind(cloud, plugin)
        proxy.arm(when, number, killed.kill)
        try:
            scenario.run(killed)
        except CallFailed:
            assert proxy.acted
        proxy.armed = None
        if proxy.acted:
            points += 1
            killed = plugins.take()
            scenario.run(killed)
        scenario.check()
        cloud.check_history(scenario.endpoint)
        scenario.destroy(plugin)
        if not proxy.acted:
            break
    print(f"{kind.__name__}, killed {when} a request: {points} points, all ended right")
    assert points >= 2


# --- random sequences ---------------------------------------------------------------------------------------

MACHINES = ("n1-standard-2", "n1-standard-4")
WRITES = ("deployModel", "undeployModel", "patch", "mutateDeployedModel")


@st.composite
def rollouts(draw: st.DrawFn) -> dict[str, tuple[int, str, int, int]]:
    """Releases: version, machine type, traffic and replicas by name."""
    kinds = st.tuples(st.integers(0, 2), st.sampled_from(MACHINES))
    wanted = draw(st.lists(kinds, unique=True, max_size=3))
    cuts = (
        sorted(draw(st.lists(st.integers(0, 100), min_size=len(wanted) - 1, max_size=len(wanted) - 1)))
        if wanted
        else []
    )
    shares = [high - low for low, high in itertools.pairwise([0, *cuts, 100])]
    return {
        f"r{n}": (version, machine, share, draw(st.integers(1, 2)))
        for n, ((version, machine), share) in enumerate(zip(wanted, shares, strict=False))
    }


faults = st.one_of(
    st.builds(
        lambda m, c, n: (m, {"kind": "status", "code": c, "count": n}),
        st.sampled_from(WRITES),
        st.sampled_from([429, 503]),
        st.integers(1, 2),
    ),
    st.builds(
        lambda m, w: (m, {"kind": "drop", "when": w}),
        st.sampled_from([*WRITES, "get"]),
        st.sampled_from(["before", "after"]),
    ),
    st.builds(lambda m: (m, {"kind": "slow", "seconds": 0.3}), st.sampled_from(WRITES[:2])),
)


class Rollouts(RuleBasedStateMachine):
    """Any sequence of wanted rollouts, faults, kills, broken versions and drift, on one endpoint."""

    sandbox: RunningSandbox
    cloud: Cloud
    proxy: Proxy
    plugins: Plugins
    plugin: Plugin
    versions: list[str]
    broken: str
    met = 0  # faults that a request has met
    killed = 0

    @initialize()
    def begin(self) -> None:
        name = next(names)
        self.endpoint = self.cloud.endpoint(f"e-{name}")
        self.stack = Stack(ROLLOUT_URN + name)
        self.wanted: dict[str, tuple[int, str, int, int]] | None = None

    def inputs(self, wanted: dict[str, tuple[int, str, int, int]]) -> Wire:
        models: Any = {
            name: release(self.versions[version], share, minReplicas=replicas) | {"machineType": machine}
            for name, (version, machine, share, replicas) in wanted.items()
        }
        return rollout_inputs(self.endpoint, **models)

    def restart(self) -> None:
        """One process serves all examples, until it is killed."""
        type(self).killed += 1
        type(self).plugin = self.plugins.take()

    def check(self) -> None:
        """The endpoint is in the wanted state, and its traffic was right at every moment."""
        if self.wanted is None:
            return
        there = self.cloud.look(self.endpoint)
        found = sorted(
            (
                f"{d.model.rsplit('/', 1)[-1]}@{d.model_version_id}",
                d.dedicated_resources.machine_spec.machine_type,
                there.traffic_split.get(d.id, 0),
                d.dedicated_resources.min_replica_count,
            )
            for d in there.deployed_models
        )
        assert found == sorted(
            (self.versions[version].rsplit("/", 1)[-1], machine, share, replicas)
            for version, machine, share, replicas in self.wanted.values()
        )

    @rule(wanted=rollouts())
    def up(self, wanted: dict[str, tuple[int, str, int, int]]) -> None:
        self.stack.up(self.plugin, self.inputs(wanted))
        self.wanted = wanted
        self.check()

    @rule(wanted=rollouts(), fault=faults)
    def up_with_a_fault(self, wanted: dict[str, tuple[int, str, int, int]], fault: tuple[str, dict[str, Any]]) -> None:
        self.sandbox.fault(f"endpoints.{fault[0]}", match=self.endpoint, **fault[1])
        self.stack.up(self.plugin, self.inputs(wanted))
        type(self).met += not self.sandbox.unused_faults()
        self.sandbox.clear_faults()
        self.wanted = wanted
        self.check()

    @rule(wanted=rollouts(), number=st.integers(0, 5), when=st.sampled_from(["before", "after"]))
    def up_with_a_kill(self, wanted: dict[str, tuple[int, str, int, int]], number: int, when: str) -> None:
        self.proxy.arm(when, number, self.plugin.kill)
        try:
            self.stack.up(self.plugin, self.inputs(wanted))
        except CallFailed:
            assert self.proxy.acted
        self.proxy.armed = None
        if self.proxy.acted:
            self.restart()
        self.up(wanted)

    @rule(wanted=rollouts(), number=st.integers(0, 5))
    def up_killed_and_changed_one_s_mind(self, wanted: dict[str, tuple[int, str, int, int]], number: int) -> None:
        before = self.wanted
        self.proxy.arm("after", number, self.plugin.kill)
        try:
            self.stack.up(self.plugin, self.inputs(wanted))
            before = wanted
        except CallFailed:
            assert self.proxy.acted
        self.proxy.armed = None
        if self.proxy.acted:
            self.restart()
        if self.stack.id:  # the state may be older than the endpoint: the engine says so and asks for a refresh
            self.stack.refresh(self.plugin)
        self.up(before or {})

    @rule()
    def up_with_a_broken_version(self) -> None:
        before = self.cloud.deployed(self.endpoint)
        inputs = self.inputs(self.wanted or {})
        inputs["models"] = {"broken": release(self.broken)}
        with pytest.raises(CallFailed, match="exited unexpectedly"):
            self.stack.up(self.plugin, inputs)
        assert self.cloud.deployed(self.endpoint) == before

    @rule()
    def somebody_undeploys_one_without_traffic(self) -> None:
        for id_, (_, share) in self.cloud.deployed(self.endpoint).items():
            if not share:
                self.cloud.endpoints.undeploy_model(endpoint=self.endpoint, deployed_model_id=id_).result(timeout=30)
                break
        if self.stack.id:
            self.stack.refresh(self.plugin)
            self.up(self.wanted or {})

    @rule()
    def nothing_changes(self) -> None:
        if self.stack.id:
            assert self.stack.refresh(self.plugin) is False
            assert self.stack.up(self.plugin, self.inputs(self.wanted or {})) == "same"

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "endpoint"):
            self.cloud.check_history(self.endpoint)

    def teardown(self) -> None:
        self.sandbox.clear_faults()
        self.up({})
        self.sound()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_sequence_of_rollouts_faults_and_kills_ends_as_wanted(
    cloud: Cloud, sandbox: RunningSandbox, proxy: Proxy, plugins: Plugins, plugin: Plugin
) -> None:
    proxy.armed = None
    stacks = [Stack(f"{VERSION_URN}{n}") for n in range(4)]
    for n, stack in enumerate(stacks):
        env = {"STUB_HEALTH": "exit"} if n == 3 else {}
        stack.up(plugin, version_inputs("random", IMAGE[:-1] + str(n), env=env))

    class Machine(Rollouts):
        versions, broken = [stack.id for stack in stacks[:3]], stacks[3].id

    Machine.sandbox, Machine.cloud, Machine.proxy, Machine.plugins = sandbox, cloud, proxy, plugins
    Machine.plugin = plugins.take()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=8,
            stateful_step_count=8,
            deadline=None,
            # Without shrinking: it would take many times the time of the search, and the log of a failure is
            # short.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{Machine.met} faults were met, {Machine.killed} processes killed")
