"""`headcount pipelines`, against scripted answers of Vertex AI that fit its discovery document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from pipeline_jobs import JOBS, PARENT, compiled, failed, job, method, ran_by, running, spec, task
from pytest_httpserver import HTTPServer
from typer.testing import CliRunner, Result
from werkzeug import Request, Response

from headcount import jobs, pipelines
from headcount.cli import app
from headcount.google import Place
from sandbox.discovery import read_request, response_violations
from sandbox.testing import RunningSandbox

STARTED = f"{JOBS}/digits-weekly-20260101030000-0a1b"
STORE = f"{PARENT}/metadataStores/default"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["pipelines", *arguments])


@pytest.fixture
def outputs(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of stack dev."""
    found = {
        "endpoint": f"{PARENT}/endpoints/1",
        "url": httpserver.url_for("/v1/e/1"),
        "modelBucket": "gs://p-models",
    }
    monkeypatch.setattr("headcount.stacks.outputs", lambda name: found if name == "dev" else pytest.fail(name))
    monkeypatch.setattr(pipelines, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(pipelines, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    return found


@pytest.fixture
def template(tmp_path: Path) -> str:
    file = tmp_path / "pipeline.yaml"
    file.write_text(compiled())
    return str(file)


class Service:
    """Answers pipelineJobs.create in turn with `answers`, each a status and a body; keeps the requests."""

    def __init__(self, server: HTTPServer) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: list[tuple[int, Any]] = []
        server.expect_request(f"/v1/{JOBS}", method="POST").respond_with_handler(self.create)

    def create(self, request: Request) -> Response:
        body = json.loads(request.data)
        read_request(method("POST", f"v1/{JOBS}"), list(request.args), body)  # raises for what Google has not
        self.asked.append((request.args["pipelineJobId"], body))
        status, answer = self.answers.pop(0) if self.answers else (200, job("PENDING", name=STARTED))
        return Response(json.dumps(answer), status)


@pytest.fixture
def service(httpserver: HTTPServer, outputs: dict[str, Any]) -> Service:
    return Service(httpserver)


def test_a_run_starts_with_the_stack_s_account_and_bucket(
    service: Service, template: str, outputs: dict[str, Any]
) -> None:
    done = run("run", template, "--stack", "dev", "--param", "source=gs://b/data", "--param", "steps=5")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [STARTED, f"headcount pipelines show {STARTED.rpartition('/')[2]} --stack dev"]
    name, body = service.asked[0]
    assert body == {
        "displayName": "digits-weekly",
        "pipelineSpec": spec(),
        "runtimeConfig": {
            "gcsOutputDirectory": "gs://p-models/pipelines",
            "parameterValues": {"source": "gs://b/data", "steps": 5},
        },
    }
    outputs |= {"pipelineRoot": "gs://p-models/runs", "pipelineAccount": "pipelines@p.iam.gserviceaccount.com"}
    done = run("run", template, "--stack", "dev", "--param", "source=a", "--name", "First Try", "--no-cache")
    assert done.exit_code == 0, done.output
    other, body = service.asked[1]
    assert body["runtimeConfig"]["gcsOutputDirectory"] == "gs://p-models/runs"
    assert body["serviceAccount"] == "pipelines@p.iam.gserviceaccount.com"
    assert body["displayName"] == "First Try"
    assert '"enableCache": true' not in json.dumps(body)
    assert pipelines.ID.fullmatch(name)
    assert pipelines.ID.fullmatch(other)
    assert other.startswith("first-try-")


def test_a_run_whose_answer_is_lost_starts_once(service: Service, template: str, httpserver: HTTPServer) -> None:
    """The second request finds that the first one has started it."""
    taken = {"error": {"code": 409, "message": "exists", "status": "ALREADY_EXISTS"}}
    service.answers = [(503, {}), (409, taken)]

    def found(request: Request) -> Response:
        assert request.path.rpartition("/")[2] == service.asked[0][0]
        return Response(json.dumps(job("RUNNING", name=request.path.removeprefix("/v1/"))))

    httpserver.expect_request(pattern(f"/v1/{JOBS}/"), method="GET").respond_with_handler(found)
    done = run("run", template, "--stack", "dev", "--param", "source=a")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == f"{JOBS}/{service.asked[0][0]}"
    assert len({name for name, _ in service.asked}) == 1
    # An id that was taken before is not this run's.
    service.answers = [(409, taken)]
    assert "answers 409: exists" in run("run", template, "--stack", "dev", "--param", "source=a").stderr
    service.answers = [(503, {})] * 3
    lost = run("run", template, "--stack", "dev", "--param", "source=a")
    assert lost.exit_code == 1
    assert f"Whether {service.asked[-1][0]} has started is not known" in lost.stderr
    assert len(service.asked) == 6


def test_a_refused_run_says_why(service: Service, template: str, outputs: dict[str, Any]) -> None:
    service.answers = [(403, {"error": {"code": 403, "message": "Not you.", "status": "PERMISSION_DENIED"}})]
    done = run("run", template, "--stack", "dev", "--param", "source=a")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "answers 403: Not you." in done.stderr
    del outputs["modelBucket"]
    assert "no bucket for the outputs of pipelines" in run("run", template, "-s", "dev", "--param", "source=a").stderr
    assert len(service.asked) == 1


def test_an_interrupt_ends_the_reading_and_not_the_run(
    service: Service, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(there: pipelines.Pipelines, job_id: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.Pipelines, "changes", interrupted)
    done = run("run", template, "--stack", "dev", "--param", "source=a", "-f")
    assert done.exit_code == 130
    assert "goes on: `headcount pipelines show digits-weekly-20260101030000-0a1b -s dev`" in done.stderr


@pytest.mark.parametrize(("end", "status"), [("SUCCEEDED", 0), ("FAILED", 1)])
def test_a_run_is_followed_to_its_end(
    service: Service, template: str, httpserver: HTTPServer, end: str, status: int
) -> None:
    looks = [
        job("PENDING"),
        running(),
        running(),
        job(end, task(2, "exit-handler-1", "FAILED"), task(3, "download", "FAILED", 2)) | {"name": STARTED},
    ]
    httpserver.expect_request(pattern(f"/v1/{JOBS}/")).respond_with_handler(
        lambda _: Response(json.dumps(looks.pop(0) if len(looks) > 1 else looks[0]))
    )
    done = run("run", template, "--stack", "dev", "--param", "source=a", "-f")
    assert [line.partition(" ")[2] for line in done.stdout.splitlines()[2:]] == [
        "exit-handler-1: running",
        "exit-handler-1.download: running",
        "exit-handler-1: failed",
        "exit-handler-1.download: failed",
    ]
    assert (done.exit_code, done.stderr) == (status, f"{STARTED}: {end}\n")


def pattern(start: str) -> Any:
    return re.compile(re.escape(start) + "[^/:]+")


def test_an_experiment_is_made_and_has_the_run(service: Service, template: str, httpserver: HTTPServer) -> None:
    """The requests are those of Google's client: the store, the context, and the run's context as its child."""
    asked = []

    def answer(name: str, status: int = 200) -> Any:
        def handler(request: Request) -> Response:
            http, path = request.method, request.path.removeprefix("/v1/").removeprefix("/")
            body = json.loads(request.data) if request.data else None
            read_request(method(http, f"v1/{path}"), list(request.args), body)
            asked.append((path.rpartition("/")[2], body))
            found = ANSWERS[name]
            assert response_violations(method(http, f"v1/{path}"), status, found) == []
            return Response(json.dumps(found), status)

        return handler

    expect = httpserver.expect_ordered_request
    missing = {"code": 404, "message": "no store", "status": "NOT_FOUND"}
    context = {"name": f"{STORE}/contexts/weekly", "schemaTitle": "system.Experiment"}
    ANSWERS = {  # noqa: N806
        "missing": {"error": missing},
        "operation": {"name": f"{STORE}/operations/1"},
        "done": {"name": f"{STORE}/operations/1", "done": True},
        "context": context,
        "job": job("RUNNING", name=STARTED),
        "with context": job("RUNNING", name=STARTED)
        | {"jobDetail": {"pipelineRunContext": {"name": f"{STORE}/contexts/run"}}},
        "child": {},
    }
    httpserver.clear()
    expect(f"/v1/{STORE}", method="GET").respond_with_handler(answer("missing", 404))
    expect(f"/v1/{PARENT}/metadataStores", method="POST").respond_with_handler(answer("operation"))
    expect(f"/v1/{STORE}/operations/1", method="GET").respond_with_handler(answer("done"))
    expect(f"/v1/{STORE}/contexts", method="POST").respond_with_handler(answer("context"))
    expect(f"/v1/{JOBS}", method="POST").respond_with_handler(service.create)
    expect(f"/v1/{STARTED}", method="GET").respond_with_handler(answer("job"))
    expect(f"/v1/{STARTED}", method="GET").respond_with_handler(answer("with context"))
    expect(f"/v1/{STORE}/contexts/weekly:addContextChildren", method="POST").respond_with_handler(answer("child"))
    done = run("run", template, "--stack", "dev", "--param", "source=a", "--experiment", "weekly")
    assert done.exit_code == 0, done.output
    made = dict(asked)["contexts"] or {}
    assert (made["schemaTitle"], made["schemaVersion"]) == ("system.Experiment", "0.0.1")
    assert dict(asked)["weekly:addContextChildren"] == {"childContexts": [f"{STORE}/contexts/run"]}
    httpserver.check()
    refused = run("run", template, "--stack", "dev", "--param", "source=a", "--experiment", "My Experiment")
    assert refused.exit_code == 2
    assert "is no name of an experiment" in refused.stderr


def test_jobs_and_schedules_are_listed(outputs: dict[str, Any], httpserver: HTTPServer) -> None:
    def listed(number: int, **more: Any) -> dict[str, Any]:
        found = job("SUCCEEDED", name=f"{JOBS}/weekly-{number}", **more)
        return {name: value for name, value in found.items() if name not in ("pipelineSpec", "jobDetail")}

    pages = {
        None: {"pipelineJobs": [listed(2, scheduleName=f"{PARENT}/schedules/7")], "nextPageToken": "more"},
        "more": {"pipelineJobs": [listed(1, displayName="\x1b[2Jx")]},
    }

    def answer(request: Request) -> Response:
        read_request(method("GET", f"v1/{JOBS}"), list(request.args), None)
        assert request.args["orderBy"] == "create_time desc"
        assert "pipelineSpec" not in request.args["readMask"]
        return Response(json.dumps(pages[request.args.get("pageToken")]))

    httpserver.expect_request(f"/v1/{JOBS}").respond_with_handler(answer)
    schedule = {
        "name": f"{PARENT}/schedules/7", "displayName": "nightly", "cron": "TZ=Europe/Amsterdam 0 3 * * *",
        "state": "ACTIVE", "nextRunTime": "2026-01-02T02:00:00Z", "startedRunCount": "3", "maxConcurrentRunCount": "1",
        "createPipelineJobRequest": {"parent": PARENT, "pipelineJob": {"pipelineSpec": spec()}},
    }  # fmt: skip
    notebook = {"name": f"{PARENT}/schedules/8", "createNotebookExecutionJobRequest": {}, "displayName": "other"}
    assert response_violations(method("GET", f"v1/{PARENT}/schedules"), 200, {"schedules": [schedule, notebook]}) == []
    httpserver.expect_request(f"/v1/{PARENT}/schedules").respond_with_json({"schedules": [schedule, notebook]})
    done = run("list", "--stack", "dev")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "ID        STATE      STARTED           TOOK        SCHEDULE  NAME",
        "weekly-2  SUCCEEDED  2026-01-01 03:00  12 min 0 s  nightly   weekly",
        "weekly-1  SUCCEEDED  2026-01-01 03:00  12 min 0 s            \\x1b[2Jx",
        "",
        "SCHEDULE  STATE   CRON                           NEXT RUN          RUNS",
        "nightly   ACTIVE  TZ=Europe/Amsterdam 0 3 * * *  2026-01-02 02:00  3",
    ]
    data = json.loads(run("list", "--stack", "dev", "--json", "--limit", "1").stdout)
    assert [one["id"] for one in data["jobs"]] == ["weekly-2"]
    assert data["schedules"][0]["cron"] == "TZ=Europe/Amsterdam 0 3 * * *"
    assert "createPipelineJobRequest" not in data["schedules"][0]
    # A page of jobs is printed before the next one is asked for.
    first = next(pipelines.Pipelines(pipelines.target(outputs).place).listed())
    assert first.id == "weekly-2"


def serve(httpserver: HTTPServer, found: dict[str, Any]) -> str:
    """One job that can be asked for and is in the list; returns its id."""
    name = str(found["name"])
    httpserver.expect_request(f"/v1/{name}").respond_with_json(found)
    httpserver.expect_request(f"/v1/{JOBS}").respond_with_json({"pipelineJobs": [found]})
    return name.rpartition("/")[2]


@pytest.mark.parametrize("wanted", ["digits-weekly-1", "weekly", f"{JOBS}/digits-weekly-1"])
def test_a_job_is_drawn_by_id_and_by_name(
    outputs: dict[str, Any], httpserver: HTTPServer, tmp_path: Path, wanted: str
) -> None:
    serve(httpserver, failed())
    missing = {"error": {"code": 404, "message": "none", "status": "NOT_FOUND"}}
    httpserver.expect_request(pattern(f"/v1/{JOBS}/")).respond_with_json(missing, 404)
    page = tmp_path / "page.html"
    done = run("show", wanted, "--stack", "dev", "--html", str(page))
    assert done.exit_code == 0, done.output
    assert "condition-3   not triggered" in done.stdout
    assert "condition-3" in page.read_text()
    data = json.loads(run("show", wanted, "--stack", "dev", "--json").stdout)
    assert data["job"]["state"] == "PIPELINE_STATE_FAILED"
    assert data["tasks"][0]["nodes"][0] | {"started": "", "ended": ""} == {
        "name": "download", "kind": "task", "state": "cached", "layer": 0, "started": "", "ended": "",
    }  # fmt: skip
    unknown = run("show", "zzz", "--stack", "dev")
    assert unknown.exit_code == 1
    assert "There is no pipeline job zzz in p, europe-west4: `headcount pipelines list` lists them." in unknown.stderr
    unwritable = run("show", wanted, "--stack", "dev", "--html", str(tmp_path / "no" / "page.html"))
    assert unwritable.exit_code == 2


def entry(number: int, job: int, text: str) -> dict[str, Any]:
    return {
        "insertId": f"i{number}",
        "timestamp": f"2026-01-01T03:00:{number:02}.123456789Z",
        "textPayload": text,
        "resource": {"type": "ml_job", "labels": {"job_id": str(job)}},
    }


@pytest.mark.parametrize(
    ("arguments", "asked", "lines"),
    [
        ([], {"105", "106", "108", "109", "111"}, ["evaluate: ok", "clean-up: gone"]),
        (["train"], {"105", "106", "108"}, []),
        (["for-loop-2"], {"105", "106", "108"}, []),
        (["exit-handler-1.for-loop-2[1].train"], {"108"}, []),
    ],
)
def test_the_log_of_a_task_is_that_of_its_custom_jobs(
    outputs: dict[str, Any], httpserver: HTTPServer, arguments: list[str], asked: set[str], lines: list[str]
) -> None:
    wanted = serve(httpserver, failed())
    seen: list[str] = []

    def answer(request: Request) -> Response:
        seen.append(json.loads(request.data)["filter"])
        entries = [entry(1, 109, "ok"), entry(2, 111, "gone\n")] if not arguments else []
        return Response(json.dumps({"entries": entries}))

    httpserver.expect_request("/logging/v2/entries:list").respond_with_handler(answer)
    done = run("logs", wanted, *arguments, "--stack", "dev")
    assert done.exit_code == 0, done.output
    assert [line.partition(" ")[2].rpartition(".")[2] for line in done.stdout.splitlines()] == lines
    assert set(re.findall(r'job_id="(\d+)"', seen[0])) == asked
    assert seen[0].endswith('timestamp>="2026-01-01T03:00:00.5Z"')
    unknown = run("logs", wanted, "zzz", "--stack", "dev")
    assert unknown.exit_code == 1
    assert "digits-weekly-1 has no task zzz. It has: exit-handler-1.download, " in unknown.stderr


def test_a_log_is_followed_over_tasks_that_start_later(outputs: dict[str, Any], httpserver: HTTPServer) -> None:
    """The first look finds no task at all, the last one comes after the job's end."""
    done_first = task(3, "download", "SUCCEEDED", 2, **ran_by(103))
    states = [
        job("PENDING"),
        job("PENDING"),
        running(),
        job("FAILED", task(2, "exit-handler-1", "FAILED"), done_first, task(4, "evaluate", "FAILED", 2, **ran_by(104))),
    ]
    looks = [[entry(1, 103, "one")], [entry(1, 103, "one"), entry(2, 104, "two")]]
    httpserver.expect_request(f"/v1/{JOBS}/digits-weekly-1").respond_with_handler(
        lambda _: Response(json.dumps(states.pop(0) if len(states) > 1 else states[0]))
    )
    httpserver.expect_request("/logging/v2/entries:list").respond_with_handler(
        lambda _: Response(json.dumps({"entries": looks.pop(0)}))
    )
    done = run("logs", "digits-weekly-1", "-f", "--stack", "dev")
    assert [line.partition(" ")[2] for line in done.stdout.splitlines()] == [
        "exit-handler-1.download: one",
        "exit-handler-1.evaluate: two",
    ]
    assert (done.exit_code, done.stderr) == (1, f"{JOBS}/digits-weekly-1: FAILED\n")
    assert looks == []


def test_a_template_is_uploaded_once_and_runs_from_its_address(
    stub_sandbox: RunningSandbox, outputs: dict[str, Any], httpserver: HTTPServer, template: str, tmp_path: Path
) -> None:
    credentials = AnonymousCredentials()  # type: ignore[no-untyped-call]
    client = storage.Client("a-project", credentials, client_options={"api_endpoint": stub_sandbox.url})
    bucket = client.bucket("a-templates-bucket")
    if not bucket.exists():
        bucket.create(location="europe-west4")
    outputs |= {"modelBucket": "gs://a-templates-bucket", "url": f"{stub_sandbox.url}/v1/e/1"}
    done = run("upload", template, "--stack", "dev")
    assert done.exit_code == 0, done.output
    address = done.stdout.strip()
    assert address.startswith("gs://a-templates-bucket/templates/digits-weekly-")
    (blob,) = client.list_blobs(bucket)
    assert run("upload", template, "--stack", "dev").stdout.strip() == address
    (again,) = client.list_blobs(bucket)
    assert again.generation == blob.generation
    # What is sent comes from there, and its parameters are checked.
    unknown = run("run", address, "--stack", "dev", "--param", "stpes=1")
    assert unknown.exit_code == 2
    assert "Do you mean steps?" in unknown.stderr
    own = run("run", "--stack", "dev")
    assert own.exit_code == 1
    assert "The stack has no pipeline: name a template" in own.stderr
    outputs |= {"pipelineTemplate": address, "pipelineParameters": {"source": "gs://b/data", "steps": 7, "other": 1}}
    posted = run("run", "--stack", "dev", "--param", "steps=8")
    assert posted.exit_code == 1  # the sandbox has no bucket of that project, and was asked
    assert "a-templates-bucket" in posted.stderr
    missing = run("run", address + "x", "--stack", "dev")
    assert missing.exit_code == 1
    assert "answers 404" in missing.stderr
    client.close()
    (tmp_path / "notes.yaml").write_text("a: 1")
    refused = run("upload", str(tmp_path / "notes.yaml"), "--stack", "dev")
    assert refused.exit_code == 2
    assert "is not a compiled pipeline" in refused.stderr


def test_where_pipelines_are_is_said_or_asked_for(outputs: dict[str, Any]) -> None:
    assert "name a stack with --stack" in run("list").stderr
    assert "not both" in run("list", "--stack", "dev", "--project", "p").stderr
    assert "name a stack with --stack, or a project and a region" in run("list", "--project", "p").stderr
    assert "is no address of a template" in run("run", "ftp://a/b", "--stack", "dev").stderr
    there = Place("p", "europe-west4")
    started = pipelines.Run(STARTED, "weekly", "PENDING")
    assert pipelines.console(started, there) == (
        "https://console.cloud.google.com/vertex-ai/locations/europe-west4/pipelines/runs/"
        "digits-weekly-20260101030000-0a1b?project=p"
    )


@pytest.mark.parametrize("name", ["My Pipeline!", "9 lives", "…", "a" * 300])
def test_ids_are_those_that_vertex_ai_takes(name: str) -> None:
    assert pipelines.ID.fullmatch(pipelines.new_id(name))
    assert pipelines.new_id(name) != pipelines.new_id(name)
