"""The rules, as functions of one resource and the settings of its stack.

A rule yields a message for each violation, and each message says how to comply. A value that a preview cannot know yet
is UNKNOWN; a rule waits for such a value, because the update checks the resource again with the value known.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from infra.settings import Settings
from review import prices


class Unknown:
    """The type of UNKNOWN."""

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN: Final = Unknown()  # a value that is known only after the update of another resource

BUCKET: Final = "gcp:storage/bucket:Bucket"
REPOSITORY: Final = "gcp:artifactregistry/repository:Repository"
ACCOUNT: Final = "gcp:serviceaccount/account:Account"
ENDPOINT: Final = "gcp:vertex/aiEndpoint:AiEndpoint"
RUN_SERVICE: Final = "gcp:cloudrunv2/service:Service"
MODEL_VERSION: Final = "vertex:index:ModelVersion"
RELEASED_IMAGE: Final = "vertex:index:ReleasedImage"
ROLLOUT: Final = "vertex:index:Rollout"
JOBS: Final = ("vertex:index:CustomJob", "vertex:index:TuningJob")
PIPELINES: Final = ("vertex:index:PipelineJob", "vertex:index:Schedule")
VERTEX_PROVIDER: Final = "pulumi:providers:vertex"

#: The most traffic, in percent, that production may give to versions which this very update uploads: a fault shows
#: within minutes, and four of five requests never meet it.
CANARY_PERCENT: Final = 20
LEAST_REPLICAS: Final = 2
HOURS_A_MONTH: Final = 730  # https://cloud.google.com/vertex-ai/pricing counts a month so


@dataclass(frozen=True)
class Resource:
    """One resource as the program declares it. protect: whether Pulumi refuses to delete it."""

    type: str
    name: str
    properties: Mapping[str, Any] = field(default_factory=dict)
    protect: bool = False


Check = Callable[[Resource, Settings], Iterator[str]]
#: USD that one machine costs an hour at least, by machine type, region, accelerator and its number; None if not known.
Price = Callable[[str, str, str, int], float | None]


@dataclass(frozen=True)
class Rule:
    """One rule.

    everywhere: whether a violation stops any stack; otherwise it stops production, and other stacks only show it.
    general: whether the rule holds for stacks of other programs too, whose settings are others: it reads none.
    """

    name: str
    description: str
    check: Check
    everywhere: bool = False
    general: bool = False


# ------------------------------------------------------------------------------------------- public access


def private_buckets(resource: Resource, settings: Settings) -> Iterator[str]:
    if resource.type != BUCKET:
        return
    prevention = resource.properties.get("publicAccessPrevention")
    if prevention not in ("enforced", UNKNOWN):
        yield 'The bucket may be made public. Set public_access_prevention="enforced".'
    if resource.properties.get("uniformBucketLevelAccess") not in (True, UNKNOWN):
        yield (
            "Single objects of the bucket may be shared by access control lists. Set uniform_bucket_level_access=True."
        )


def no_public_members(resource: Resource, settings: Settings) -> Iterator[str]:
    for path, text in _texts(resource.properties):
        if found := re.search(r"\ball(Authenticated)?Users\b", text):
            yield (
                f"{path} names {found[0]}, which is everybody on the internet. Name the accounts, or a group of them, "
                "that need access."
            )


def authenticated_endpoints(resource: Resource, settings: Settings) -> Iterator[str]:
    """Predictions of Vertex AI need a token always; what can be had without one is a service beside it."""
    if resource.type == RUN_SERVICE and resource.properties.get("invokerIamDisabled") is True:
        yield (
            "The service answers everybody. Leave out invoker_iam_disabled, and grant roles/run.invoker to its callers."
        )
    if resource.type == VERTEX_PROVIDER and isinstance(url := resource.properties.get("endpoint"), str):
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            yield f"Tokens and pictures go unencrypted to {url}. Use https, or no vertex:endpoint for Google's own."


# --------------------------------------------------------------------------------------------- permissions


def no_primitive_roles(resource: Resource, settings: Settings) -> Iterator[str]:
    for path, text in _texts(resource.properties):
        if found := re.search(r"\broles/(owner|editor|viewer)(?![\w.])", text):
            yield (
                f"{path} is the primitive role {found[0]}, which reaches every service of the project. Grant the "
                "narrowest predefined role instead: https://cloud.google.com/iam/docs/understanding-roles"
            )


def no_service_account_keys(resource: Resource, settings: Settings) -> Iterator[str]:
    if resource.type in ("gcp:serviceaccount/key:Key", "gcp:storage/hmacKey:HmacKey"):
        yield (
            "A key of a service account does not expire, and whoever has it is the account. Impersonate the account, "
            "or use Workload Identity Federation as infra/bootstrap does."
        )


# -------------------------------------------------------------------------------------------------- images


def images_by_digest(resource: Resource, settings: Settings) -> Iterator[str]:
    if resource.type not in (MODEL_VERSION, RELEASED_IMAGE, *JOBS):
        return
    if resource.type == RELEASED_IMAGE:
        repository, digest = resource.properties.get("repository"), resource.properties.get("digest")
    else:
        image = resource.properties.get("image")
        if not isinstance(image, str):
            return
        repository, _, digest = image.partition("@")
    if isinstance(digest, str) and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        yield (
            f"{repository} is not named by its digest, so that another image could run tomorrow. Use the digest: "
            f"headcount release -s {settings.stack} add NAME --from STACK."
        )
    if isinstance(repository, str) and not _own_registry(repository, settings):
        yield (
            f"{repository} is not in a repository of the project {settings.project}. Copy the image there by its "
            f"digest: pulumi config set imageSource REPOSITORY -s {settings.stack}."
        )


def _own_registry(repository: str, settings: Settings) -> bool:
    """Whether a repository is one of the project's. On the sandbox the registry is on this machine."""
    host, _, path = repository.partition("/")
    local = urlsplit(settings.vertex_endpoint).hostname
    google = re.fullmatch(r"[a-z0-9-]+-docker\.pkg\.dev", host)
    return bool(google or (local and host.partition(":")[0] == local)) and path.startswith(f"{settings.project}/")


