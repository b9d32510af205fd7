"""What a rollout does next: a pure function of what is wanted and what is there.

The same plan is what a preview prints and what the runner carries out. The runner does the first step, looks again and
asks for a new plan, so a plan must be stable: after its first step, the plan is the rest. That is also why a run that
was killed anywhere goes on where it stopped.

The order keeps every caller served: nothing gets traffic before it is available, shares always sum to 100, and what
leaves loses its traffic first, drains, and is undeployed last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

# The metrics for which Vertex AI has a default target, and that target in percent.
# https://cloud.google.com/vertex-ai/docs/reference/rest/v1/DedicatedResources
DEFAULT_TARGETS: Final = {"cpu": 60, "accelerator": 60}

Targets = tuple[tuple[str, int], ...]  # autoscaling targets by metric, sorted


@dataclass(frozen=True)
class Spec:
    """The part of a deployed model that cannot change in place. Only a known `model` can be compared."""

    model: str | None  # "ID@VERSION"; None while a preview does not know it
    machine_type: str
    accelerator_type: str = ""
    accelerator_count: int = 0
    service_account: str = ""
    access_logging: bool = False
    spot: bool = False


@dataclass(frozen=True)
class Size:
    """The part that changes in place.

    `idle` has the two periods of scale to zero in seconds, (min_scaleup, idle_scaledown), where min_replicas is 0.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    targets: Targets = ()
    container_logging: bool = True
    idle: tuple[int, int] | None = None

    @property
    def replicas(self) -> tuple[int, int]:
        return self.min_replicas, self.max_replicas

    @property
    def awake(self) -> Size:
        """The same without scale to zero, which Vertex AI allows only while a model is alone on its endpoint."""
        return self if self.min_replicas else replace(self, min_replicas=1, idle=None)

    def differs_from(self, other: Size) -> bool:
        return self._effective() != other._effective()

    def has_targets_of(self, other: Size) -> bool:
        return _without_defaults(self.targets) == _without_defaults(other.targets)

    def _effective(self) -> Size:
        return replace(self, targets=_without_defaults(self.targets))

    def __str__(self) -> str:
        least, most = self.replicas
        if least == most:
            return f"{least} replica{'s' if least > 1 else ''}"
        idle = "" if least else ", none while idle"
        return f"{least} to {most} replica{'s' if most > 1 else ''}{idle}"


def _without_defaults(targets: Targets) -> Targets:
    """What differs from Vertex AI's defaults, which it may or may not write out."""
    return tuple((metric, target) for metric, target in targets if DEFAULT_TARGETS.get(metric) != target)


@dataclass(frozen=True)
class Wanted:
    """What the program wants under one name. `traffic` is a percentage, None while a preview does not know it."""

    name: str
    spec: Spec
    size: Size
    traffic: int | None


@dataclass(frozen=True)
class Observed:
    """One deployed model as the endpoint shows it.

    `ours` says that this rollout made or adopted it; `available` that at least one replica answers, or that the model
    is scaled to zero; `drained` that it already had no traffic at the end of the previous run, so that no request can
    be in flight.
    """

    id: str
    spec: Spec
    size: Size
    traffic: int = 0
    ours: bool = True
    available: bool = True
    drained: bool = True


@dataclass(frozen=True)
class Deploy:
    """`alone`: the endpoint is empty, so that Vertex AI gives all traffic to this model."""

    wanted: Wanted
    alone: bool = False

    def __str__(self) -> str:
        spec = self.wanted.spec
        accelerators = f" with {spec.accelerator_count} {spec.accelerator_type}" if spec.accelerator_type else ""
        what = spec.model or "a version that is not known yet"
        machine = f"{spec.machine_type}{accelerators}, {self.wanted.size}"
        return f"deploy {self.wanted.name}: {what} on {machine}" + ("" if self.alone else ", no traffic")


