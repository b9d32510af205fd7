"""`headcount jobs` and `headcount logs`, against scripted answers of Vertex AI and Cloud Logging."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from sandbox_jobs import create, pool, stubbed
from sandbox_jobs import job as custom_job
from typer.testing import CliRunner, Result
from werkzeug import Request, Response

from headcount import jobs
from headcount.cli import app
from headcount.google import Google, GoogleError, Place
from headcount.jobs import Job, Line, earlier, lines_of, table_text
from headcount.stacks import StackError
from sandbox.testing import RunningSandbox

PARENT = "projects/p/locations/europe-west4"
CUSTOM, TUNING = f"{PARENT}/customJobs", f"{PARENT}/hyperparameterTuningJobs"


def job(number: int, state: str = "SUCCEEDED", kind: str = CUSTOM, name: str = "census") -> dict[str, Any]:
    return {
        "name": f"{kind}/{number}",
        "displayName": name,
        "state": f"JOB_STATE_{state}",
        "createTime": f"2026-01-01T0{number}:00:00.123456Z",
        **({"endTime": f"2026-01-01T0{number}:30:00Z"} if state == "SUCCEEDED" else {}),
    }


@pytest.fixture
def cloud(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> HTTPServer:
    """Three jobs of stack dev, on two pages and of two kinds."""
    found = {"endpoint": f"{PARENT}/endpoints/1", "url": httpserver.url_for("/v1/e/1")}
    monkeypatch.setattr(jobs, "outputs", lambda name: found if name == "dev" else pytest.fail(name))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    first = {"customJobs": [job(1)], "nextPageToken": "more"}
    httpserver.expect_request(f"/v1/{CUSTOM}", query_string="").respond_with_json(first)
    httpserver.expect_request(f"/v1/{CUSTOM}", query_string="pageToken=more").respond_with_json(
        {"customJobs": [job(3, "RUNNING")]}
    )
    tuning = {"hyperparameterTuningJobs": [job(2, "FAILED", TUNING, "digits")]}
    httpserver.expect_request(f"/v1/{TUNING}").respond_with_json(tuning)
    httpserver.expect_request(f"/v1/{PARENT}/batchPredictionJobs").respond_with_json({})
    return httpserver


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_jobs_are_listed_the_newest_first(cloud: HTTPServer) -> None:
    done = run("jobs", "--stack", "dev")
    assert done.exit_code == 0, done.output
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["ID", "KIND", "STATE", "CREATED", "ENDED", "NAME"],
        ["3", "custom", "RUNNING", "2026-01-01T03:00", "census"],
        ["2", "tuning", "FAILED", "2026-01-01T02:00", "digits"],
        ["1", "custom", "SUCCEEDED", "2026-01-01T01:00", "2026-01-01T01:30", "census"],
    ]
    assert len(run("jobs", "--stack", "dev", "--limit", "1").stdout.splitlines()) == 2


def test_a_name_that_moves_the_cursor_does_not() -> None:
    assert "\x1b" not in table_text([Job("a/1", "custom", "\x1b[2J", "RUNNING")])
    assert str(Line("2026-01-01T00:00:00.5Z", "\x1b[2Jx", "7")) == "2026-01-01T00:00:00Z trial 7: \\x1b[2Jx"


@pytest.mark.parametrize("wanted", ["3", "census", f"{CUSTOM}/3"])
def test_a_job_that_runs_is_cancelled_by_id_or_name(cloud: HTTPServer, wanted: str) -> None:
    cloud.expect_request(f"/v1/{CUSTOM}/3", method="GET").respond_with_json(job(3, "RUNNING"))
    cloud.expect_oneshot_request(f"/v1/{CUSTOM}/3:cancel", method="POST", json={}).respond_with_json({})
    done = run("jobs", "cancel", wanted, "--stack", "dev")
    assert (done.exit_code, done.stdout) == (0, f"cancelling {CUSTOM}/3\n"), done.output
    assert [request.path for request, _ in cloud.log if request.method == "POST"] == [f"/v1/{CUSTOM}/3:cancel"]


def test_a_job_that_has_ended_is_not_cancelled(cloud: HTTPServer) -> None:
    done = run("jobs", "--stack", "dev", "cancel", "2")
    assert (done.exit_code, done.stderr) == (1, f"{TUNING}/2 has ended: FAILED.\n")
    unknown = run("jobs", "--stack", "dev", "cancel", "9")
    assert unknown.exit_code == 1
    assert "There is no job 9 in p, europe-west4: `headcount jobs` lists them." in unknown.stderr


def entry(number: int, text: str, **more: Any) -> dict[str, Any]:
    moment = f"2026-01-01T03:00:{number:02}.123456789Z"
    return {"insertId": f"i{number}", "timestamp": moment, "textPayload": text, **more}


def test_a_log_is_printed_page_by_page(cloud: HTTPServer) -> None:
    pages = [
        {"entries": [entry(1, "one\ntwo")], "nextPageToken": "more"},
        {"entries": [entry(2, "", jsonPayload={"message": "three"}, labels={jobs.TRIAL: "7"})]},
    ]
    asked = []

    def answer(request: Request) -> Response:
        asked.append(json.loads(request.data))
        return Response(json.dumps(pages["pageToken" in asked[-1]]))

    cloud.expect_request("/logging/v2/entries:list", method="POST").respond_with_handler(answer)
    done = run("logs", "3", "--stack", "dev")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "2026-01-01T03:00:01Z one",
        "2026-01-01T03:00:01Z two",
        "2026-01-01T03:00:02Z trial 7: three",
    ]
    wanted = 'resource.type="ml_job" AND resource.labels.job_id="3" AND timestamp>="2026-01-01T03:00:00.123456Z"'
    assert (asked[0]["filter"], asked[0]["resourceNames"]) == (wanted, ["projects/p"])


@pytest.mark.parametrize(("state", "status"), [("SUCCEEDED", 0), ("FAILED", 1)])
def test_a_log_is_followed_to_the_job_s_end_without_repeating_a_line(
    cloud: HTTPServer, state: str, status: int
) -> None:
    """The second look meets an entry that came late, the third one comes after the job's end."""
    looks = [[entry(3, "c")], [entry(2, "b"), entry(3, "c")], [entry(3, "c"), entry(4, "d")]]
    states = ["RUNNING", state, state]

    def answer(request: Request) -> Response:
        return Response(json.dumps({"entries": looks.pop(0)}))

    cloud.expect_request("/logging/v2/entries:list", method="POST").respond_with_handler(answer)
    cloud.expect_request(f"/v1/{CUSTOM}/3").respond_with_handler(
        lambda _: Response(json.dumps(job(3, states.pop(0) if len(states) > 1 else states[0])))
    )
    done = run("logs", "3", "-f", "--stack", "dev")
    assert [line[-1] for line in done.stdout.splitlines()] == ["c", "b", "d"]
    assert (done.exit_code, done.stderr) == (status, f"{CUSTOM}/3: {state}\n")
    assert looks == []


