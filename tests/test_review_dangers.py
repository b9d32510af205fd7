"""What counts as dangerous: each rule with a change that it finds and one that it does not, and who has served."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from helpers import ROOT
from review_previews import EXITS, PRICES, a_change, reviewed

from pulumi_vertex.wire import UNKNOWN
from review import dangers, events
from review.dangers import RULES
from review.events import Preview
from review.served import served
from review.summary import review


def found_rules(preview: Preview, served: set[str] | None = None) -> set[str]:
    return {finding.rule.name for finding in review(preview, PRICES, served or set()).findings}


def of(type_: str, old: dict[str, Any] | None, new: dict[str, Any] | None, **more: Any) -> Preview:
    urn = f"urn:pulumi:dev::headcount::{type_}::thing"
    return a_change(old, new, urn=urn, type=type_, **more)


BUCKET = dangers.BUCKET
NIGHTLY = {"cron": "0 3 * * *", "timeZone": "Europe/Amsterdam"}
OFTEN = NIGHTLY | {"cron": "*/20 * * * *"}
MEMBER = "gcp:storage/bucketIAMMember:BucketIAMMember"
GRANT = {"bucket": "b", "role": "roles/viewer", "member": "user:a@example.com"}
DANGERS: list[tuple[str, Preview, Preview]] = [  # the rule, a change that it finds, and one that it does not
    ("data-lost", of(BUCKET, {"forceDestroy": True}, None), of("a:b:Stateless", {"x": 1}, None)),
    ("data-lost", of(BUCKET, {}, {"publicAccessPrevention": "enforced"}, op="replace"), of(BUCKET, {"x": 1}, {"x": 2})),
    ("endpoint-replaced", of(dangers.ENDPOINT, {}, {"x": 1}, op="replace"), of(dangers.ENDPOINT, {}, {"x": 1})),
    ("protection-removed", of(BUCKET, {}, {}, op="same", old_protect=True), of(BUCKET, {}, {}, new_protect=True)),
    ("access-widened", of(MEMBER, None, GRANT), of(MEMBER, GRANT, None)),
    ("access-widened", of(MEMBER, GRANT, {**GRANT, "role": "roles/owner"}), of(MEMBER, GRANT, {**GRANT, "x": 1})),
    (
        "access-widened",
        of("gcp:projects/iAMCustomRole:IAMCustomRole", {"permissions": ["a"]}, {"permissions": ["a", "b"]}),
        of("gcp:projects/iAMCustomRole:IAMCustomRole", {"permissions": ["a", "b"]}, {"permissions": ["a"]}),
    ),
    ("access-widened", of("gcp:serviceaccount/key:Key", None, {}), of("gcp:serviceaccount/key:Key", {}, None)),
    ("public-access", of(MEMBER, None, {**GRANT, "member": "allUsers"}), of(MEMBER, None, GRANT)),
    (
        "public-access",
        of("gcp:projects/iAMBinding:IAMBinding", {"members": []}, {"members": ["allAuthenticatedUsers"]}),
        of("gcp:projects/iAMBinding:IAMBinding", {"members": ["allUsers"]}, {"members": []}),
    ),
    (
        "public-access",
        of(BUCKET, {"publicAccessPrevention": "enforced"}, {"publicAccessPrevention": "inherited"}),
        of(BUCKET, {"publicAccessPrevention": "inherited"}, {"publicAccessPrevention": "enforced"}),
    ),
    (
        "public-access",
        of("gcp:storage/bucketACL:BucketACL", None, {"predefinedAcl": "publicRead"}),
        of("gcp:storage/bucketACL:BucketACL", None, {"predefinedAcl": "private", "roleEntities": ["OWNER:user-a"]}),
    ),
    ("frequent-runs", of(dangers.SCHEDULE, None, OFTEN), of(dangers.SCHEDULE, None, NIGHTLY)),
    (
        "frequent-runs",
        of(dangers.SCHEDULE, NIGHTLY, OFTEN),
        of(dangers.SCHEDULE, OFTEN, OFTEN | {"labels": {"a": "b"}}),
    ),
    ("frequent-runs", of(dangers.SCHEDULE, OFTEN | {"paused": True}, OFTEN), of(dangers.SCHEDULE, OFTEN, None)),
    ("frequent-runs", of(dangers.SCHEDULE, None, OFTEN), of(dangers.SCHEDULE, None, OFTEN | {"paused": True})),
    ("frequent-runs", of(dangers.SCHEDULE, None, OFTEN), of(dangers.SCHEDULE, None, OFTEN | {"cron": UNKNOWN})),
    ("frequent-runs", of(dangers.SCHEDULE, None, OFTEN), of(dangers.SCHEDULE, None, OFTEN | {"cron": "* * 31 2 *"})),
]


@pytest.mark.parametrize(("rule", "dangerous", "harmless"), DANGERS)
def test_a_rule_finds_its_danger_and_nothing_else(rule: str, dangerous: Preview, harmless: Preview) -> None:
    assert rule in found_rules(dangerous)
    assert rule not in found_rules(harmless)


def test_grants_of_a_new_stack_are_not_dangerous_but_public_ones_are() -> None:
    metadata = {"op": "create", "urn": "urn:pulumi:dev::headcount::x::m", "type": MEMBER, "new": {"inputs": GRANT}}
    for member, rules in (("user:a@example.com", set()), ("allUsers", {"public-access"})):
        metadata["new"]["inputs"] = {**GRANT, "member": member}  # type: ignore[index]
        log = [{"resourcePreEvent": {"metadata": metadata}}, {"summaryEvent": {"result": "succeeded"}}]
        assert found_rules(events.read("dev", map(json.dumps, log))) == rules


def rollout(
    old: dict[str, tuple[str, int]], new: dict[str, tuple[str, int]], replicas: tuple[int, int] = (2, 2), **config: str
) -> Preview:
    """A change of a rollout from releases to releases: name to version and traffic; `?` is a new version."""

    def models(releases: dict[str, tuple[str, int]], least: int) -> dict[str, Any]:
        return {
            name: {
                "model": UNKNOWN if version == "?" else f"projects/p/locations/l/models/m@{version}",
                "machineType": "c3-highcpu-4",
                "minReplicas": least,
                "maxReplicas": 4,
                "traffic": share,
            }
            for name, (version, share) in releases.items()
        }

    ids = {name: str(10**9 + number) for number, name in enumerate(old)}
    outputs = {"deployedModels": ids, "trafficSplit": {ids[n]: share for n, (_, share) in old.items() if share}}
    metadata = {
        "op": "update",
        "urn": f"urn:pulumi:prod::headcount::{dangers.ROLLOUT}::rollout",
        "type": dangers.ROLLOUT,
        "old": {"inputs": {"models": models(old, replicas[0])}, "outputs": outputs},
        "new": {"inputs": {"models": models(new, replicas[1])}},
    }
    config = {"gcp:region": "europe-west4", **{f"headcount:{key}": value for key, value in config.items()}}
    log = [
        {"preludeEvent": {"config": config}},
        {"resourcePreEvent": {"metadata": metadata}},
        {"summaryEvent": {"result": "succeeded"}},
    ]
    return events.read("prod", map(json.dumps, log))


def test_production_moves_to_a_new_version_by_a_canary() -> None:
    straight = rollout({"main": ("1", 100)}, {"main": ("1", 0), "next": ("?", 100)}, production="true")
    assert "unproven-traffic" in found_rules(straight)
    canary = rollout({"main": ("1", 100)}, {"main": ("1", 90), "next": ("?", 10)}, production="true")
    assert "unproven-traffic" not in found_rules(canary)
    proved = rollout({"main": ("1", 90), "next": ("2", 10)}, {"main": ("1", 0), "next": ("2", 100)}, production="true")
    assert "unproven-traffic" not in found_rules(proved)
    # Deployed without traffic is not proved.
    dark = rollout({"main": ("1", 100), "next": ("2", 0)}, {"main": ("1", 0), "next": ("2", 100)}, production="true")
    assert "unproven-traffic" in found_rules(dark)
    assert "unproven-traffic" not in found_rules(dark, {"m@2"})
    assert "unproven-traffic" not in found_rules(rollout({}, {"main": ("?", 100)}, production="true"))


def test_production_keeps_two_replicas() -> None:
    main = {"main": ("1", 100)}
    assert "few-replicas" in found_rules(rollout(main, main, (2, 1), production="true"))
    assert "few-replicas" not in found_rules(rollout(main, main, (2, 1)))
    assert "few-replicas" not in found_rules(rollout(main, main, (3, 2), production="true"))
    # It was so before: this change does not make it so.
    assert "few-replicas" not in found_rules(rollout(main, {"main": ("?", 100)}, (1, 1), production="true"))


def test_the_limit_holds_for_the_most_replicas() -> None:
    one, two = {"main": ("1", 100)}, {"main": ("1", 90), "next": ("?", 10)}
    # 4 × 0.1786092 USD × 730 hours are 521.54 USD for each release.
    assert "cost-over-limit" in found_rules(rollout(one, two, monthlyCostLimit="1043"))
    assert "cost-over-limit" not in found_rules(rollout(one, two, monthlyCostLimit="1044"))
    assert "limit-unknown" in found_rules(rollout(one, two, monthlyCostLimit="1044"))
    assert "cost-over-limit" not in found_rules(rollout(two, one, monthlyCostLimit="100")), "it becomes less"
    assert "cost-over-limit" not in found_rules(rollout(one, two))


def test_a_version_loses_its_protection_with_its_traffic() -> None:
    rules = {f.rule.name for f in reviewed("prod-without-canary").findings}
    assert "protection-removed" not in rules


def test_the_documents_have_the_table_of_dangers() -> None:
    text = (ROOT / "docs" / "review.md").read_text()
    for rule in RULES:
        assert f"| {rule.brief} | {rule.what} | {rule.why} |\n" in text
    assert len(re.findall(r"^\| .*\|$", text.partition("## What counts")[2].partition("## Cost")[0], re.MULTILINE)) == (
        len(RULES) + 2
    )


def test_every_rule_is_met_by_a_test_or_a_recorded_change() -> None:
    met = {name for name, *_ in DANGERS} | {"limit-unknown", "unproven-traffic"}
    met |= {finding.rule.name for name in EXITS for finding in reviewed(name).findings}
    assert met == {rule.name for rule in RULES}


# ------------------------------------------------------------------------------------------------ who has served


def version(name: str, number: int, created: str) -> dict[str, Any]:
    return {
        "type": dangers.VERSION,
        "urn": f"urn::x::{name}",
        "id": f"projects/p/models/m@{number}",
        "created": created,
    }


def test_a_version_has_served_if_its_release_had_traffic_since_it_was_made() -> None:
    def update(ended: str, releases: dict[str, int] | None, **more: Any) -> dict[str, Any]:
        config: dict[str, Any] = {"headcount:paused": {"value": str(more.pop("paused", False)).lower()}}
        if releases is not None:
            config["headcount:releases"] = {"value": json.dumps({n: {"traffic": t} for n, t in releases.items()})}
        return {
            "kind": "update",
            "result": "succeeded",
            "endTime": f"2026-11-21T{ended}.000Z",
            "config": config,
            **more,
        }

    state = {"deployment": {"resources": [version("main", 3, "2026-11-21T10:00:00.9Z")]}}
    assert served(state, [update("10:00:00", None)]) == {"m@3"}, "one release, main, where nothing is said"
    assert served(state, [update("11:00:00", {"main": 10, "next": 90})]) == {"m@3"}
    for not_it in (
        update("09:00:00", {"main": 100}),  # an earlier version of the release
        update("11:00:00", {"main": 0, "next": 100}),
        update("11:00:00", {"main": 100}, result="failed"),
        update("11:00:00", {"main": 100}, kind="destroy"),
        update("11:00:00", {"main": 100}, paused=True),
    ):
        assert served(state, [not_it]) == set()
    assert served({"deployment": {}}, []) == set()