# ----------------------------------------------------------------------------------- what every stack sets


def labelled(resource: Resource, settings: Settings) -> Iterator[str]:
    if resource.type not in (BUCKET, REPOSITORY, ENDPOINT, MODEL_VERSION, *JOBS, *PIPELINES):
        return
    labels = resource.properties.get("labels") or {}
    if labels is UNKNOWN:
        return
    if missing := [name for name, value in settings.all_labels.items() if labels.get(name) not in (value, UNKNOWN)]:
        yield f"The resource lacks labels of its stack: {', '.join(missing)}. Set labels=settings.all_labels."


def retention(resource: Resource, settings: Settings) -> Iterator[str]:
    if resource.type == REPOSITORY:
        policies = resource.properties.get("cleanupPolicies") or []
        if policies is not UNKNOWN and "DELETE" not in [_mapping(policy).get("action") for policy in policies]:
            yield "Images are kept for ever. Add a cleanup policy with the action DELETE."
    if resource.type != BUCKET:
        return
    if (resource.properties.get("softDeletePolicy") or {}) == {}:
        yield (
            "Google keeps deleted objects for 7 days unless the bucket says otherwise. Set soft_delete_policy, with 0 "
            "seconds to keep none."
        )
    rules = resource.properties.get("lifecycleRules") or []
    if rules is UNKNOWN:
        return
    deleting = [
        _mapping(_mapping(rule).get("condition"))
        for rule in rules
        if _mapping(_mapping(rule).get("action")).get("type") == "Delete"
    ]
    if resource.properties.get("name") == settings.names.bucket and not any(c.get("age") for c in deleting):
        yield "The bucket of pictures, which show people, keeps them for ever. Add a lifecycle rule Delete with an age."
    versioned = _mapping(resource.properties.get("versioning")).get("enabled") is True
    if versioned and not any(c.get("daysSinceNoncurrentTime") or c.get("numNewerVersions") for c in deleting):
        yield (
            "Old versions of objects are kept for ever. Add a lifecycle rule Delete with days_since_noncurrent_time or "
            "num_newer_versions, or switch versioning off."
        )


