"""Who serves before and after a change, and the steps of the rollout in between."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pulumi_vertex.rollout.plan import (
    Deploy,
    MoveTraffic,
    Observed,
    Resize,
    Size,
    Spec,
    Step,
    Undeploy,
    plan,
)
from pulumi_vertex.rollout.wanted import drain_seconds, size_of, spec_of, wanted_of

from .cost import Machines
from .events import Change, State


@dataclass(frozen=True)
class Serving:
    """One release on the endpoint. version: `ID@NUMBER`, None where it is only made by the deployment.

    image: digest, empty where it is only built then. traffic: percent, None where unknown.
    """

    release: str
    version: str | None
    image: str
    traffic: int | None
    machines: Machines

    @property
    def version_number(self) -> str:
        return self.version.rpartition("@")[2] if self.version else ""


@dataclass(frozen=True)
class Frame:
    """The endpoint after a step: the shares of the traffic, and the machines of each deployed model.

    Both are keyed by a model's name in the plan. text: of the step, empty before the first one.
    """

    text: str
    traffic: Mapping[str, int | None]
    machines: Mapping[str, str]


@dataclass(frozen=True)
class Traffic:
    """The endpoint before and after, by release, and how it gets from one to the other.

    logged: the steps as the provider sees them on the endpoint now, where they are not those from Pulumi's state.
    """

    before: tuple[Serving, ...] = ()
    after: tuple[Serving, ...] = ()
    frames: tuple[Frame, ...] = ()
    logged: tuple[str, ...] = ()
    replaced: bool = False  # the steps are those on a new endpoint

    @property
    def steps(self) -> list[str]:
        return list(self.logged) or [frame.text for frame in self.frames[1:]]


def traffic(rollout: Change | None, images: tuple[Mapping[str, str], Mapping[str, str]], log: Sequence[str]) -> Traffic:
    """The traffic of a rollout that may change.

    images: the digests of the releases before and after. log: the steps that the provider logged.
    """
    if rollout is None:
        return Traffic()
    before = _serving(rollout.old, images[0], deployed=True)
    after = _serving(rollout.new, images[1], deployed=False) if rollout.operation != "delete" else ()
    if rollout.operation == "same" or not rollout.new:
        return Traffic(before, after or before)
    # On a replaced endpoint nothing is deployed.
    observed = observe(rollout.old) if rollout.old and rollout.operation == "update" else []
    replaced = rollout.operation == "replace"
    inputs = rollout.new.inputs
    steps = plan(wanted_of(inputs), observed, str(inputs.get("endpoint", "")), drain_seconds(inputs))
    texts = [str(step) for step in steps]
    logged = tuple(log) if log and list(log) != texts else ()
    return Traffic(before, after, tuple(frames(steps, observed)), logged, replaced)


def observe(old: State) -> list[Observed]:
    """The deployed models as the state has them; all are taken to be available."""
    ids: Mapping[str, str] = old.outputs.get("deployedModels") or {}
    split: Mapping[str, int] = old.outputs.get("trafficSplit") or {}
    models: Mapping[str, dict[str, object]] = old.inputs.get("models") or {}
    return [
        Observed(
            ids[name],
            spec_of(release),
            size_of(release),
            int(split.get(ids[name], 0)),
            drained=not split.get(ids[name]),
        )
        for name, release in models.items()
        if name in ids
    ]


def frames(steps: Sequence[Step], observed: Sequence[Observed]) -> list[Frame]:
    """The endpoint before the first step and after each one."""
    models = [d.spec.model for d in observed] + [s.wanted.spec.model for s in steps if isinstance(s, Deploy)]
    names = {d.id: _name(d.spec, models) for d in observed}
    shares: dict[str, int | None] = {names[d.id]: d.traffic for d in observed if d.traffic}
    machines = {names[d.id]: _machines(d.spec, d.size) for d in observed}
    found = [Frame("", dict(shares), dict(machines))]
    for step in steps:
        if isinstance(step, Deploy):
            name = _name(step.wanted.spec, models, step.wanted.name)
            machines[name] = _machines(step.wanted.spec, step.wanted.size)
            if step.alone:
                shares = {name: 100}
        elif isinstance(step, Undeploy):
            machines.pop(names[step.id], None)
            shares.pop(names[step.id], None)
        elif isinstance(step, Resize) and step.id:
            old = machines.get(names[step.id], "")
            machines[names[step.id]] = f"{_count(step.new)} × {old.partition(' × ')[2]}"
        elif isinstance(step, MoveTraffic):
            shares = {}
            for share in step.new:
                plain, _, version = share.name.partition(" (")
                shares[version.rstrip(")") or f"new {plain}"] = share.traffic
        found.append(Frame(str(step), dict(shares), dict(machines)))
    return found


def proven(before: Sequence[Serving], served: Collection[str]) -> set[str]:
    """The versions that have answered requests. served: those that did so earlier."""
    return {*served, *(s.version for s in before if s.version and s.traffic)}


def _serving(state: State | None, images: Mapping[str, str], *, deployed: bool) -> tuple[Serving, ...]:
    """The releases of a rollout: `deployed` as the state has them, else as the program wants them."""
    if state is None:
        return ()
    ids: Mapping[str, str] = state.outputs.get("deployedModels") or {}
    split: Mapping[str, int] = state.outputs.get("trafficSplit") or {}
    found = []
    for name, wanted in wanted_of(state.inputs).items():
        share = int(split.get(ids.get(name, ""), 0)) if deployed else wanted.traffic
        spec, size = wanted.spec, wanted.size
        machines = Machines(
            name,
            spec.machine_type,
            size.min_replicas,
            size.max_replicas,
            spec.accelerator_type,
            spec.accelerator_count,
            spec.spot,
        )
        found.append(Serving(name, spec.model, images.get(name, ""), share, machines))
    return tuple(found)


def _name(spec: Spec, models: Sequence[str | None], release: str = "") -> str:
    if spec.model is None:
        return f"new {release}"
    return spec.model if models.count(spec.model) < 2 else f"{spec.model} on {spec.machine_type}"


def _machines(spec: Spec, size: Size) -> str:
    return f"{_count(size)} × {spec.machine_type}"


def _count(size: Size) -> str:
    least, most = size.replicas
    return str(least) if least == most else f"{least} to {most}"
