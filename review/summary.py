"""The review of a change: what it does, what it costs and what is dangerous, as data that renderers print."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pulumi_vertex.jobs.specification import TIMEOUT_SECONDS
from pulumi_vertex.pipelines import cron
from pulumi_vertex.wire import UNKNOWN

from . import dangers
from .cost import Cost, Machines, cost
from .dangers import ENDPOINT, RELEASED_IMAGE, ROLLOUT, VERSION, Facts, Finding, kind
from .differences import Difference, differences
from .events import Change, Message, PolicyFinding, Preview
from .prices import TRAINING, Price, Prices
from .traffic import Traffic, traffic

IMAGE: Final = "docker-build:index:Image"
PIPELINE_JOB: Final = "vertex:index:PipelineJob"
JOBS: Final = {"vertex:index:CustomJob": "custom job", "vertex:index:TuningJob": "tuning job"}

# What else costs, by the type of the resource: the price's service and item, and the words for it.
BY_USE: Final = {
    dangers.BUCKET: ("storage", "standard", "objects in buckets"),
    "gcp:artifactregistry/repository:Repository": ("registry", "storage", "images"),
    ENDPOINT: ("logging", "storage", "logs"),
}
FREE: Final = {"registry": " after the first 0.5 GB", "logging": " after the first 50 GiB a month"}

FAILED: Final = "the preview fails, and nothing can be deployed"
# The exit codes of `headcount review`.
NO_CHANGE: Final = 0
ERROR: Final = 1
CHANGE: Final = 2
DANGEROUS: Final = 3


@dataclass(frozen=True)
class Changed:
    """One changed resource as the table has it."""

    operation: str
    kind: str
    name: str
    differences: tuple[Difference, ...]
    holds: str = ""  # the data that a deletion or replacement takes along


@dataclass(frozen=True)
class Job:
    """A job that the change starts. hour: USD an hour of all its machines, None where unknown."""

    name: str
    kind: str
    machines: str
    hour: float | None
    most_hours: float


@dataclass(frozen=True)
class Run:
    """Runs of a pipeline that the change leads to. times: in words, empty for a single run. paused: none for now."""

    name: str
    kind: str
    times: str = ""
    paused: bool = False


@dataclass(frozen=True)
class Usage:
    """What is paid by use, and is in no sum because the use is not known."""

    what: str
    price: Price | None
    free: str = ""


@dataclass(frozen=True)
class Review:
    """Everything that a review says about a change. verified: what `headcount verify` measured, in a sentence."""

    stack: str
    headline: str
    exit_code: int
    traffic: Traffic
    cost_before: Cost
    cost_after: Cost
    findings: tuple[Finding, ...]
    policies: tuple[PolicyFinding, ...]
    messages: tuple[Message, ...]
    resources: tuple[Changed, ...]
    jobs: tuple[Job, ...] = ()
    runs: tuple[Run, ...] = ()
    usage: tuple[Usage, ...] = ()
    limit: float | None = None
    verified: str = ""

    @property
    def dangers(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.dangerous]

    @property
    def notes(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.dangerous]

    @property
    def errors(self) -> list[Message]:
        return [message for message in self.messages if message.severity == "error"]

    @property
    def warnings(self) -> list[Message]:
        return [message for message in self.messages if message.severity == "warning"]


def review(preview: Preview, prices: Prices, served: Collection[str] = ()) -> Review:
    """The review of a preview. served: versions that answered requests earlier, as `ID@NUMBER`."""
    region = preview.config.get("gcp:region", "")
    changed = [change for change in preview.changes if change.changes and not is_component(change)]
    rollout = next(iter(preview.of_type(ROLLOUT)), None)
    moved = traffic(rollout, images(preview), preview.rollout_log)
    before, after = (cost((s.machines for s in side), region, prices) for side in (moved.before, moved.after))
    facts = Facts(preview, moved, before, after, served)
    found = dangers.findings(facts)
    violated = any(policy.level == "mandatory" for policy in preview.policies)
    # A violated policy ends the preview, too.
    failed = any(m.severity == "error" for m in preview.messages) or not (preview.complete or violated)
    # The provider's own words on it are in the preview, too.
    outage = any(f.rule.name == "endpoint-replaced" for f in found)
    dangerous = violated or any(f.dangerous for f in found)
    code = ERROR if failed else DANGEROUS if dangerous else CHANGE if changed else NO_CHANGE
    return Review(
        stack=preview.stack,
        headline=headline(preview, changed, moved, found)
        if not failed
        else "the preview fails, and nothing can be deployed",
        exit_code=code,
        traffic=moved,
        cost_before=before,
        cost_after=after,
        findings=tuple(found),
        policies=preview.policies,
        messages=tuple(m for m in preview.messages if not (outage and "which is an outage" in m.text)),
        resources=tuple(
            Changed(c.operation, kind(c.type), c.name, tuple(differences(c)), _holds(c))
            for c in sorted(changed, key=_gravity)
        ),
        jobs=tuple(_jobs(preview, region, prices)),
        runs=tuple(_runs(preview)),
        usage=tuple(_usage(preview, region, prices)),
        limit=dangers.monthly_limit(preview),
    )


def as_json(found: Review) -> dict[str, Any]:
    """The review for tools. The form is that of the records in this package; `version` changes with it."""
    return {"version": 1, **asdict(found), "dangerous": bool(found.dangers)}


def is_component(change: Change) -> bool:
    """Whether it only groups others, or is a provider that comes or goes with what uses it."""
    provider = change.type.startswith("pulumi:providers:") and change.operation in ("create", "delete")
    return provider or change.type.startswith(("headcount:index:", "pulumi:pulumi:"))


def images(preview: Preview) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The digests of the releases before and after."""
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for change in preview.of_type(VERSION):
        for state, found in ((change.old, before), (change.new, after)):
            if state and state.inputs.get("image", UNKNOWN) != UNKNOWN:
                found[change.name] = str(state.inputs["image"]).partition("@")[2]
    return before, after