def machine_types(resource: Resource, settings: Settings) -> Iterator[str]:
    allowed = settings.machine_types
    if not allowed:
        return
    for path, machine in _machines(resource):
        if isinstance(machine, str) and machine not in allowed:
            yield (
                f"{path} is {machine}, and stack {settings.stack} may use {', '.join(allowed)}. Choose one of these, "
                "or add the machine to headcount:machineTypes, which its reviewers see."
            )


def _machines(resource: Resource) -> Iterator[tuple[str, Any]]:
    if resource.type == ROLLOUT:
        for name, release in _releases(resource).items():
            yield f"models.{name}.machineType", release.get("machineType")
    elif resource.type in JOBS:
        yield "machineType", resource.properties.get("machineType")


def monthly_cost(price: Price, limit: Callable[[Settings], float | None]) -> Check:
    """The rule about the cost of a month in which all replicas run. A price that is not known is no price of zero."""

    def check(resource: Resource, settings: Settings) -> Iterator[str]:
        most = limit(settings)
        if most is None or resource.type != ROLLOUT:
            return
        total, unpriced = 0.0, set()
        for release in _releases(resource).values():
            machine, accelerator = release.get("machineType"), release.get("acceleratorType") or ""
            accelerators = release.get("acceleratorCount") or 0
            replicas = release.get("maxReplicas") or release.get("minReplicas") or 1
            if UNKNOWN in (machine, accelerator, accelerators, replicas):
                return
            hour = price(str(machine), settings.region, str(accelerator), int(accelerators))
            if hour is None:
                unpriced.add(" with ".join(part for part in (machine, accelerator) if part))
            else:
                total += hour * int(replicas) * HOURS_A_MONTH
        if unpriced:
            yield (
                f"The price of {', '.join(sorted(unpriced))} is not known, so the cost cannot be compared with the "
                "limit. Add the price to the table of prices with its source, or choose a machine that is in it."
            )
        if total > most:
            yield (
                f"With all replicas the machines cost {total:.0f} USD a month or more, and the limit is {most:.0f}. "
                "Choose fewer replicas or smaller machines, or raise the limit: "
                f"pulumi config set monthlyCostLimit {math.ceil(total)} -s {settings.stack}."
            )

    return check


# ---------------------------------------------------------------------------------------------- production


def protected(resource: Resource, settings: Settings) -> Iterator[str]:
    if not settings.production or resource.protect:
        return
    serving = [name for name, release in settings.releases.items() if release.traffic > 0]
    replaceable = resource.type in (ENDPOINT, ROLLOUT) and settings.replace_endpoint
    holds = resource.type in (BUCKET, REPOSITORY, ACCOUNT, ENDPOINT, ROLLOUT) and not replaceable
    if holds or (resource.type in (MODEL_VERSION, RELEASED_IMAGE) and resource.name in serving):
        on_purpose = f" To replace it on purpose: pulumi config set replaceEndpoint true -s {settings.stack}."
        yield (
            "A mistake may delete it. Set protect=True in its ResourceOptions."
            + on_purpose * (resource.type in (ENDPOINT, ROLLOUT))
        )


def replicas(resource: Resource, settings: Settings) -> Iterator[str]:
    if not settings.production or resource.type != ROLLOUT:
        return
    for name, release in _releases(resource).items():
        least = release.get("minReplicas", 1)
        if release.get("traffic") and isinstance(least, int | float) and least < LEAST_REPLICAS:
            yield (
                f"{name} serves with {least:.0f} replica{'s' * (least != 1)}: it does not answer while a machine is "
                f"exchanged. Run at least {LEAST_REPLICAS}: pulumi config set minReplicas {LEAST_REPLICAS} "
                f"-s {settings.stack}."
            )


