"""Reviews of recorded previews: the words, what is dangerous, what is never shown, and the limit of a comment.

tests/review_scenarios.py describes the recorded changes, and how they are recorded again. After a change of the words,
`WRITE_REVIEWS=1 pytest tests/test_review.py` writes the reviews anew; read them as a reviewer would.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from review_previews import EXITS, PRICES, RECORDS, a_change, recorded, reviewed
from typer.testing import CliRunner

from headcount.cli import app
from headcount.verify import Judged, Verdict, json_text
from review import events, markdown, page, summary
from review.events import shown
from review.summary import Review, review

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


@pytest.mark.parametrize("arguments", [[], ["dev", "--unknown"], ["dev", "prod"]])
def test_a_wrong_command_line_exits_with_1_as_2_says_that_something_changes(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["review", *arguments]).exit_code == summary.ERROR


def test_an_event_log_that_is_none_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("no JSON\n")
    for file in (log, tmp_path / "missing"):
        run = CliRunner().invoke(app, ["review", "dev", "--events", str(file)])
        assert run.exit_code == summary.ERROR
        assert run.stdout == ""


def test_what_verify_measured_stands_in_the_review(tmp_path: Path) -> None:
    file, page = tmp_path / "proof.json", tmp_path / "review.html"
    one, other = Judged("main", "m@1", 90, 58, 32, p95=0.4), Judged("next", "m@2", 10, 6, 6, p95=0.45)
    verdict = Verdict("dev", "next", "main", "worse", "its error is larger", 0.75, 0.5, 6, 64, 1, (one, other))
    log = str(RECORDS / "canary.jsonl")

    def run() -> Any:
        return CliRunner().invoke(app, ["review", "dev", "--events", log, "--verified", str(file), "--html", str(page)])

    file.write_text(json_text(verdict))
    said = (
        "Release `next` is worse: it miscounts 0.750 people a picture on 6 labelled pictures; `main`, which has most "
        "of the traffic, 0.500 on the same pictures; 95 % of its answers came within 0.45 s; 1 of 64 requests were not "
        "answered. Its error is larger."
    )
    assert f"**Verified**\n\n{said}\n" in run().output
    assert "<h2>Verified</h2><p>Release <code>next</code> is worse" in page.read_text()
    file.write_text(json_text(replace(verdict, stack="prod")))
    assert (run().exit_code, run().output.strip()) == (
        summary.ERROR, "This proof is of stack prod: run `headcount verify dev --json`.",
    )  # fmt: skip
    for broken in ("", "[]", "{}", '{"stack": "dev"}'):
        file.write_text(broken)
        assert "This is no output of `headcount verify" in run().output


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
        assert found.headline.startswith("a violated policy; ") == (code == summary.DANGEROUS)
        assert f"- {level} `labels`: needs &lt;labels>" in markdown.render(found)


# ------------------------------------------------------------------------------------------------ what is never shown

SECRET = {events.SIGNATURE: "1b47061264138c4ac30d75fd1eb44270", "ciphertext": "hunter2", "plaintext": '"hunter2"'}
NESTED = st.recursive(
    st.just(SECRET),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
    max_leaves=6,
)


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


def test_an_error_cannot_break_out_of_its_code_block() -> None:
    log = {"diagnosticEvent": {"severity": "error", "message": "no\n```\n# A heading\n````\n<img src=x>"}}
    tokens = MarkdownIt("commonmark").parse(markdown.render(review(events.read("dev", [json.dumps(log)]), PRICES)))
    assert [token.type for token in tokens].count("fence") == 1
    assert [token.content for token in tokens if token.type == "inline" and "A heading" in token.content] == []


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
