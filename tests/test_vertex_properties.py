"""Properties of all inputs that the schema allows, and of all sequences of requests to the sandbox's registry."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from pulumi.runtime.proto import provider_pb2
from vertex_harness import Cloud, World, options, plugin, sandbox
from vertex_plugin import IMAGE, ROLLOUT_URN, VERSION_URN, Plugin, Stack, Wire, struct, unstruct

from pulumi_vertex.definition import Field, Kind, Property
from pulumi_vertex.model_version.inputs import DEFINITION as VERSION
from pulumi_vertex.rollout.inputs import DEFINITION as ROLLOUT
from sandbox.testing import LOCATION, RunningSandbox

__all__ = ["options", "plugin", "sandbox"]  # fixtures

_numbers = itertools.count()
# What a pattern cannot say, or what costs time: drains last, images need digests, names are made.
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64).map(lambda d: f"registry/a/b/c@sha256:{d}")
GIVEN: dict[str, st.SearchStrategy[Any]] = {
    "image": DIGESTS,
    "drainSeconds": st.just(0),
    "acceleratorType": st.sampled_from(["NVIDIA_L4", "NVIDIA_TESLA_T4"]),
    "acceleratorCount": st.integers(1, 8),
    "machineType": st.sampled_from(["n1-standard-2", "g2-standard-4"]),
    "env": st.dictionaries(st.from_regex(r"(?!AIP_|PULUMI_)[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True), st.text()),
    "labels": st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_-]{0,9}", fullmatch=True), st.from_regex(r"[a-z0-9_-]{1,9}", fullmatch=True)
    ),
    "displayName": st.text("abc ÄŪ1", min_size=1, max_size=20),
    "versionDescription": st.text(min_size=1, max_size=20),
    "artifactUri": st.just("gs://bucket/folder"),
    "serviceAccount": st.just("a@b.iam.gserviceaccount.com"),
    # In the region of the model.
    "encryptionKey": st.from_regex(
        r"a-project/locations/europe-west4/keyRings/[\w-]{1,9}/cryptoKeys/[\w-]{1,9}", fullmatch=True
    ).map("projects/{}".format),
    "aliases": st.lists(st.sampled_from(["live", "blue", "next-one"]), unique=True),
}


def values(kind: Kind, field: Field) -> st.SearchStrategy[Any]:
    """Any value that a property's definition allows."""
    if kind.name == "string":
        text = st.from_regex(field.pattern, fullmatch=True) if field.pattern else st.text(min_size=1, max_size=9)
        return text.filter(str.isprintable)
    if kind.name == "integer":
        low = 0 if field.low is None else field.low
        return st.integers(low, min(field.high or 2**31 - 1, low + 1000))
    if kind.name == "boolean":
        return st.booleans()
    if kind.name == "array" and kind.item:
        return st.lists(values(kind.item, field), min_size=field.low or 0, max_size=3)
    if kind.name == "object":
        return objects(kind.properties)
    assert kind.name == "map"
    assert kind.item
    keys = st.from_regex(field.pattern, fullmatch=True)
    return st.dictionaries(keys, values(kind.item, Field("")), max_size=3)


def objects(properties: tuple[Property, ...], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Wire]:
    """Any object of these properties, each optional one there or not."""
    given = {**GIVEN, **fixed}
    found = {p.wire: given[p.wire] if p.wire in given else values(p.kind, p.field) for p in properties}
    required = {p.wire: found[p.wire] for p in properties if p.required}
    return st.fixed_dictionaries(required, optional={k: v for k, v in found.items() if k not in required})


def probe(value: Wire) -> Wire:
    """A probe asks either by a command or by a path, and a port needs a path."""
    if "command" in value:
        return {key: item for key, item in value.items() if key not in ("path", "port")}
    return {"path": "/", **value}


def version(value: Wire) -> Wire:
    return {key: probe(item) if key.endswith("Probe") else item for key, item in value.items()}