def canary_first(resource: Resource, settings: Settings) -> Iterator[str]:
    """A version is unproven while this update uploads it, which a preview sees as a model without a known name.

    The first deployment of a stack makes the endpoint too; nothing serves beside which a canary could be tried.
    """
    if not settings.production or resource.type != ROLLOUT or resource.properties.get("endpoint") is UNKNOWN:
        return
    new = {name: r.get("traffic", 0) for name, r in _releases(resource).items() if r.get("model") is UNKNOWN}
    share = sum(traffic for traffic in new.values() if isinstance(traffic, int | float))
    if share > CANARY_PERCENT:
        names = " and ".join(name for name, traffic in new.items() if traffic)
        yield (
            f"{names} would get {share:.0f} % of the traffic with a version that has never served. Keep what runs, and "
            f"give the new version {CANARY_PERCENT} % or less: headcount release -s {settings.stack} canary next 10. "
            f"Promote it after that: headcount release -s {settings.stack} promote next."
        )


def _releases(rollout: Resource) -> dict[str, Mapping[str, Any]]:
    models = _mapping(rollout.properties.get("models"))
    return {name: release for name, release in models.items() if isinstance(release, Mapping)}


def _mapping(value: Any) -> Mapping[str, Any]:
    """A value that should be a map, as an empty one where it is absent or not known."""
    return value if isinstance(value, Mapping) else {}


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a value with its path; texts that hold JSON, as IAM policies do, as the values in them."""
    if isinstance(value, str):
        if value[:1] in "{[" and value:
            try:
                value = json.loads(value)
            except ValueError:
                yield path, value
                return
            yield from _texts(value, path)
        else:
            yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name != "description":
                yield from _texts(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, Sequence):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")


@functools.cache
def _table() -> prices.Prices:
    return prices.load()


def price(machine_type: str, region: str, accelerator: str, accelerators: int) -> float | None:
    """The price of online prediction in the price table of the reviews, else Compute Engine's, which is lower."""
    found = (
        _table().machine(service, machine_type, region, accelerator, accelerators)
        for service in (prices.PREDICTION, prices.COMPUTE)
    )
    return next((usd for usd in found if usd is not None), None)


RULES: Final = (
    Rule("private-buckets", "No bucket can be made public.", private_buckets, everywhere=True, general=True),
    Rule("no-public-members", "Nothing is granted to everybody.", no_public_members, everywhere=True, general=True),
    Rule(
        "authenticated-endpoints",
        "Every endpoint asks its callers who they are.",
        authenticated_endpoints,
        everywhere=True,
        general=True,
    ),
    Rule("no-primitive-roles", "No role reaches a whole project.", no_primitive_roles, everywhere=True, general=True),
    Rule(
        "no-service-account-keys",
        "No service account has a key.",
        no_service_account_keys,
        everywhere=True,
        general=True,
    ),
    Rule(
        "images-by-digest",
        "Images run by digest, from the project's own registry.",
        images_by_digest,
        everywhere=True,
    ),
    Rule("labelled", "What costs money carries the labels of its stack.", labelled),
    Rule("retention", "What is stored is deleted at some time.", retention),
    Rule("machine-types", "Machines are of the types that the stack allows.", machine_types),
    Rule(
        "monthly-cost",
        "The machines cost no more than the stack's limit.",
        monthly_cost(price, lambda settings: settings.monthly_cost_limit),
    ),
    Rule("protected", "Production is protected from deletion.", protected),
    Rule("replicas", f"Production serves with at least {LEAST_REPLICAS} replicas.", replicas),
    Rule("canary-first", "In production a new version serves as a canary first.", canary_first),
)