# ------------------------------------------------------------------------------------------------ the headline


def headline(preview: Preview, changed: Sequence[Change], moved: Traffic, found: Sequence[Finding]) -> str:
    """The change in one sentence without its full stop, the dangers first."""
    if not changed:
        parts = ["no change"]
    elif not any(c.old for c in preview.changes if not c.type.startswith("pulumi:")):
        serves = ", ".join(f"{s.release} serves {_share(s.traffic)}" for s in moved.after if s.traffic != 0)
        parts = [f"a new stack with {len(changed)} resources", serves or "nothing serves"]
    else:
        parts = [
            *_what_is_new(changed),
            *_traffic_words(moved),
            *_machine_words(moved),
            *_other_words(changed),
            *_deletions(changed, moved),
        ]
    dangers_ = dict.fromkeys(finding.rule.brief for finding in found if finding.dangerous)
    if any(policy.level == "mandatory" for policy in preview.policies):
        dangers_["a violated policy"] = None
    return "; ".join(filter(None, [", ".join(dangers_), *parts]))


def _what_is_new(changed: Sequence[Change]) -> list[str]:
    new = []
    if any(c.type == IMAGE for c in changed):
        new.append("new image")
    versions = [c for c in changed if c.type == VERSION and c.operation in ("create", "replace")]
    if versions:
        new.append("new model version" if len(versions) == 1 else f"{len(versions)} new model versions")
    return [", ".join(new)] if new else []


def _traffic_words(moved: Traffic) -> list[str]:
    """The releases that gain traffic. A release with another version gains all that it has."""
    before = {s.release: s for s in moved.before}
    served = [s for s in moved.before if s.traffic]
    words = []
    for after in moved.after:
        old = before.get(after.release)
        same = old is not None and old.version == after.version and after.version is not None
        gained = (after.traffic or 0) - ((old.traffic or 0) if old and same else 0)
        if gained <= 0:
            continue
        share = "all the traffic" if after.traffic == 100 else f"{gained} % of the traffic"
        to = after.release if same or not old else f"the new version of {after.release}"
        if not served:
            words.append(f"{after.release} gets {share}")
        elif same and all(_number(after.version) < _number(s.version) for s in served if s.release != after.release):
            words.append(f"{share} moves back to {to}, an earlier version")
        else:
            words.append(f"{share} moves to {to}")
    if served and not moved.after:
        words.append("everything is undeployed")
    return words


def _machine_words(moved: Traffic) -> list[str]:
    before = {s.release: s.machines for s in moved.before}
    words = []
    for after in moved.after:
        old, new = before.get(after.release), after.machines
        if old is None or old == new:
            continue
        if old.machine == new.machine:
            words.append(f"{after.release} runs {new.count} replicas instead of {old.count}")
        else:
            words.append(f"{after.release} runs on {new} instead of {old}")
    return words