def release(value: Wire) -> Wire:
    """One release; its replicas and accelerators fit together."""
    value = {**value, "minReplicas": max(1, value.get("minReplicas", 1) % 4)}
    value["maxReplicas"] = max(value["minReplicas"], value.get("maxReplicas", 1) % 4)
    dropped = {"minScaleupSeconds", "idleScaledownSeconds"}  # scale to zero has tests of its own
    if ("acceleratorType" in value) != ("acceleratorCount" in value):
        dropped |= {"acceleratorType", "acceleratorCount"}
    for metric in [m for m, t in value.get("autoscalingTargets", {}).items() if not 1 <= t <= 100]:
        value["autoscalingTargets"] = {k: v for k, v in value["autoscalingTargets"].items() if k != metric}
    return {key: item for key, item in value.items() if key not in dropped}


VERSIONS = objects(VERSION.inputs, modelId=st.just("")).map(version)
RELEASE = next(p for p in ROLLOUT.inputs if p.wire == "models").kind.item
assert RELEASE
RELEASES = st.lists(objects(RELEASE.properties, model=st.just(""), traffic=st.just(0)).map(release), max_size=3)
CALM = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def sound(plugin: Plugin, stack: Stack, inputs: Wire) -> None:
    """Checked twice is checked once; what is created has no diff, and is read as it was created."""
    inputs = unstruct(struct(inputs))
    checked = stack.check(plugin, inputs)
    assert checked == inputs
    assert stack.check(plugin, checked) == checked
    assert stack.up(plugin, inputs) == "create"
    created = stack.state
    diff = stack.diff(plugin, inputs)
    assert (list(diff.diffs), diff.changes) == ([], provider_pb2.DiffResponse.DIFF_NONE)
    assert stack.refresh(plugin) is False, (created, stack.state)
    taken = Stack(stack.urn, id=stack.id)
    taken.refresh(plugin)
    assert taken.up(plugin, {**inputs, **{k: v for k, v in taken.inputs.items() if k == "serviceAccount"}}) in (
        "same",
        "update",  # the service account of an upload cannot be read, and the state has no drain time
    )


@CALM
@given(VERSIONS)
def test_any_version_is_read_as_it_was_created(plugin: Plugin, sandbox: RunningSandbox, inputs: Wire) -> None:
    number = next(_numbers)
    stack = Stack(f"{VERSION_URN}any-{number}")
    sound(plugin, stack, {**inputs, "modelId": f"any-{number}"})
    stack.delete(plugin)
    assert Cloud.of(sandbox).versions(f"any-{number}") == []


@CALM
@given(RELEASES, st.data())
def test_any_rollout_is_read_as_it_was_created(
    plugin: Plugin, sandbox: RunningSandbox, releases: list[Wire], data: st.DataObject
) -> None:
    world = World(sandbox, plugin)
    made = [world.version(IMAGE[:-1] + str(n)) for n in range(len(releases))]
    cuts = sorted(data.draw(st.integers(0, 100)) for _ in releases[1:])
    shares = [high - low for low, high in itertools.pairwise([0, *cuts, 100])]
    models = {
        f"r{n}": {**release, "model": version.id, "traffic": share}
        for n, (release, version, share) in enumerate(zip(releases, made, shares, strict=False))
    }
    stack = Stack(f"{ROLLOUT_URN}-{world.model}")
    sound(plugin, stack, {"endpoint": world.endpoint, "models": models, "drainSeconds": 0})
    assert sum(world.traffic.values()) == (100 if models else 0)
    stack.delete(plugin)
    assert world.deployed == {}


# --- the sandbox's registry and traffic, against a model of them --------------------------------------------


