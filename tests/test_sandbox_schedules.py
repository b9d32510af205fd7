"""Schedules of the sandbox, by its clock (stub containers)."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pipeline_templates as templates
import pytest
from google_clients import storage_client
from helpers import eventually
from test_sandbox_pipeline_jobs import body, bucket, make_bucket

from sandbox.errors import GoogleError
from sandbox.testing import RunningSandbox
from sandbox.vertex_schedules import next_run, next_time

HOUR = 3600.0


def at(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("cron", "after", "due"),
    [
        ("0 3 * * *", "2026-01-01T03:00:00Z", "2026-01-02T03:00:00Z"),
        ("TZ=Europe/Amsterdam 0 3 * * *", "2026-01-01T00:00:00Z", "2026-01-01T02:00:00Z"),
        ("CRON_TZ=Europe/Amsterdam 0 3 * * *", "2026-07-01T00:00:00Z", "2026-07-01T01:00:00Z"),
        ("TZ=America/New_York */15 9-17 * * 1-5", "2026-01-02T22:50:00Z", "2026-01-05T14:00:00Z"),
        ("0 0 29 2 *", "2026-01-01T00:00:00Z", "2028-02-29T00:00:00Z"),
    ],
)
def test_a_cron_text_is_due_in_its_time_zone(cron: str, after: str, due: str) -> None:
    assert next_time(cron, at(after)) == at(due)


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("* * * *", "minute, hour, day of month, month and day of week"),
        ("TZ=Mars/Olympus * * * * *", "Mars/Olympus is no time zone"),
        ("61 * * * *", "Bad minute"),
        ("0 0 31 2 *", "Bad day-of-month"),
        ("@daily", "minute, hour"),
    ],
)
def test_a_text_that_is_no_cron_is_refused(cron: str, message: str) -> None:
    with pytest.raises(GoogleError, match=message):
        next_time(cron, 0.0)


def test_a_run_is_between_start_and_end() -> None:
    schedule = {"cron": "0 3 * * *", "startTime": "2026-01-05T03:00:00Z"}
    assert next_run(schedule, at("2026-01-01T00:00:00Z")) == "2026-01-05T03:00:00.000000Z"
    assert next_run({**schedule, "endTime": "2026-01-05T03:00:00Z"}, at("2026-01-01T00:00:00Z")) == ""


@pytest.fixture(scope="module")
def running() -> Iterator[RunningSandbox]:
    """A sandbox of its own, because tests put its clock forward."""
    with RunningSandbox("--registry-port", "0") as one:
        yield one
        assert [v for v in one.violations() if v["part"] == "response"] == []


@pytest.fixture
def sandbox(running: RunningSandbox, project: str) -> RunningSandbox:
    mine = running.project(project)
    make_bucket(mine)
    return mine


def schedule(sandbox: RunningSandbox, cron: str = "0 * * * *", spec: Any = None, **more: Any) -> dict[str, Any]:
    job = body(sandbox, spec or templates.linear(), {"times": 1})
    request = {"parent": sandbox.location, "pipelineJob": job}
    return {
        "displayName": "hourly",
        "cron": cron,
        "maxConcurrentRunCount": "1",
        "createPipelineJobRequest": request,
        **more,
    }


def create(sandbox: RunningSandbox, **more: Any) -> str:
    made = sandbox.do("POST", "schedules", schedule(sandbox, **more))
    return f"schedules/{made['name'].rpartition('/')[2]}"


def started(sandbox: RunningSandbox, path: str) -> int:
    return int(sandbox.do("GET", path).get("startedRunCount", 0))


def runs(sandbox: RunningSandbox, path: str) -> list[Any]:
    name = sandbox.do("GET", path)["name"]
    return list(sandbox.do("GET", "pipelineJobs", filter=f"schedule_name={name}").get("pipelineJobs", []))


def test_a_schedule_starts_runs_until_it_has_started_enough(sandbox: RunningSandbox) -> None:
    path = create(sandbox, maxRunCount="2")
    made = sandbox.do("GET", path)
    assert (made["state"], runs(sandbox, path)) == ("ACTIVE", [])
    assert made["nextRunTime"].endswith(":00:00.000000Z")
    sandbox.advance(HOUR)
    assert eventually(lambda: started(sandbox, path) == 1)
    now = sandbox.do("GET", path)
    assert now["lastScheduledRunResponse"]["scheduledRunTime"] == made["nextRunTime"]
    assert now["nextRunTime"] > made["nextRunTime"]
    sandbox.advance(HOUR)
    assert eventually(lambda: sandbox.do("GET", path)["state"] == "COMPLETED")
    assert "nextRunTime" not in sandbox.do("GET", path)
    found = runs(sandbox, path)
    assert [one["scheduleName"] for one in found] == [made["name"]] * 2
    assert eventually(lambda: {one["state"] for one in runs(sandbox, path)} == {"PIPELINE_STATE_SUCCEEDED"})
    status, answer = sandbox.ask("PATCH", path, {"cron": "1 * * * *"}, updateMask="cron")
    assert (status, "is completed" in answer["error"]["message"]) == (400, True)
    sandbox.do("DELETE", path)
    assert sandbox.ask("GET", path)[0] == 404
    assert len(sandbox.do("GET", "pipelineJobs")["pipelineJobs"]) == 2


@pytest.mark.parametrize("queueing", [False, True])
def test_runs_above_the_limit_are_skipped_or_wait(sandbox: RunningSandbox, queueing: bool) -> None:
    slow = templates.linear(seconds="600")
    path = create(sandbox, spec=slow, maxConcurrentActiveRunCount="1", allowQueueing=queueing)
    sandbox.advance(HOUR)
    assert eventually(lambda: started(sandbox, path) == 1)
    due = sandbox.do("GET", path)["nextRunTime"]
    sandbox.advance(HOUR)
    assert eventually(lambda: sandbox.do("GET", path)["nextRunTime"] > due)
    now = sandbox.do("GET", path)
    assert now["lastScheduledRunResponse"]["runResponse"].startswith("Started" if queueing else "Skipped: 1 runs")
    [one] = runs(sandbox, path)
    sandbox.do("POST", f"pipelineJobs/{one['name'].rpartition('/')[2]}:cancel", {})
    if queueing:
        assert eventually(lambda: started(sandbox, path) == 2)
        assert sandbox.do("GET", path)["lastScheduledRunResponse"]["scheduledRunTime"] == due
    sandbox.do("POST", f"{path}:pause", {})
    for one in runs(sandbox, path):
        sandbox.do("POST", f"pipelineJobs/{one['name'].rpartition('/')[2]}:cancel", {})


@pytest.mark.parametrize("catch_up", [False, True])
def test_a_pause_may_be_caught_up(sandbox: RunningSandbox, catch_up: bool) -> None:
    path = create(sandbox)
    assert sandbox.do("POST", f"{path}:pause", {}) == {}
    paused = sandbox.do("GET", path)
    assert (paused["state"], "nextRunTime" in paused) == ("PAUSED", False)
    assert sandbox.ask("POST", f"{path}:pause", {})[0] == 400
    sandbox.advance(3 * HOUR)
    assert sandbox.do("POST", f"{path}:resume", {"catchUp": catch_up}) == {}
    if catch_up:
        assert eventually(lambda: started(sandbox, path) == 3)
    resumed = sandbox.do("GET", path)
    assert resumed.get("catchUp", False) == catch_up
    assert resumed["lastResumeTime"] > paused["lastPauseTime"]
    sandbox.do("DELETE", path)
    assert len(sandbox.do("GET", "pipelineJobs").get("pipelineJobs", [])) == (3 if catch_up else 0)


def test_a_run_whose_request_is_refused_is_named(sandbox: RunningSandbox) -> None:
    path = create(sandbox)
    with storage_client(sandbox, sandbox.location.split("/")[1]) as client:
        client.bucket(bucket(sandbox)).delete()
    sandbox.advance(HOUR)
    assert eventually(lambda: "lastScheduledRunResponse" in sandbox.do("GET", path))
    now = sandbox.do("GET", path)
    assert "create it" in now["lastScheduledRunResponse"]["runResponse"]
    assert "startedRunCount" not in now
    sandbox.do("DELETE", path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"cron": "0 0 1 3 *", "startTime": "2101-01-01T00:00:00Z", "endTime": "2101-02-01T00:00:00Z"},
            "would never start a run",
        ),
        ({"endTime": "2000-01-01T00:00:00Z"}, "end_time .* must be after start_time"),
        ({"cron": "never"}, "Invalid cron"),
        ({"cron": ""}, "cron is not set"),
        ({"maxConcurrentRunCount": "0"}, "max_concurrent_run_count must be at least 1"),
        ({"displayName": ""}, "display_name is not set"),
        ({"createPipelineJobRequest": {}}, "pipeline_job is not set"),
    ],
)
def test_bad_schedules_are_refused(sandbox: RunningSandbox, more: dict[str, Any], message: str) -> None:
    status, answer = sandbox.ask("POST", "schedules", {**schedule(sandbox), **more})
    assert status == 400
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer["error"]["message"])
    assert sandbox.do("GET", "schedules") == {}