def test_what_is_missing_is_said_with_its_repair(cloud: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "name a stack with --stack" in run("jobs").stderr
    assert "not both" in run("logs", "3", "--stack", "dev", "--project", "p").stderr
    cloud.expect_request("/logging/v2/entries:list").respond_with_json({"error": {"message": "Not you."}}, status=403)
    refused = run("logs", "3", "--stack", "dev")
    assert refused.exit_code == 1
    assert "answers 403: Not you." in refused.stderr
    monkeypatch.setattr(jobs, "outputs", lambda _: {})
    assert "Name --project and --region instead" in run("jobs", "-s", "dev").stderr

    def missing(stack: str) -> Any:
        raise StackError(f"Stack {stack} is not deployed.")

    monkeypatch.setattr(jobs, "outputs", missing)
    assert run("jobs", "-s", "dev").stderr == "Stack dev is not deployed.\n"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"error": {"message": "no such job"}}', "no such job"),
        ("<html>Bad Gateway", ""),
        ("[]", ""),
        ('{"error": 1}', ""),
    ],
)
def test_the_message_of_an_error_is_shown_whatever_its_form(httpserver: HTTPServer, body: str, says: str) -> None:
    httpserver.expect_request("/a").respond_with_data(body, 502)
    with (
        contextlib.closing(Google(Place("p", "l", httpserver.url_for("")))) as google,
        pytest.raises(GoogleError) as raised,
    ):
        google.ask("GET", httpserver.url_for("/a"))
    assert str(raised.value) == f"{httpserver.url_for('/a')} answers 502: {says}"


def test_google_is_asked_with_credentials_and_the_sandbox_without(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Place("p", "europe-west4")
    assert here.vertex == "https://europe-west4-aiplatform.googleapis.com"
    assert here.logging == "https://logging.googleapis.com"
    local = Place("p", "europe-west4", "http://127.0.0.1:8790")
    assert (local.vertex, local.logging) == ("http://127.0.0.1:8790", "http://127.0.0.1:8790/logging")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere")
    done = run("jobs", "--project", "p", "--region", "europe-west4")
    assert done.exit_code == 1
    assert "gcloud auth application-default login" in done.stderr


def test_times_and_entries_are_read_as_logging_writes_them() -> None:
    assert earlier("2026-01-01T00:00:10.123456789Z", 30) == "2025-12-31T23:59:40.123456Z"
    assert earlier("2026-01-01T00:00:10Z", 5) == "2026-01-01T00:00:05.000000Z"
    assert earlier("", 30) == ""
    assert lines_of({"timestamp": "t", "jsonPayload": {"step": 1}}) == [Line("t", '{"step": 1}')]
    assert lines_of({"timestamp": "t"}) == []


def test_the_sandbox_s_jobs_are_listed_followed_and_cancelled(
    stub_sandbox: RunningSandbox, project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = stub_sandbox.project(project)
    found = {"endpoint": f"{there.location}/endpoints/1", "url": f"{there.url}/v1/{there.location}/endpoints/1"}
    monkeypatch.setattr(jobs, "outputs", lambda _: found)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.1)
    create(there, custom_job(pool(stubbed(STUB_LOG="step 1\nstep 2", STUB_SECONDS="1")), name="short"))
    followed = run("logs", "short", "-f", "-s", "local")
    assert followed.exit_code == 0, followed.output
    lines = [line.partition(" ")[2] for line in followed.stdout.splitlines()]
    assert [line for line in lines if line.startswith("step")] == ["step 1", "step 2"]
    assert lines[-1] == "Job completed successfully."
    assert [line.partition(" ")[2] for line in run("logs", "short", "-s", "local").stdout.splitlines()] == lines
    create(there, custom_job(pool(stubbed(STUB_SECONDS="600")), name="long"))
    assert run("jobs", "-s", "local", "cancel", "long").exit_code == 0
    assert run("logs", "long", "-f", "-s", "local").exit_code == 1
    rows = [line.split() for line in run("jobs", "-s", "local").stdout.splitlines()[1:]]
    assert [(row[2], row[-1]) for row in rows] == [("CANCELLED", "long"), ("SUCCEEDED", "short")]
