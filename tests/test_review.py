"""Reviews of recorded previews: the words, what is dangerous, what is never shown, and the limit of a comment.

tests/review_scenarios.py describes the recorded changes, and how they are recorded again. After a change of the words,
`WRITE_REVIEWS=1 pytest tests/test_review.py` writes the reviews anew; read them as a reviewer would.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from headcount.cli import app
from pulumi_vertex.wire import UNKNOWN
from review import dangers, events, markdown, page, prices, summary
from review.dangers import RULES
from review.events import Preview, shown
from review.served import served
from review.summary import Review, review

RECORDS = ROOT / "tests" / "reviews"
EXITS = {
    "nothing": 0,
    "prod-endpoint-kind": 1,
    "first-deployment": 2,
    "new-handler-line": 2,
    "machine-type": 2,
    "replicas": 2,
    "canary": 2,
    "promotion": 2,
    "rollback": 2,
    "bucket-public": 3,
    "endpoint-kind": 3,
    "new-predictor": 3,
    "paused": 3,
    "prod-below-two": 3,
    "prod-over-limit": 3,
    "prod-without-canary": 3,
}
PRICES = prices.load()


def recorded(name: str) -> Preview:
    stack = "prod" if name.startswith("prod-") else "dev"
    return events.read(stack, (RECORDS / f"{name}.jsonl").read_text().splitlines())


def earlier() -> set[str]:
    """The versions that had served when the rollback was previewed."""
    past = json.loads((RECORDS / "dev.json").read_text())
    return served(past, past["history"])


def reviewed(name: str) -> Review:
    return review(recorded(name), PRICES, earlier() if name == "rollback" else ())


# ------------------------------------------------------------------------------------------------ recorded changes


@pytest.mark.parametrize("name", EXITS)
def test_the_review_of_a_recorded_change_reads_as_it_should(name: str) -> None:
    found = reviewed(name)
    text = markdown.render(found)
    golden = RECORDS / f"{name}.md"
    if os.environ.get("WRITE_REVIEWS"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert found.exit_code == EXITS[name]


def test_every_recorded_change_has_a_review() -> None:
    assert {path.stem for path in RECORDS.glob("*.jsonl")} == set(EXITS) == {path.stem for path in RECORDS.glob("*.md")}


def test_no_change_is_one_line() -> None:
    assert markdown.render(reviewed("nothing")).count("\n") == 1


@pytest.mark.parametrize("name", EXITS)
def test_the_steps_are_those_that_the_provider_logged(name: str) -> None:
    """The provider plans from the endpoint, the review from Pulumi's state. Here both are the same."""
    preview, found = recorded(name), reviewed(name)
    assert not found.traffic.logged
    if found.exit_code != summary.ERROR:
        assert found.traffic.steps == list(preview.rollout_log)


def test_where_the_endpoint_is_not_as_the_state_has_it_the_steps_are_the_provider_s() -> None:
    lines = (RECORDS / "replicas.jsonl").read_text().replace("1 replica becomes", "3 replicas becomes")
    found = review(events.read("dev", lines.splitlines()), PRICES)
    assert found.traffic.steps == ["resize main: 3 replicas becomes 2 to 4 replicas"]
    assert "The endpoint is not as Pulumi's state has it" in markdown.render(found)
    assert "The endpoint is not as Pulumi" in page.render(found)


def test_the_traffic_of_a_canary_after_each_step() -> None:
    frames = reviewed("canary").traffic.frames
    assert [frame.traffic for frame in frames] == [
        {"headcount-dev@1": 100},
        {"headcount-dev@1": 100},
        {"headcount-dev@1": 90, "new next": 10},
    ]
    assert list(frames[-1].machines) == ["headcount-dev@1", "new next"]


@pytest.mark.parametrize("name", EXITS)
def test_the_traffic_after_the_last_step_is_that_of_the_table(name: str) -> None:
    moved = reviewed(name).traffic
    if moved.frames and not moved.replaced:
        shares = [share for share in moved.frames[-1].traffic.values() if share]
        assert sorted(shares) == sorted(s.traffic for s in moved.after if s.traffic)
        assert len(moved.frames[-1].machines) == len(moved.after)


@pytest.mark.parametrize("name", EXITS)
def test_other_tools_read_the_tables_and_code_blocks(name: str) -> None:
    """markdown-it judges the Markdown as CommonMark with tables."""
    found = reviewed(name)
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown.render(found))
    count = {kind: sum(token.type == kind for token in tokens) for kind in ("table_open", "fence")}
    rows = sum(token.type == "tr_open" for token in tokens)
    assert count["fence"] == len(found.errors) + sum(1 for one in found.resources if one.differences)
    assert bool(count["table_open"]) == bool(found.resources)
    assert rows >= len(found.resources) + bool(found.resources)
    folded = "".join(token.content for token in tokens if token.type == "html_block")
    assert folded.count("<details>") == folded.count("</details>") == bool(found.resources)


