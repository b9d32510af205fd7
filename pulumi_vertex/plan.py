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
from dataclasses import asdict, dataclass


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
    """The part that changes in place. `targets` holds autoscaling targets in percent, by metric."""

    min_replicas: int = 1
    max_replicas: int = 1
    targets: tuple[tuple[str, int], ...] = ()
    container_logging: bool = True

    def __str__(self) -> str:
        least, most = self.min_replicas, self.max_replicas
        if least == most:
            return f"{least} replica{'s' if least > 1 else ''}"
        return f"{least} to {most} replicas"


@dataclass(frozen=True)
class Release:
    """What the program wants under one name. `traffic` is a percentage, None while a preview does not know it."""

    name: str
    spec: Spec
    size: Size
    traffic: int | None


@dataclass(frozen=True)
class Deployed:
    """One deployed model as the endpoint shows it.

    `ours` says that this rollout made or adopted it; `available` that at least one replica answers; `drained` that it
    had no traffic when the last run ended either, so nothing of a caller's can still be in it.
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
    release: Release

    def __str__(self) -> str:
        spec = self.release.spec
        accelerators = f" with {spec.accelerator_count} {spec.accelerator_type}" if spec.accelerator_type else ""
        what = spec.model or "a version that is not known yet"
        machine = f"{spec.machine_type}{accelerators}, {self.release.size}"
        return f"deploy {self.release.name}: {what} on {machine}, no traffic"


@dataclass(frozen=True)
class Resize:
    release: str
    id: str
    old: Size
    new: Size

    def __str__(self) -> str:
        changes = []
        if (self.old.min_replicas, self.old.max_replicas) != (self.new.min_replicas, self.new.max_replicas):
            changes.append(f"{self.old} becomes {self.new}")
        if self.old.targets != self.new.targets:
            goals = ", ".join(f"{metric} {target} %" for metric, target in self.new.targets)
            changes.append(f"autoscaling aims at {goals or 'the default'}")
        if self.old.container_logging != self.new.container_logging:
            changes.append(f"container logging {'on' if self.new.container_logging else 'off'}")
        return f"resize {self.release}: {', '.join(changes)}"


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


class NotOursError(Exception):
    """The endpoint has deployed models that this rollout did not make."""

    def __init__(self, strangers: Sequence[Deployed]) -> None:
        self.strangers = tuple(strangers)
        super().__init__(", ".join(d.id for d in strangers))


def deployed_id(endpoint: str, spec: Spec, attempt: int = 0) -> str:
    """The id under which a spec is deployed: ten digits, the first not zero, always the same for the same spec.

    A call that is repeated after a kill therefore finds its own work. `attempt` gives another id, for when Vertex AI
    does not let one be used again.
    """
    said = json.dumps([endpoint, asdict(spec), attempt], sort_keys=True).encode()
    return str(10**9 + int.from_bytes(hashlib.sha256(said).digest()[:8]) % (9 * 10**9))


def matches(releases: Mapping[str, Release], observed: Sequence[Deployed], endpoint: str) -> dict[str, Deployed]:
    """Which deployed model serves each release: of the same spec, the one under the derived id first."""
    taken: dict[str, Deployed] = {}
    for release in releases.values():
        same = [d for d in observed if d.ours and d.spec == release.spec and release.spec.model is not None]
        own = deployed_id(endpoint, release.spec)
        same.sort(key=lambda d: (not d.available, d.traffic == 0, d.id != own, d.id))
        free = [d for d in same if d not in taken.values()]
        if free:
            taken[release.name] = free[0]
    return taken


def plan(
    releases: Mapping[str, Release], observed: Sequence[Deployed], endpoint: str = "", drain_seconds: int = 0
) -> list[Step]:
    """The steps from what is observed to what is wanted; none when there is nothing to do.

    Raises NotOursError when the endpoint has deployed models of somebody else.
    """
    if strangers := [d for d in observed if not d.ours]:
        raise NotOursError(strangers)
    serving = matches(releases, observed, endpoint)
    models = [d.spec.model for d in observed] + [r.spec.model for r in releases.values() if r.name not in serving]
    # Without traffic and without a replica: what a failed deploy leaves behind. It is made anew. With
    # traffic it is left alone: taking it away could only make things worse.
    broken = [d for d in serving.values() if not d.available and d.traffic == 0]
    serving = {name: d for name, d in serving.items() if d not in broken}
    leaving = [d for d in observed if d not in serving.values() and d not in broken]
    names = {d.id: _called(d.spec, models) for d in observed}

    steps: list[Step] = [Undeploy(names[d.id], d.id, "it is not available") for d in broken]
    steps += [Deploy(release) for release in releases.values() if release.name not in serving]
    resizes = [
        Resize(name, d.id, d.size, releases[name].size) for name, d in serving.items() if d.size != releases[name].size
    ]
    growing = [
        r for r in resizes if r.new.max_replicas >= r.old.max_replicas and r.new.min_replicas >= r.old.min_replicas
    ]
    steps += growing

    old = tuple(Share(names[d.id], d.id, d.traffic) for d in observed if d.traffic)
    new = tuple(
        Share(
            f"{r.name} ({_called(r.spec, models)})" if r.spec.model else r.name,
            serving[r.name].id if r.name in serving else None,
            r.traffic,
        )
        for r in releases.values()
        if r.traffic != 0
    )
    if not releases and len(old) > 1:  # the last one to leave takes the callers along
        new = (Share(old[0].name, old[0].id, 100),)
    if new and {(s.id, s.traffic) for s in new} != {(s.id, s.traffic) for s in old}:
        steps.append(MoveTraffic(old, new))

    undrained = [d for d in leaving if d.traffic or not d.drained]
    if releases and undrained and drain_seconds:
        steps.append(Drain(tuple(names[d.id] for d in undrained), tuple(d.id for d in undrained), drain_seconds))
    steps += [r for r in resizes if r not in growing]
    last = {s.id for s in (new or old)} if not releases else set()
    leaving.sort(key=lambda d: (d.id in last, d.id))
    steps += [Undeploy(names[d.id], d.id) for d in leaving]
    return steps


def _called(spec: Spec, models: Sequence[str | None]) -> str:
    """A deployed model in words: its version, and its machine where the version alone is not enough."""
    name = str(spec.model)
    return name if models.count(name) < 2 else f"{name} on {spec.machine_type}"
