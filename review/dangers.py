"""What counts as dangerous in a change, each with its reason, and what deserves a second look.

RULES is the table that docs/review.md prints. Each rule is a function of the change that returns its findings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from pulumi_vertex.pipelines import cron
from pulumi_vertex.wire import UNKNOWN

from .cost import Cost
from .events import Change, Preview, State
from .traffic import Serving, Traffic, proven

CANARY_PERCENT: Final = 20  # at most so much of the traffic is a trial
PRODUCTION_REPLICAS: Final = 2  # one may be lost to a machine's failure or to maintenance
EVERYBODY: Final = {"allUsers", "allAuthenticatedUsers"}
LIMIT: Final = "headcount:monthlyCostLimit"

ENDPOINT: Final = "gcp:vertex/aiEndpoint:AiEndpoint"
ROLLOUT: Final = "vertex:index:Rollout"
VERSION: Final = "vertex:index:ModelVersion"
RELEASED_IMAGE: Final = "vertex:index:ReleasedImage"
SCHEDULE: Final = "vertex:index:Schedule"
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
BUCKET: Final = "gcp:storage/bucket:Bucket"
# What is lost with a resource of these types.
DATA: Final[Mapping[str, str]] = {
    BUCKET: "all its objects",
    "gcp:storage/bucketObject:BucketObject": "the object",
    "gcp:artifactregistry/repository:Repository": "all its images, which releases may be pinned to",
    "gcp:bigquery/dataset:Dataset": "all its tables",
    "gcp:bigquery/table:Table": "all its rows",
    "gcp:kms/cryptoKey:CryptoKey": "everything that is encrypted with it",
    "gcp:kms/keyRing:KeyRing": "everything that is encrypted with its keys",
    "gcp:logging/projectBucketConfig:ProjectBucketConfig": "its logs",
    "gcp:sql/databaseInstance:DatabaseInstance": "all its databases",
    "gcp:vertex/aiDataset:AiDataset": "the data set",
    "gcp:vertex/aiTensorboard:AiTensorboard": "the metrics of all its runs",
}
# The kinds of resources whose type's name does not say enough.
KINDS: Final = {
    "gcp:projects/service:Service": "API",
    "gcp:projects/serviceIdentity:ServiceIdentity": "service agent",
    "gcp:serviceaccount/account:Account": "service account",
    "gcp:serviceaccount/key:Key": "service account key",
    "::cryptoKeyId": "key",
}
_GRANT: Final = re.compile(r"(IAM|Iam)(Member|Binding|Policy|CustomRole)$")
_KEY: Final = "gcp:serviceaccount/key:Key"


@dataclass(frozen=True)
class Rule:
    """What is looked for in a change.

    name: for tools, so it stays the same. brief: for a headline. dangerous: else it is only worth knowing.
    """

    name: str
    brief: str
    what: str
    why: str
    dangerous: bool = True


@dataclass(frozen=True)
class Finding:
    """A rule that a change meets. resource: its name, or empty. text: a sentence about this change."""

    rule: Rule
    resource: str
    text: str

    @property
    def dangerous(self) -> bool:
        return self.rule.dangerous


@dataclass(frozen=True)
class Facts:
    """What the rules look at. served: versions that answered requests earlier, as `ID@NUMBER`."""

    preview: Preview
    traffic: Traffic
    before: Cost
    after: Cost
    served: Collection[str] = ()

    @property
    def production(self) -> bool:
        return self.preview.config.get("headcount:production") == "true"

    @property
    def new_stack(self) -> bool:
        """Whether nothing of the stack exists yet."""
        return not any(c.old for c in self.preview.changes if not c.type.startswith("pulumi:"))

    def unproven(self) -> Iterator[tuple[Serving, int]]:
        """The releases that get traffic with a version that never served, and how much they get."""
        known = proven(self.traffic.before, self.served)
        if not any(serving.traffic for serving in self.traffic.before):
            return  # nobody is served yet
        for serving in self.traffic.after:
            if serving.traffic and serving.version not in known:
                yield serving, serving.traffic

    def below_two(self, servings: tuple[Serving, ...]) -> set[str]:
        return {s.release for s in servings if s.traffic != 0 and s.machines.least < PRODUCTION_REPLICAS}


Check = Callable[[Facts], Iterator[tuple[str, str]]]  # finds resources, each with a sentence


def _lost_data(facts: Facts) -> Iterator[tuple[str, str]]:
    for change in facts.preview.changes:
        if change.type not in DATA or change.operation not in ("delete", "replace") or not change.old:
            continue
        if change.old.retain:
            continue
        done = "deleted" if change.operation == "delete" else "deleted and created again"
        kept = change.type == BUCKET and not change.old.inputs.get("forceDestroy")
        end = "; Google refuses while there are objects in it" if kept else f", and with it {DATA[change.type]}"
        yield change.name, f"{described(change)} is {done}{end}."


def _replaced_endpoint(facts: Facts) -> Iterator[tuple[str, str]]:
    for change in facts.preview.of_type(ENDPOINT):
        if change.operation == "replace":
            url = (
                " Its URL changes."
                if change.old and change.new and _differs(change.old, change.new, "dedicatedEndpointEnabled")
                else ""
            )
            yield (
                change.name,
                f"The endpoint is deleted and created again.{url} Until its models are deployed, which takes about 20 "
                "minutes for each, callers get errors.",
            )
        elif change.operation == "delete":
            yield change.name, "The endpoint is deleted, and nothing answers any more."


def _nothing_serves(facts: Facts) -> Iterator[tuple[str, str]]:
    before = [s.release for s in facts.traffic.before if s.traffic]
    if before and not any(s.traffic != 0 for s in facts.traffic.after):
        yield "rollout", f"Everything is undeployed ({', '.join(before)}): the endpoint stays and answers nothing."


def _unproven_traffic(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.production:
        for serving, share in facts.unproven():
            if share > CANARY_PERCENT:
                yield serving.release, f"{_of(serving)} gets {share} % of the traffic, and has never served here."


def _unproven_traffic_elsewhere(facts: Facts) -> Iterator[tuple[str, str]]:
    if not facts.production:
        for serving, share in facts.unproven():
            if share > CANARY_PERCENT:
                yield (
                    serving.release,
                    f"{_of(serving)} gets {share} % of the traffic, and has never served here. `headcount release -s "
                    f"{facts.preview.stack} canary NAME 10` gives a new version a share first.",
                )


def _protection_removed(facts: Facts) -> Iterator[tuple[str, str]]:
    serving = {s.release for s in facts.traffic.after if s.traffic != 0}
    for change in facts.preview.changes:
        if not (change.old and change.old.protect) or (change.new and change.new.protect):
            continue
        if change.type in (VERSION, RELEASED_IMAGE) and change.name not in serving:
            continue  # protected only while it has traffic
        end = " and it is deleted" if change.operation == "delete" else ", so that the next change may delete it"
        yield change.name, f"{described(change)} loses its protection{end}."


def _widened_access(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.new_stack:
        return
    for change in facts.preview.changes:
        if change.operation not in ("create", "update", "replace") or not change.new:
            continue
        new, old = change.new.inputs, change.old.inputs if change.old else {}
        if change.type == _KEY and change.operation != "update":
            yield change.name, "A key of a service account is made. It is a password that does not expire."
        if not _GRANT.search(change.type):
            continue
        added = sorted(set(new.get("permissions") or ()) - set(old.get("permissions") or ()))
        members = sorted({*_members(new)} - {*_members(old)})
        role = str(new.get("role", "its role"))
        if added and change.old:
            yield change.name, f"A role of the stack may do more: {', '.join(added)}."
        elif EVERYBODY & set(members):
            continue  # has a rule of its own
        elif members or (new.get("role") != old.get("role") and _members(new)):
            where = _where(new)
            yield change.name, f"{_listed(members or _members(new))} gets {_short_role(role)}{where}."


def _public_access(facts: Facts) -> Iterator[tuple[str, str]]:
    for change in facts.preview.changes:
        if not change.new or change.operation in ("same", "delete"):
            continue
        new, old = change.new.inputs, change.old.inputs if change.old else {}
        everybody = EVERYBODY & (set(_members(new)) - set(_members(old)))
        for member in sorted(everybody):
            who = "Everybody on the internet" if member == "allUsers" else "Everybody with a Google account"
            where = _where(new)
            role = _short_role(str(new.get("role", "")))
            yield change.name, f"{who} gets {role}{where}."
        if change.type == BUCKET and new.get("publicAccessPrevention") != "enforced":
            before = old.get("publicAccessPrevention")
            if before == "enforced" or not change.old:
                yield change.name, f"{described(change)} may be made public: its public access prevention is gone."
        for entity in _entities(new) - _entities(old):
            if entity in EVERYBODY:
                yield change.name, f"{described(change)} has an access list that names `{entity}`."


def _few_replicas(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.production:
        for release in sorted(facts.below_two(facts.traffic.after) - facts.below_two(facts.traffic.before)):
            (serving,) = (s for s in facts.traffic.after if s.release == release)
            least = serving.machines.least
            number = "no replica" if not least else "1 replica"
            yield release, f"Release {release} may run with {number}, in production."


def _over_the_limit(facts: Facts) -> Iterator[tuple[str, str]]:
    limit = monthly_limit(facts.preview)
    if limit is None:
        return
    month = facts.after.most_month
    if month > limit and not month < facts.before.most_month:
        atleast = "" if facts.after.exact else "at least "
        yield (
            "",
            f"With all replicas the stack costs {atleast}{month:,.0f} USD a month; its limit (monthlyCostLimit) is "
            f"{limit:,.0f} USD.",
        )


def _limit_unknown(facts: Facts) -> Iterator[tuple[str, str]]:
    limit = monthly_limit(facts.preview)
    if limit is not None and not facts.after.exact and facts.after.most_month <= limit:
        yield (
            "",
            f"Whether the limit of {limit:,.0f} USD a month is kept is not known, because a price is not: see Cost.",
        )


def _idle_release(facts: Facts) -> Iterator[tuple[str, str]]:
    for serving in facts.traffic.after:
        if serving.traffic == 0 and serving.machines.least:
            yield (
                serving.release,
                f"Release {serving.release} stays deployed without traffic and costs its {serving.machines} until "
                f"`headcount release -s {facts.preview.stack} remove {serving.release}`.",
            )


def _frequent_runs(facts: Facts) -> Iterator[tuple[str, str]]:
    for change in facts.preview.of_type(SCHEDULE):
        old, new = (cron.shortest_pause(state.inputs if state else {}) for state in (change.old, change.new))
        if new < min(old, HOUR):
            yield change.name, f"{described(change)} starts a run {new // MINUTE} minutes after another one."


# The order is that of the review.
CHECKS: Final[Mapping[Rule, Check]] = {
    Rule(
        "data-lost",
        "data is lost",
        "what holds data is deleted or replaced",
        "A deleted bucket, repository or table does not come back with the next deployment; its content is gone.",
    ): _lost_data,
    Rule(
        "endpoint-replaced",
        "an outage",
        "the endpoint is replaced or deleted",
        "It is an outage for all callers, and they may need another URL afterwards.",
    ): _replaced_endpoint,
    Rule(
        "nothing-serves",
        "nothing answers any more",
        "everything that has traffic is undeployed",
        "Callers get errors until something is deployed again, which takes about 20 minutes.",
    ): _nothing_serves,
    Rule(
        "unproven-traffic",
        "much traffic on a version that never served",
        f"production: over {CANARY_PERCENT} % of the traffic moves to a version that never served",
        "A version's faults show under real requests; a canary lets few callers meet them.",
    ): _unproven_traffic,
    Rule(
        "protection-removed",
        "protection is removed",
        "protection is removed from what holds data or serves",
        "Protection is the last check before a deletion, so its removal is where a deletion begins.",
    ): _protection_removed,
    Rule(
        "access-widened",
        "more access",
        "somebody gets a role, a role a permission, or a service account a key, except in a new stack",
        "Access that is given is seldom taken back, and a key does not expire.",
    ): _widened_access,
    Rule(
        "public-access",
        "public access",
        "something becomes public, or may become so",
        "Pictures show people, and what was public for a minute may be copied for ever.",
    ): _public_access,
    Rule(
        "few-replicas",
        "too few replicas for production",
        f"production: a release with traffic may run with fewer than {PRODUCTION_REPLICAS} replicas",
        "With one replica, the loss or maintenance of a single machine is an outage.",
    ): _few_replicas,
    Rule(
        "cost-over-limit",
        "over the cost limit",
        "the cost with all replicas exceeds `monthlyCostLimit`",
        "Replicas are added under load without anybody being asked, so the limit has to hold for the most of them.",
    ): _over_the_limit,
    Rule(
        "frequent-runs",
        "frequent runs of a pipeline",
        "a schedule starts a run of a pipeline more often than once an hour",
        "Each run costs its machines, and a schedule goes on while nobody looks.",
    ): _frequent_runs,
    Rule(
        "unproven-traffic-elsewhere",
        "a version that never served",
        f"outside production: over {CANARY_PERCENT} % of the traffic moves to a version that never served",
        "This is the usual way of working on a stack such as dev, and still worth knowing.",
        dangerous=False,
    ): _unproven_traffic_elsewhere,
    Rule(
        "idle-release",
        "an idle release",
        "a release stays deployed without traffic",
        "It costs as much as with traffic; it is worth that as long as a rollback may be needed.",
        dangerous=False,
    ): _idle_release,
    Rule(
        "limit-unknown",
        "unknown cost",
        "a limit is set, and the price of a machine is not known",
        "The known part of the cost is below the limit; nobody knows whether the whole is.",
        dangerous=False,
    ): _limit_unknown,
}
RULES: Final = tuple(CHECKS)


def findings(facts: Facts) -> list[Finding]:
    """Everything that the rules find in a change, the dangerous things first."""
    if not any(change.changes for change in facts.preview.changes):
        return []
    return [Finding(rule, resource, text) for rule, check in CHECKS.items() for resource, text in check(facts)]


# ------------------------------------------------------------------------------------------------ words


def kind(type_: str) -> str:
    """The kind of a resource in words.

    >>> kind("gcp:storage/bucketIAMMember:BucketIAMMember"), kind("vertex:index:ModelVersion")
    ('bucket IAM member', 'model version')
    """
    if type_.startswith("pulumi:providers:"):
        return "provider"
    if type_ in KINDS:
        return KINDS[type_]
    name = type_.rpartition(":")[2]
    name = re.sub(r"^Ai(?=[A-Z])", "", name).replace("Iam", "IAM")
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z][a-z]*|[A-Z]+|[a-z0-9-]+", name)
    return " ".join(word if word.isupper() else word.lower() for word in words)


def described(change: Change) -> str:
    return f"The {kind(change.type)} `{change.name}`"


def _of(serving: Serving) -> str:
    version = f"version {serving.version_number}" if serving.version else "the new version"
    return f"{version[0].upper()}{version[1:]} of release {serving.release}"


def _short_role(role: str) -> str:
    return "a role that the deployment creates" if _unknown(role) else f"`{role.removeprefix('roles/')}`"


def _where(inputs: Mapping[str, object]) -> str:
    """What a grant is for."""
    for key in ("bucket", "repository", "endpoint", "serviceAccountId", "cryptoKeyId", "project"):
        if key in inputs and not _unknown(str(inputs[key])):
            return f" on the {'service account' if key == 'serviceAccountId' else kind(f'::{key}')} `{inputs[key]}`"
    return ""


def _members(inputs: Mapping[str, object]) -> list[str]:
    members = inputs.get("members")
    one = inputs.get("member")
    return [str(m) for m in members] if isinstance(members, list) else [str(one)] if one else []


def _entities(inputs: Mapping[str, object]) -> set[str]:
    """The entities of a bucket's access lists, with the words of a predefined one."""
    listed = inputs.get("roleEntities")
    found = {str(entry).rpartition(":")[2] for entry in listed} if isinstance(listed, list) else set()
    predefined = str(inputs.get("predefinedAcl", ""))
    if predefined.startswith("public"):
        found.add("allUsers")
    elif predefined.startswith("authenticated"):
        found.add("allAuthenticatedUsers")
    return found


def _listed(members: list[str]) -> str:
    return ", ".join("somebody not known yet" if _unknown(m) else f"`{m}`" for m in members)


def _unknown(text: str) -> bool:
    return text == UNKNOWN


def _differs(old: State, new: State, name: str) -> bool:
    return bool(old.inputs.get(name) != new.inputs.get(name))


def monthly_limit(preview: Preview) -> float | None:
    """The stack's limit in USD a month, if it has one."""
    try:
        return float(preview.config.get(LIMIT) or "")
    except ValueError:
        return None