@pytest.mark.parametrize("name", ["canary", "endpoint-kind", "prod-endpoint-kind", "nothing"])
def test_the_page_has_the_headline_and_every_step(name: str) -> None:
    found = reviewed(name)
    text = page.render(found)
    assert f"<h1>{found.stack}: {found.headline}</h1>" in text.replace("&#x27;", "'")
    for step in found.traffic.steps:
        assert step in text
    assert text.count("<tr") == text.count("</tr>")
    assert "http" not in re.sub(r"http://127[^<]*", "", text), "it loads nothing"


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("name", ["nothing", "prod-endpoint-kind", "canary", "bucket-public"])
def test_the_command_prints_the_review_and_exits_accordingly(name: str, tmp_path: Path) -> None:
    stack, log = recorded(name).stack, str(RECORDS / f"{name}.jsonl")
    run = CliRunner().invoke(app, ["review", stack, "--events", log, "--html", str(tmp_path / "review.html")])
    assert run.exit_code == EXITS[name]
    assert run.stdout == (RECORDS / f"{name}.md").read_text()
    assert (tmp_path / "review.html").read_text().startswith("<!doctype html>")
    run = CliRunner().invoke(app, ["review", stack, "--events", log, "--json"])
    assert run.exit_code == EXITS[name]
    found = json.loads(run.stdout)
    assert (found["exit_code"], found["stack"]) == (EXITS[name], stack)
    assert found["dangerous"] == (EXITS[name] == summary.DANGEROUS)


def test_an_event_log_that_is_none_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("no JSON\n")
    for file in (log, tmp_path / "missing"):
        run = CliRunner().invoke(app, ["review", "dev", "--events", str(file)])
        assert run.exit_code == summary.ERROR
        assert run.stdout == ""


def test_a_log_that_breaks_off_is_an_error_and_not_a_small_change() -> None:
    lines = (RECORDS / "canary.jsonl").read_text().splitlines()
    found = review(events.read("dev", [line for line in lines if "summaryEvent" not in line]), PRICES)
    assert found.exit_code == summary.ERROR


def test_a_mandatory_policy_makes_a_change_dangerous_and_an_advisory_one_does_not() -> None:
    lines = (RECORDS / "replicas.jsonl").read_text().splitlines()
    for level, code in (("mandatory", summary.DANGEROUS), ("advisory", summary.CHANGE)):
        policy = {"policyName": "labels", "message": "needs <labels>", "enforcementLevel": level}
        found = review(events.read("dev", [*lines, json.dumps({"policyEvent": policy})]), PRICES)
        assert found.exit_code == code
        assert f"- {level} `labels`: needs &lt;labels>" in markdown.render(found)


# ------------------------------------------------------------------------------------------------ what is never shown

SECRET = {events.SIGNATURE: "1b47061264138c4ac30d75fd1eb44270", "ciphertext": "hunter2", "plaintext": '"hunter2"'}
NESTED = st.recursive(
    st.just(SECRET),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
    max_leaves=6,
)


def a_change(old: dict[str, Any] | None, new: dict[str, Any] | None, **more: Any) -> Preview:
    """The preview of one changed resource beside one that stays."""
    op = "update" if old is not None and new is not None else "create" if old is None else "delete"
    metadata = {"op": op, "urn": "urn:pulumi:dev::headcount::a:b/c:Thing::thing", "type": "a:b/c:Thing", **more}
    for side, inputs in (("old", old), ("new", new)):
        protect = metadata.pop(f"{side}_protect", False)
        metadata[side] = None if inputs is None else {"inputs": inputs, "protect": protect}
    stays = {"op": "same", "urn": "urn:pulumi:dev::headcount::a:b:C::stays", "type": "a:b:C", "old": {}, "new": {}}
    log = [{"resourcePreEvent": {"metadata": m}} for m in (stays, metadata)]
    return events.read("dev", [*map(json.dumps, log), '{"summaryEvent": {"result": "succeeded"}}'])


def everything(found: Review) -> str:
    """All that a review ever prints."""
    return markdown.render(found) + page.render(found) + json.dumps(summary.as_json(found))


