"""The rules of the policy pack, as functions: one case that keeps and one that breaks each of them."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
from helpers import ROOT

from infra.policy import rules
from infra.policy.rules import RULES, UNKNOWN, Resource, Rule
from infra.settings import Settings
from review import dangers

DIGEST = "sha256:" + "1" * 64
IMAGE = "europe-west4-docker.pkg.dev/my-project/headcount-prod/headcount"
LABELS = {"project": "headcount", "stack": "prod"}
MODEL = "projects/my-project/locations/europe-west4/models/headcount-prod@3"
RELEASES = {"main": {"image": DIGEST, "traffic": 100}, "old": {"image": DIGEST, "traffic": 0}}


def settings(stack: str = "prod", **more: Any) -> Settings:
    given = {"stack": stack, "project": "my-project", "region": "europe-west4", "releases": RELEASES}
    return Settings.model_validate(given | ({"production": True} if stack == "prod" else {}) | more)


def resource(type_: str, name: str = "main", /, *, protect: bool = False, **properties: Any) -> Resource:
    return Resource(type_, name, properties, protect)


def rollout(endpoint: Any = "projects/my-project/locations/europe-west4/endpoints/1", **releases: Any) -> Resource:
    usual = {"model": MODEL, "machineType": "c3-highcpu-4", "minReplicas": 2, "maxReplicas": 4}
    models = {name: usual | release for name, release in releases.items()}
    return resource(rules.ROLLOUT, "rollout", endpoint=endpoint, models=models)


BUCKET: dict[str, Any] = {
    "name": "my-project-headcount-prod",
    "publicAccessPrevention": "enforced",
    "uniformBucketLevelAccess": True,
    "softDeletePolicy": {"retentionDurationSeconds": 0},
    "lifecycleRules": [{"action": {"type": "Delete"}, "condition": {"age": 30}}],
    "versioning": {"enabled": False},
    "labels": LABELS,
}


def bucket(**changed: Any) -> Resource:
    return resource(rules.BUCKET, "bucket", **(BUCKET | changed))


def grant(**properties: Any) -> Resource:
    return resource("gcp:storage/bucketIAMMember:BucketIAMMember", **properties)


REPOSITORY = "gcp:artifactregistry/repository:Repository"
VERSION: dict[str, Any] = {"image": f"{IMAGE}@{DIGEST}", "labels": LABELS}
READER = "roles/storage.objectViewer"
#: By rule: resources that keep it.
KEPT: dict[str, list[Resource]] = {
    "private-buckets": [bucket(), bucket(publicAccessPrevention=UNKNOWN), resource(REPOSITORY)],
    "no-public-members": [
        grant(role=READER, member="serviceAccount:a@my-project.iam.gserviceaccount.com"),
        grant(role=READER, member=UNKNOWN),
        bucket(description="allUsers are kept out"),
        resource("gcp:kms/keyRingIAMPolicy:KeyRingIAMPolicy", policyData='{"bindings": [{"members": ["user:a@b.c"]}]}'),
    ],
    "authenticated-endpoints": [
        resource(rules.RUN_SERVICE, name="x"),
        resource(rules.VERTEX_PROVIDER, "vertex", endpoint="http://127.0.0.1:8790"),
        resource(rules.VERTEX_PROVIDER, "vertex", endpoint="https://vertex.example.com"),
    ],
    "no-primitive-roles": [grant(role=READER), grant(role="roles/viewer.custom"), grant(role="roles/browser")],
    "no-service-account-keys": [resource(rules.ACCOUNT)],
    "images-by-digest": [
        resource(rules.MODEL_VERSION, **VERSION),
        resource(rules.MODEL_VERSION, image=UNKNOWN),
        resource(rules.RELEASED_IMAGE, repository=IMAGE, digest=DIGEST, sources=["elsewhere/x/y"]),
        resource(rules.RELEASED_IMAGE, repository=UNKNOWN, digest=DIGEST),
    ],
    "labelled": [
        bucket(),
        bucket(labels=UNKNOWN),
        resource(rules.MODEL_VERSION, labels=LABELS | {"more": "x"}),
        *(resource(pipeline, labels=LABELS) for pipeline in rules.PIPELINES),
        grant(),
    ],
    "retention": [
        bucket(),
        bucket(name="models", lifecycleRules=[]),
        bucket(
            versioning={"enabled": True},
            lifecycleRules=[*BUCKET["lifecycleRules"],
                            {"action": {"type": "Delete"}, "condition": {"daysSinceNoncurrentTime": 7}}],
        ),
        resource(REPOSITORY, cleanupPolicies=[{"id": "old", "action": "DELETE"}]),
    ],
    "machine-types": [rollout(main={"traffic": 100}), rollout(main={"machineType": UNKNOWN}), rollout()],
    "monthly-cost": [rollout(), rollout(main={"traffic": 100, "machineType": UNKNOWN})],
    "protected": [
        resource(rules.BUCKET, protect=True),
        resource(rules.ROLLOUT, protect=True),
        resource(rules.MODEL_VERSION, "main", protect=True),
        resource(rules.MODEL_VERSION, "old"),
        grant(),
    ],
    "replicas": [rollout(main={"traffic": 100}), rollout(main={"traffic": 100}, next={"traffic": 0, "minReplicas": 1})],
    "canary-first": [
        rollout(main={"traffic": 100}),
        rollout(main={"traffic": 80}, next={"traffic": 20, "model": UNKNOWN}),
        rollout(endpoint=UNKNOWN, main={"traffic": 100, "model": UNKNOWN}),
    ],
}  # fmt: skip
#: By rule: resources that break it, each with the part of the message that says how to comply.
BROKEN: dict[str, list[tuple[Resource, str]]] = {
    "private-buckets": [
        (bucket(publicAccessPrevention="inherited"), 'Set public_access_prevention="enforced"'),
        (resource(rules.BUCKET, uniformBucketLevelAccess=True), 'Set public_access_prevention="enforced"'),
        (bucket(uniformBucketLevelAccess=False), "Set uniform_bucket_level_access=True"),
    ],
    "no-public-members": [
        (grant(role=READER, member="allUsers"), "Name the accounts"),
        (grant(role=READER, members=["user:a@b.c", "allAuthenticatedUsers"]), "members[1] names allAuthenticatedUsers"),
        (resource("gcp:storage/bucketACL:BucketACL", roleEntities=["READER:allUsers"]), "Name the accounts"),
        (
            resource("gcp:vertex/aiEndpointIamPolicy:AiEndpointIamPolicy",
                     policyData='{"bindings": [{"role": "roles/aiplatform.user", "members": ["allUsers"]}]}'),
            "policyData.bindings[0].members[0] names allUsers",
        ),
    ],
    "authenticated-endpoints": [
        (resource(rules.RUN_SERVICE, invokerIamDisabled=True), "grant roles/run.invoker"),
        (resource(rules.VERTEX_PROVIDER, endpoint="http://vertex.example.com"), "Use https"),
    ],
    "no-primitive-roles": [
        (grant(role="roles/editor"), "Grant the narrowest predefined role"),
        (
            resource("gcp:projects/iAMPolicy:IAMPolicy",
                     policyData='{"bindings": [{"role": "roles/owner", "members": ["user:a@b.c"]}]}'),
            "policyData.bindings[0].role is the primitive role roles/owner",
        ),
    ],
    "no-service-account-keys": [
        (resource("gcp:serviceaccount/key:Key"), "Workload Identity Federation"),
        (resource("gcp:storage/hmacKey:HmacKey"), "Impersonate the account"),
    ],
    "images-by-digest": [
        (resource(rules.MODEL_VERSION, image=f"{IMAGE}:latest"), "Use the digest"),
        (resource(rules.MODEL_VERSION, image=f"docker.io/library/nginx@{DIGEST}"), "pulumi config set imageSource"),
        (resource(rules.RELEASED_IMAGE, repository="127.0.0.1:5000/my-project/x", digest=DIGEST), "imageSource"),
        (resource(rules.JOBS[0], image="europe-west4-docker.pkg.dev/other/x/y:1"), "not named by its digest"),
    ],
    "labelled": [
        (bucket(labels={"project": "headcount"}), "stack. Set labels"),
        (bucket(labels=None), "Set labels"),
        *((resource(pipeline, labels={}), "Set labels") for pipeline in rules.PIPELINES),
    ],
    "retention": [
        (bucket(lifecycleRules=[]), "Add a lifecycle rule Delete with an age"),
        (bucket(softDeletePolicy=None), "Set soft_delete_policy"),
        (bucket(versioning={"enabled": True}), "Add a lifecycle rule Delete with days_since_noncurrent_time"),
        (resource(REPOSITORY, cleanupPolicies=[{"action": "KEEP"}]), "Add a cleanup policy"),
    ],
    "machine-types": [
        (rollout(main={"traffic": 100, "machineType": "a2-highgpu-1g"}), "Choose one of these, or add"),
        (resource(rules.JOBS[1], machineType="n1-standard-4"), "machineType is n1-standard-4"),
    ],
    "monthly-cost": [
        (rollout(main={"maxReplicas": 100}), "pulumi config set monthlyCostLimit"),
        (rollout(main={"machineType": "m9-giant-4"}), "Add the price to the table of prices"),
    ],
    "protected": [
        (resource(rules.BUCKET), "Set protect=True"),
        (resource(rules.ENDPOINT), "pulumi config set replaceEndpoint true -s prod"),
        (resource(rules.MODEL_VERSION, "main"), "Set protect=True"),
    ],
    "replicas": [
        (rollout(main={"traffic": 100, "minReplicas": 1}), "pulumi config set minReplicas 2 -s prod"),
        (rollout(main={"traffic": 100, "minReplicas": 0}), "main serves with 0 replicas"),
    ],
    "canary-first": [
        (rollout(main={"traffic": 100, "model": UNKNOWN}), "headcount release -s prod canary next 10"),
        (rollout(main={"traffic": 70}, next={"traffic": 30, "model": UNKNOWN}), "next would get 30 %"),
        (rollout(a={"traffic": 15, "model": UNKNOWN}, b={"traffic": 85, "model": UNKNOWN}), "a and b would get 100 %"),
    ],
}  # fmt: skip
BY_NAME = {rule.name: rule for rule in RULES}
STACK = settings(machineTypes=["c3-highcpu-4", "c3-highcpu-8"], monthlyCostLimit=1000)


def said(rule: Rule, one: Resource, stack: Settings = STACK) -> list[str]:
    return list(rule.check(one, stack))


def test_every_rule_has_a_case_that_keeps_and_one_that_breaks_it() -> None:
    assert set(KEPT) == set(BROKEN) == set(BY_NAME)


@pytest.mark.parametrize(("name", "one"), [(name, one) for name, cases in KEPT.items() for one in cases])
def test_what_keeps_a_rule_is_not_reported(name: str, one: Resource) -> None:
    assert said(BY_NAME[name], one) == []


@pytest.mark.parametrize(("name", "one", "remedy"), [(name, *case) for name, cases in BROKEN.items() for case in cases])
def test_what_breaks_a_rule_is_reported_with_its_remedy(name: str, one: Resource, remedy: str) -> None:
    assert remedy in "\n".join(said(BY_NAME[name], one))


def test_what_a_preview_cannot_know_breaks_no_rule() -> None:
    types = {one.type for cases in BROKEN.values() for one, _ in cases}
    names = {name for cases in BROKEN.values() for one, _ in cases for name in one.properties}
    for rule in RULES:
        for type_ in types - {one.type for one, _ in BROKEN["no-service-account-keys"]}:
            assert said(rule, Resource(type_, "main", dict.fromkeys(names, UNKNOWN), protect=True)) == []


@pytest.mark.parametrize("name", ["protected", "replicas", "canary-first"])
def test_rules_of_production_leave_other_stacks_alone(name: str) -> None:
    for one, _ in BROKEN[name]:
        assert said(BY_NAME[name], one, settings("dev")) == []


def test_an_endpoint_may_be_replaced_on_purpose() -> None:
    stack = settings(replaceEndpoint=True)
    assert said(BY_NAME["protected"], resource(rules.ENDPOINT), stack) == []
    assert said(BY_NAME["protected"], resource(rules.BUCKET), stack) != []


def test_the_sandbox_s_registry_is_the_project_s_own_on_the_sandbox_only() -> None:
    here = resource(rules.MODEL_VERSION, image=f"127.0.0.1:8791/my-project/headcount-local/headcount@{DIGEST}")
    local = settings("local", vertexEndpoint="http://127.0.0.1:8790")
    assert said(BY_NAME["images-by-digest"], here, local) == []
    assert said(BY_NAME["images-by-digest"], here) != []


def test_without_a_list_every_machine_type_is_allowed() -> None:
    assert said(BY_NAME["machine-types"], rollout(main={"machineType": "a2-highgpu-1g"}), settings()) == []


PRICES: Mapping[tuple[str, str], float] = {("c3-highcpu-4", ""): 0.25, ("g2-standard-8", "NVIDIA_L4"): 1.0}


@pytest.mark.parametrize(
    ("releases", "limit", "message"),
    [
        ({"main": {}}, 730.0, ""),  # 4 replicas at most × 0.25 USD × 730 hours
        ({"main": {}}, 729.0, "cost 730 USD a month or more, and the limit is 729"),
        ({"main": {}, "next": {"maxReplicas": UNKNOWN}}, 1.0, ""),
        ({"main": {"machineType": "g2-standard-8", "acceleratorType": "NVIDIA_L4"}}, 1000.0, "cost 2920 USD"),
        ({"main": {"machineType": "m9-giant"}}, 1000.0, "The price of m9-giant is not known"),
        ({"main": {"machineType": "m9-giant"}}, None, ""),
    ],
)
def test_the_cost_of_a_month_has_a_limit(releases: dict[str, Any], limit: float | None, message: str) -> None:
    def price(machine: str, region: str, accelerator: str, accelerators: int) -> float | None:
        assert region == "europe-west4"
        return PRICES.get((machine, accelerator))

    check = rules.monthly_cost(price, lambda _: limit)
    found = list(check(rollout(**releases), STACK))
    assert len(found) == bool(message)
    assert message in "".join(found)


def test_general_rules_need_no_settings() -> None:
    for rule in RULES:
        if rule.general:
            for one, _ in BROKEN[rule.name]:
                assert list(rule.check(one, None))  # type: ignore[arg-type]


def test_the_page_names_every_rule_and_where_it_stops_a_stack() -> None:
    page = (ROOT / "docs" / "pull-requests.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|.*\| (every stack|production) \|$", page, re.MULTILINE))
    assert rows == {rule.name: "every stack" if rule.everywhere else "production" for rule in RULES}


def test_the_policies_and_the_review_have_the_same_limits() -> None:
    assert (rules.CANARY_PERCENT, rules.LEAST_REPLICAS) == (dangers.CANARY_PERCENT, dangers.PRODUCTION_REPLICAS)