@dataclass(frozen=True)
class Resize:
    """`id` is None for a model that an earlier step of the same plan deploys."""

    name: str
    id: str | None
    old: Size
    new: Size

    def __str__(self) -> str:
        changes = []
        if self.old.replicas != self.new.replicas:
            changes.append(f"{self.old} becomes {self.new}")
        elif self.old.idle != self.new.idle and self.new.idle:
            changes.append(
                "scales to zero after {1} s without a request, {0} s after it came up".format(*self.new.idle)
            )
        if not self.old.has_targets_of(self.new):
            units = {"requests": " requests a minute"}
            goals = ", ".join(f"{metric} {target}{units.get(metric, ' %')}" for metric, target in self.new.targets)
            changes.append(f"autoscaling aims at {goals or 'the default'}")
        if self.old.container_logging != self.new.container_logging:
            changes.append(f"container logging {'on' if self.new.container_logging else 'off'}")
        return f"resize {self.name}: {', '.join(changes)}"


@dataclass(frozen=True)
class Share:
    name: str
    id: str | None
    traffic: int | None

    def __str__(self) -> str:
        return f"{self.name} {'?' if self.traffic is None else self.traffic} %"


@dataclass(frozen=True)
class MoveTraffic:
    old: tuple[Share, ...]
    new: tuple[Share, ...]

    def __str__(self) -> str:
        new = ", ".join(map(str, self.new))
        return f"move traffic: {new}" + (f" (was {', '.join(map(str, self.old))})" if self.old else "")


@dataclass(frozen=True)
class Drain:
    names: tuple[str, ...]
    ids: tuple[str, ...]
    seconds: int

    def __str__(self) -> str:
        return f"drain {', '.join(self.names)} for {self.seconds} s"


@dataclass(frozen=True)
class Undeploy:
    name: str
    id: str
    why: str = ""

    def __str__(self) -> str:
        return f"undeploy {self.name}" + (f", {self.why}" if self.why else "")


Step = Deploy | Resize | MoveTraffic | Drain | Undeploy


class StrangersError(Exception):
    """The endpoint has deployed models that this rollout did not make."""

    def __init__(self, strangers: Sequence[Observed]) -> None:
        self.strangers = tuple(strangers)
        super().__init__(", ".join(d.id for d in strangers))


def deployed_id(endpoint: str, spec: Spec, attempt: int = 0) -> str:
    """The id under which a spec is deployed: ten digits, the first not zero, always the same for the same spec.

    A request that is repeated after a kill therefore finds its own work. `attempt` gives another id, for when Vertex AI
    does not let one be used again.
    """
    said = json.dumps([endpoint, asdict(spec), attempt], sort_keys=True).encode()
    return str(10**9 + int.from_bytes(hashlib.sha256(said).digest()[:8]) % (9 * 10**9))


def matches(wanted: Mapping[str, Wanted], observed: Sequence[Observed], endpoint: str) -> dict[str, Observed]:
    """Which deployed model serves each release: one of the same spec, the one under the derived id first."""
    taken: dict[str, Observed] = {}
    for release in wanted.values():
        same = [d for d in observed if d.ours and d.spec == release.spec and release.spec.model is not None]
        own = deployed_id(endpoint, release.spec)
        same.sort(key=lambda d: (not d.available, d.traffic == 0, d.id != own, d.id))
        free = [d for d in same if d not in taken.values()]
        if free:
            taken[release.name] = free[0]
    return taken


def broken(
    serving: Mapping[str, Observed], wanted: Mapping[str, Wanted], observed: Sequence[Observed]
) -> dict[str, Observed]:
    """Those of `serving` that are deployed anew, because no replica answers: what a failed deployment leaves behind.

    One with traffic is left alone while others answer and it is to keep some of what it has: it may only be restarting.
    """
    helpless = not any(d.traffic and d.available for d in observed)

    def kept(name: str, d: Observed) -> bool:
        traffic = wanted[name].traffic
        return not helpless and bool(d.traffic) and (traffic is None or 0 < traffic <= d.traffic)

    return {name: d for name, d in serving.items() if not d.available and not kept(name, d)}