def _other_words(changed: Sequence[Change]) -> list[str]:
    """What is created and changed besides the releases."""
    covered = {IMAGE, VERSION, RELEASED_IMAGE, ROLLOUT}
    others = [c for c in changed if c.type not in covered]
    return [
        _done([c for c in others if c.operation == operation], word)
        for operation, word in (("create", "created"), ("update", "changed"), ("same", "protected or unprotected"))
    ]


def _deletions(changed: Sequence[Change], moved: Traffic) -> list[str]:
    gone = [c for c in changed if c.operation == "delete"]
    again = [c for c in changed if c.operation == "replace" and c.type not in (VERSION, ROLLOUT)]
    words = []
    undeployed = [c.name for c in gone if c.type == VERSION]
    if undeployed and moved.after:
        words.append(f"release {' and '.join(undeployed)} is undeployed and its model version deleted")
    words.append(_done([c for c in gone if c.type not in (VERSION, RELEASED_IMAGE)], "deleted"))
    words.append(_done(again, "replaced"))
    if old := [c.name for c in changed if c.type == VERSION and c.operation == "replace"]:
        words.append(f"the old version of {' and '.join(old)} is deleted")
    return words if any(words) else ["nothing is deleted"]


def _done(changes: Sequence[Change], word: str) -> str:
    names = [f"the {kind(c.type)}" if kind(c.type) == c.name else f"{kind(c.type)} {c.name}" for c in changes]
    if not names:
        return ""
    if len(names) > 3:
        return f"{len(names)} resources are {word}"
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {word}"


def _share(percent: int | None) -> str:
    return "traffic" if percent is None else f"{percent} % of the traffic"


def _number(version: str | None) -> int:
    """The number of a version; one that is only made by the deployment is the newest."""
    number = (version or "").rpartition("@")[2]
    return int(number) if number.isdigit() else 10**9


# ------------------------------------------------------------------------------------------------ the rest


def _gravity(change: Change) -> tuple[int, str, str]:
    order = ("delete", "replace", "create", "update", "same")
    return order.index(change.operation), change.type, change.name


def _holds(change: Change) -> str:
    return dangers.DATA.get(change.type, "") if change.operation in ("delete", "replace") else ""


def _jobs(preview: Preview, region: str, prices: Prices) -> list[Job]:
    found = []
    for change in preview.changes:
        if change.type not in JOBS or change.operation not in ("create", "replace") or not change.new:
            continue
        inputs = change.new.inputs
        replicas = _whole(inputs.get("replicas"), 1) * _whole(inputs.get("parallelTrials"), 1)
        machines = Machines(
            change.name,
            str(inputs.get("machineType", "")),
            replicas,
            replicas,
            str(inputs.get("acceleratorType", "")),
            _whole(inputs.get("acceleratorCount"), 0),
            bool(inputs.get("spot", False)),
        )
        hour = _node_hour(machines, region, prices)
        seconds = _whole(inputs.get("timeoutSeconds"), TIMEOUT_SECONDS)
        found.append(
            Job(
                change.name, JOBS[change.type], str(machines), None if hour is None else hour * replicas, seconds / 3600
            )
        )
    return found


def _runs(preview: Preview) -> list[Run]:
    found = [
        Run(change.name, "pipeline job")
        for change in preview.of_type(PIPELINE_JOB)
        if change.operation in ("create", "replace") and change.new
    ]
    for change in preview.of_type(dangers.SCHEDULE):
        if change.operation not in ("create", "replace", "update") or not change.new:
            continue
        times, zone = str(change.new.inputs.get("cron", "")), change.new.inputs.get("timeZone") or cron.DEFAULT_ZONE
        said = f"{times} ({zone})" if times == UNKNOWN or cron.problem(times) else f"{cron.in_words(times)} ({zone})"
        found.append(Run(change.name, "schedule", said, bool(change.new.inputs.get("paused"))))
    return found


def _node_hour(machines: Machines, region: str, prices: Prices) -> float | None:
    if machines.spot:
        return None
    return prices.machine(TRAINING, machines.machine_type, region, machines.accelerator, machines.accelerators)


def _usage(preview: Preview, region: str, prices: Prices) -> list[Usage]:
    found = []
    for type_, (service, item, what) in BY_USE.items():
        if any(change.new for change in preview.of_type(type_)):
            found.append(Usage(what, prices.find(service, item, region), FREE.get(service, "")))
    return found


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default
