"""What is decided about schedules, as pure functions: their times, requests, diffs, and what was changed by hand."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from google.cloud import aiplatform_v1
from google.protobuf import json_format
from vertex_pipelines import EVERYTHING, SCHEDULE, SCHEDULES, TIMES, URN, VERSION, api, run, schedule
from vertex_plugin import Wire

from pulumi_vertex.engine_call import EngineCall
from pulumi_vertex.errors import ProblemError
from pulumi_vertex.pipelines import cron
from pulumi_vertex.pipelines.schedule_message import FIELDS, REQUEST, as_there, schedule_of
from pulumi_vertex.resource import State
from pulumi_vertex.wire import UNKNOWN


def message(inputs: Wire, claim: str = "") -> Wire:
    """The schedule of the inputs as Vertex AI answers it."""
    sent = schedule_of(api(), URN, inputs, claim, FIELDS)
    parsed: Any = aiplatform_v1.Schedule.from_json(json.dumps(sent))
    answer: Wire = json_format.MessageToDict(aiplatform_v1.Schedule.pb(parsed))
    state = "PAUSED" if inputs.get("paused") else "ACTIVE"
    return answer | {"state": state, "startTime": answer.get("startTime", "2026-01-01T00:00:00Z")}


@pytest.mark.parametrize(
    "more",
    [{}, EVERYTHING, TIMES, EVERYTHING | TIMES, {"templateUri": VERSION}],
    ids=["nothing", "the run", "the times", "both", "an address"],
)
def test_a_refresh_of_an_unchanged_schedule_finds_no_change(more: Wire) -> None:
    inputs = schedule(**more)
    assert SCHEDULES.check({k: v for k, v in inputs.items() if k != ("templateUri" in more and "template")}) == []
    assert as_there(inputs, message(inputs), "nightly") == inputs


def test_a_schedule_is_imported_as_it_was_declared() -> None:
    inputs = schedule(**{name: value for name, value in (EVERYTHING | TIMES).items() if name != "enableCaching"})
    found = as_there({}, message(inputs), "nightly")
    assert found | {name: TIMES[name] for name in ("startTime", "endTime")} == inputs
    assert SCHEDULES.diff(State(SCHEDULE, found | {"startTime": TIMES["startTime"]}, {"state": "PAUSED"}), inputs) == {
        "endTime": "update"  # the same moment, in another zone
    }


@pytest.mark.parametrize(
    ("change", "there"),
    [
        ({"cron": "0 4 * * *"}, {"cron": "TZ=Europe/Amsterdam 0 4 * * *"}),
        ({"timeZone": "UTC"}, {"cron": "0 3 * * *"}),
        ({"paused": True}, {"state": "PAUSED"}),
        ({"maxRunCount": 7}, {"maxRunCount": "7"}),
        ({"endTime": "2031-01-01T00:00:00Z"}, {"endTime": "2031-01-01T00:00:00Z"}),
        ({"maxConcurrentRuns": 4}, {"maxConcurrentRunCount": "4"}),
        ({"allowQueueing": True}, {"allowQueueing": True}),
        ({"displayName": "x"}, {"displayName": "x"}),
    ],
)
def test_a_refresh_sees_what_was_changed_by_hand(change: Wire, there: Wire) -> None:
    inputs = schedule()
    found = as_there(inputs, message(inputs) | there, "nightly")
    assert {name: found[name] for name in change} == change
    assert {name: value for name, value in found.items() if inputs.get(name) != value}.keys() == change.keys()


def test_a_refresh_sees_another_pipeline() -> None:
    inputs, changed = schedule(), message(schedule())
    changed[REQUEST]["pipelineJob"]["pipelineSpec"]["pipelineInfo"]["name"] = "other"
    changed[REQUEST]["pipelineJob"]["runtimeConfig"]["parameterValues"]["folder"] = "gs://y"
    found = as_there(inputs, changed, "nightly")
    assert json.loads(found["template"])["pipelineInfo"]["name"] == "other"
    assert found["parameters"] == {"folder": "gs://y"}


def test_a_refresh_compares_the_version_of_a_template_in_a_repository() -> None:
    inputs = {name: value for name, value in schedule(templateUri=VERSION).items() if name != "template"}
    there = message(schedule(templateUri=VERSION))
    assert as_there(inputs, there, "nightly") == inputs
    there[REQUEST]["pipelineJob"]["templateUri"] = VERSION[:-1] + "b"
    assert as_there(inputs, there, "nightly")["templateUri"] == VERSION[:-1] + "b"
    in_bucket = inputs | {"templateUri": "gs://b/x.yaml"}
    assert as_there(in_bucket, message(schedule()), "nightly") == in_bucket


# --- times


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("0 3 * *", "and '0 3 * *' has 4."),
        ("0 0 3 * * *", "has 6. Vertex AI has none for seconds."),
        ("@daily", "must have five fields (minute, hour, day of the month, month, day of the week)"),
        ("TZ=UTC 0 3 * * *", "Give the zone as timeZone."),
        ("0 3 31 2 *", "never fires: no month of '0 3 31 2 *' has such a day."),
        ("0 3 31 4,6 *", "never fires"),
        ("0 25 * * *", "its hour makes no sense"),
        ("0 3 32 * *", "its day of month makes no sense"),
        ("0 3 * * 8", "its day of week makes no sense"),
        ("61 3 * * *", "its minute makes no sense"),
        ("0 3 L * *", "may have numbers, names, and * , - / in its fields"),
        ("0 3 * * MON#1", "may have numbers, names"),
        ("0 3 15W * *", "may have numbers, names"),
        ("0 3 ? * *", "may have numbers, names"),
        ("", "has 0."),
    ],
)
def test_a_cron_expression_that_makes_no_sense_or_never_fires_is_refused(expression: str, words: str) -> None:
    assert words in dict(SCHEDULES.check(schedule() | {"cron": expression}))["cron"]


@pytest.mark.parametrize("expression", ["0 3 * * *", "*/15 8-17 * JAN-JUL MON-FRI", "0 0 29 2 *", "0 3 1,15 * 0"])
def test_a_cron_expression_of_five_fields_is_taken(expression: str) -> None:
    assert SCHEDULES.check(schedule() | {"cron": expression}) == []


def test_times_that_never_meet_are_refused() -> None:
    said = dict(SCHEDULES.check(schedule(startTime="2030-01-01T10:00:00Z", endTime="2030-01-01T11:00:00Z")))["endTime"]
    assert said == (
        "the schedule never fires: its first time is 2030-01-02T03:00:00+01:00, and it ends at 2030-01-01T11:00:00Z. "
        "Set a later endTime, or leave it out."
    )
    assert (
        "Did you mean Europe/Amsterdam?"
        in dict(SCHEDULES.check(schedule() | {"timeZone": "Europe/Amsterdm"}))["timeZone"]
    )
    assert "such as 2026-12-31T23:59:00Z" in dict(SCHEDULES.check(schedule(endTime="tomorrow")))["endTime"]
    assert (
        "such as 2026-12-31T23:59:00Z" in dict(SCHEDULES.check(schedule(startTime="2026-01-01T00:00:00")))["startTime"]
    )
    assert SCHEDULES.check(schedule(endTime=UNKNOWN, startTime="2030-01-01T10:00:00Z")) == []


def test_a_schedule_whose_end_is_over_is_refused_when_it_is_made_or_changed_and_not_later() -> None:
    call = EngineCall(URN, 9, threading.Event())
    over = schedule(endTime="2020-01-01T00:00:00Z")
    assert SCHEDULES.check(over) == [], "a stack with a schedule that has come to its end can still be deployed"
    with pytest.raises(ProblemError, match=r"endTime: the schedule never fires: .*2020-01-01T00:00:00Z"):
        SCHEDULES.preview(call, api(), over, None)
    with pytest.raises(ProblemError, match="never fires"):
        SCHEDULES.create(call, api(), over)
    state = State(SCHEDULE, over, {"state": "COMPLETED"})
    with pytest.raises(ProblemError, match="never fires"):
        SCHEDULES.preview(call, api(), over | {"cron": "0 4 * * *"}, state)
    assert SCHEDULES.diff(state, over) == {}


def test_the_next_time_is_that_of_the_zone() -> None:
    noon = datetime(2026, 7, 1, 12, tzinfo=UTC)
    assert str(cron.next_time(schedule(), noon)) == "2026-07-02 03:00:00+02:00"
    assert str(cron.next_time(run(cron="0 3 * * *"), noon)) == "2026-07-02 03:00:00+00:00"
    later = schedule(startTime="2026-12-01T00:00:00Z")
    assert str(cron.next_time(later, noon)) == "2026-12-01 03:00:00+01:00"
    assert cron.next_time(schedule(endTime="2026-07-01T13:00:00Z"), noon) is None


# --- diffs


@pytest.mark.parametrize(
    ("state", "old", "new", "wanted"),
    [
        ("ACTIVE", {}, {}, {}),
        ("ACTIVE", {}, {"timeZone": "UTC"}, {"timeZone": "update"}),
        ("ACTIVE", {}, {"paused": True}, {"paused": "update"}),
        ("ACTIVE", {"paused": True}, {"paused": True}, {"state": "update"}),
        ("PAUSED", {}, {}, {"state": "update"}),
        ("STATE_UNSPECIFIED", {}, {}, {"state": "update"}),
        ("ACTIVE", {"endTime": "2030-01-01T00:00:00Z"}, {}, {"endTime": "delete_replace"}),
        ("ACTIVE", {"maxRunCount": 3}, {}, {"maxRunCount": "delete_replace"}),
        ("ACTIVE", {"maxRunCount": 3}, {"maxRunCount": 4}, {"maxRunCount": "update"}),
        ("COMPLETED", {"maxRunCount": 3}, {"maxRunCount": 3}, {}),
        ("COMPLETED", {"maxRunCount": 3}, {"maxRunCount": 4}, {"maxRunCount": "update_replace"}),
    ],
)
def test_a_schedule_changes_in_place_where_vertex_ai_can_do_that(
    state: str, old: Wire, new: Wire, wanted: Wire
) -> None:
    found = State(SCHEDULE, schedule(**old), {"state": state})
    assert SCHEDULES.diff(found, schedule() | new) == wanted
    replaced = any(what.endswith("_replace") for what in wanted.values())
    assert any("counts its runs from 0" in line for line in SCHEDULES.warnings(found, schedule() | new)) == replaced