def plan(
    wanted: Mapping[str, Wanted], observed: Sequence[Observed], endpoint: str = "", drain_seconds: int = 0
) -> list[Step]:
    """The steps from what is observed to what is wanted; none when there is nothing to do.

    Raises StrangersError when the endpoint has deployed models of somebody else.
    """
    if strangers := [d for d in observed if not d.ours]:
        raise StrangersError(strangers)
    serving = matches(wanted, observed, endpoint)
    models = [d.spec.model for d in observed] + [w.spec.model for w in wanted.values() if w.name not in serving]
    names = {d.id: _called(d.spec, models) for d in observed}
    dead = broken(serving, wanted, observed)
    serving = {name: d for name, d in serving.items() if name not in dead}
    # Without traffic, a broken one goes first, because its id is used again; with traffic, it leaves as others do.
    useless = [d for d in dead.values() if not d.traffic]
    staying = [d for d in observed if d not in useless]
    leaving = [d for d in staying if d not in serving.values()]
    missing = [w for w in wanted.values() if w.name not in serving]
    missing.sort(key=lambda w: -(w.traffic or 0))  # the first on an empty endpoint gets all traffic for a while
    crowded = bool(leaving) or len(wanted) > 1

    steps: list[Step] = [Undeploy(names[d.id], d.id, "it is not available") for d in useless]
    if missing and staying:
        steps += [Resize(names[d.id], d.id, d.size, d.size.awake) for d in staying if not d.size.min_replicas]
        serving = {name: replace(d, size=d.size.awake) for name, d in serving.items()}
    sizes = {name: w.size.awake if crowded else w.size for name, w in wanted.items()}
    steps += [
        Deploy(replace(w, size=sizes[w.name]), alone=not staying and first == 0) for first, w in enumerate(missing)
    ]
    resizes = [
        Resize(name, d.id, d.size, sizes[name]) for name, d in serving.items() if d.size.differs_from(sizes[name])
    ]
    growing = [
        r for r in resizes if r.new.max_replicas >= r.old.max_replicas and r.new.min_replicas >= r.old.min_replicas
    ]
    steps += growing

    old = tuple(Share(names[d.id], d.id, d.traffic) for d in observed if d.traffic)
    new = tuple(
        Share(
            f"{w.name} ({_called(w.spec, models)})" if w.spec.model else w.name,
            serving[w.name].id if w.name in serving else None,
            w.traffic,
        )
        for w in wanted.values()
        if w.traffic != 0
    )
    if not wanted and len(old) > 1:  # the last one to leave takes the callers along: one that answers
        stays = next((d.id for d in observed if d.traffic and d.available), old[0].id)
        new = (Share(names[str(stays)], stays, 100),)
    if new and {(s.id, s.traffic) for s in new} != {(s.id, s.traffic) for s in old}:
        steps.append(MoveTraffic(old, new))

    undrained = [d for d in leaving if d.available and (d.traffic or not d.drained)]
    if wanted and undrained and drain_seconds:
        steps.append(Drain(tuple(names[d.id] for d in undrained), tuple(d.id for d in undrained), drain_seconds))
    steps += [r for r in resizes if r not in growing]
    last = {s.id for s in (new or old)} if not wanted else set()
    leaving.sort(key=lambda d: (d.id in last, d.id))
    steps += [Undeploy(names[d.id], d.id) for d in leaving]
    if crowded and len(wanted) == 1:
        steps += [
            Resize(name, serving[name].id if name in serving else None, sizes[name], w.size)
            for name, w in wanted.items()
            if not w.size.min_replicas
        ]
    return steps


def _called(spec: Spec, models: Sequence[str | None]) -> str:
    """A deployed model in words: its version, and its machine where the version alone is not enough."""
    name = str(spec.model)
    return name if models.count(name) < 2 else f"{name} on {spec.machine_type}"