class ModelRegistry(RuleBasedStateMachine):
    """Versions, aliases and traffic of one model and one endpoint, beside a dictionary of each."""

    sandbox: RunningSandbox

    def __init__(self) -> None:
        super().__init__()
        name = f"modelled-{next(_numbers)}"
        self.model, self.endpoint = f"models/{name}", f"endpoints/{name}"
        self.sandbox.do("POST", "endpoints", {"displayName": name}, endpointId=name)
        self.versions: dict[int, set[str]] = {}  # number: aliases
        self.next = 1
        self.split: dict[str, int] = {}
        self.deployed: dict[str, int] = {}  # id: version

    def ask(self, http: str, path: str, body: Any = None, **query: Any) -> bool:
        """Whether a request is accepted, and its operation succeeds."""
        status, answer = self.sandbox.ask(http, path, body, **query)
        if status == 200 and "/operations/" in answer.get("name", ""):
            answer = self.sandbox.done(answer)
        return "error" not in answer

    @rule(aliases=st.sets(st.sampled_from(["a1", "b2", "default"]), max_size=2))
    def upload(self, aliases: set[str]) -> None:
        model: Wire = {"displayName": "m", "containerSpec": {"imageUri": "i@sha256:0"}}
        model["versionAliases"] = sorted(aliases)
        where: Wire = {"parentModel": f"{LOCATION}/{self.model}"} if self.versions else {"modelId": self.model[7:]}
        assert self.ask("POST", "models:upload", {"model": model, **where})
        for held in self.versions.values():
            held -= aliases
        self.versions[self.next] = aliases | ({"default"} if not self.versions else set())
        self.next += 1

    @precondition(lambda self: self.versions)
    @rule(data=st.data(), add=st.sampled_from(["a1", "b2", "default"]), remove=st.sampled_from(["a1", "default"]))
    def alias(self, data: st.DataObject, add: str, remove: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.versions)))
        allowed = add == remove or remove != "default" or "default" not in self.versions[number]
        change = {"versionAliases": [add, f"-{remove}"]}
        assert self.ask("POST", f"{self.model}@{number}:mergeVersionAliases", change) == allowed
        if allowed and add != remove:
            for held in self.versions.values():
                held.discard(add)
            self.versions[number] = (self.versions[number] | {add}) - {remove}

    @precondition(lambda self: self.versions)
    @rule(data=st.data(), share=st.integers(0, 100))
    def deploy(self, data: st.DataObject, share: int) -> None:
        number, id_ = data.draw(st.sampled_from(sorted(self.versions))), str(1000 + len(self.deployed) + self.next)
        if id_ in self.deployed:
            return
        rest = max(self.split, key=lambda i: self.split[i], default="")
        split = {"0": share, rest: 100 - share} if rest else {}
        resources = {"minReplicaCount": 1, "machineSpec": {"machineType": "n1-standard-2"}}
        model = f"{LOCATION}/{self.model}@{number}"
        body = {"deployedModel": {"id": id_, "model": model, "dedicatedResources": resources}, "trafficSplit": split}
        assert self.ask("POST", f"{self.endpoint}:deployModel", body)
        if split:
            self.split = {id_: share, rest: 100 - share}
        elif not self.deployed:
            self.split = {id_: 100}
        self.deployed[id_] = number

    @precondition(lambda self: self.deployed)
    @rule(data=st.data())
    def undeploy(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.deployed)))
        allowed = len(self.deployed) == 1 or not self.split.get(id_)
        assert self.ask("POST", f"{self.endpoint}:undeployModel", {"deployedModelId": id_}) == allowed
        if allowed:
            del self.deployed[id_]
            self.split = {k: v for k, v in self.split.items() if k != id_} if self.deployed else {}

    @precondition(lambda self: self.versions)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.versions)))
        busy = number in self.deployed.values()
        allowed = not busy and len(self.versions) > 1 and "default" not in self.versions[number]
        assert self.ask("DELETE", f"{self.model}@{number}:deleteVersion") == allowed
        if allowed:
            del self.versions[number]

    @invariant()
    def agrees(self) -> None:
        _, listed = self.sandbox.ask("GET", f"{self.model}:listVersions")
        found = {int(m["versionId"]): set(m.get("versionAliases", [])) for m in listed.get("models", [])}
        assert found == self.versions
        endpoint = self.sandbox.do("GET", self.endpoint)
        assert {d["id"]: int(d["modelVersionId"]) for d in endpoint.get("deployedModels", [])} == self.deployed
        assert endpoint.get("trafficSplit", {}) == self.split


def test_the_sandbox_agrees_with_a_model_of_it(sandbox: RunningSandbox) -> None:
    ModelRegistry.sandbox = sandbox
    run_state_machine_as_test(ModelRegistry, settings=settings(max_examples=15, stateful_step_count=15, deadline=None))