@given(NESTED, NESTED)
def test_secrets_are_not_shown_wherever_they_are(old: Any, new: Any) -> None:
    found = review(a_change({"password": old, "x": 1}, {"password": new, "list": [new], "x": 2}), PRICES)
    assert "hunter2" not in everything(found)
    assert "x: 2" in markdown.render(found)


@pytest.mark.parametrize(
    "inputs",
    [
        {"env": {"API": "hunter2"}},
        {"env": [{"name": "API", "value": "hunter2"}]},
        {"containerSpec": {"env": [{"name": "API", "value": "hunter2"}], "command": ["run"]}},
        {"buildArgs": {"API": "hunter2"}},
        {"environmentVariables": {"API": {"deep": "hunter2"}}},
        {"registries": [{"address": "host", "password": "hunter2"}]},
        {"settings": {"apiToken": "hunter2", "clientSecret": "hunter2", "privateKey": "hunter2"}},
        {"credentials": {"json": "hunter2"}},
    ],
)
def test_values_of_environments_and_passwords_are_not_shown(inputs: dict[str, Any]) -> None:
    for preview in (a_change(None, inputs), a_change(inputs, None), a_change(inputs, {"x": 1})):
        assert "hunter2" not in everything(review(preview, PRICES))


def test_a_secret_that_changes_is_named_and_not_shown() -> None:
    diff = {"password": {"diffKind": "update", "inputDiff": True}}
    found = review(a_change({"password": SECRET}, {"password": SECRET}, detailedDiff=diff), PRICES)
    assert "- password: [secret]\n+ password: [secret]" in markdown.render(found)


def test_the_program_s_own_build_arguments_are_shown() -> None:
    assert shown({"buildArgs": {"SOURCES": "ac77", "OTHER": "x"}}) == {
        "buildArgs": {"SOURCES": "ac77", "OTHER": events.HIDDEN}
    }


@given(st.text(max_size=200), st.text(max_size=200))
def test_no_value_breaks_out_of_its_code_block_or_of_the_page(old: str, new: str) -> None:
    found = review(a_change({"x": f"```\n</details>{old}"}, {"x": f"<script>{new}```"}), PRICES)
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown.render(found))
    assert sum(token.type == "fence" for token in tokens) == (1 if found.resources[0].differences else 0)
    assert "</details>" in tokens[-1].content
    assert "<script>" not in page.render(found)


# ------------------------------------------------------------------------------------------------ the limit


@pytest.mark.parametrize(("resources", "properties", "size"), [(8, 40, 2_000), (400, 3, 50), (30, 100, 300)])
def test_a_large_change_fits_a_comment_and_says_what_is_left_out(resources: int, properties: int, size: int) -> None:
    metadata = [
        {
            "op": "create",
            "urn": f"urn:pulumi:dev::headcount::a:b:C::thing-{number}",
            "type": "a:b:C",
            "new": {"inputs": {f"p{i}": "é`|" * size for i in range(properties)}},
        }
        for number in range(resources)
    ]
    log = [json.dumps({"resourcePreEvent": {"metadata": m}}) for m in metadata]
    found = review(events.read("dev", [*log, '{"summaryEvent": {"result": "succeeded"}}']), PRICES)
    text = markdown.render(found)
    assert len(text) <= markdown.LONGEST
    blocks = text.count("```diff") + text.count("````diff")
    (left, count) = map(
        int, re.findall(r"The diffs of (\d+) more resources with (\d+) properties are left out", text)[0]
    )
    assert left == resources - sum(t.type == "fence" for t in MarkdownIt("commonmark").parse(text))
    assert count == left * properties
    assert text.endswith("</details>\n")
    assert blocks or resources < 400
    assert f"and {resources - markdown.MOST_LINES} more" in text or resources <= markdown.MOST_LINES


def test_many_errors_fit_too() -> None:
    errors = [
        {"diagnosticEvent": {"severity": "error", "message": "`" * 100 + str(n) + "x" * 5_000}} for n in range(90)
    ]
    text = markdown.render(review(events.read("dev", map(json.dumps, errors)), PRICES))
    assert len(text) <= markdown.LONGEST
    assert "The rest is left out" in text


# ------------------------------------------------------------------------------------------------ what is dangerous


def found_rules(preview: Preview, served: set[str] | None = None) -> set[str]:
    return {finding.rule.name for finding in review(preview, PRICES, served or set()).findings}


def of(type_: str, old: dict[str, Any] | None, new: dict[str, Any] | None, **more: Any) -> Preview:
    urn = f"urn:pulumi:dev::headcount::{type_}::thing"
    return a_change(old, new, urn=urn, type=type_, **more)


BUCKET = dangers.BUCKET
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
