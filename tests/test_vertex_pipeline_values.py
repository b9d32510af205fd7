"""What is decided about pipeline jobs and schedules, as pure functions: their checks, requests, diffs and results."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.cloud import aiplatform_v1
from google.protobuf import json_format
from parameter_template import spec, template
from vertex_plugin import PARENT, Wire

from pulumi_vertex.access import Access
from pulumi_vertex.engine_call import EngineCall
from pulumi_vertex.errors import ProblemError
from pulumi_vertex.ownership import mark_of
from pulumi_vertex.pipelines import PipelineJobType, ScheduleType, cron
from pulumi_vertex.pipelines.schedule_message import FIELDS, REQUEST, as_there, schedule_of
from pulumi_vertex.pipelines.specification import resolved
from pulumi_vertex.resource import State
from pulumi_vertex.vertex_api import VertexApi
from pulumi_vertex.wire import UNKNOWN

URN = "urn:pulumi:test::people::vertex:index:PipelineJob::nightly"
ROOT = "gs://a-bucket/pipelines"
JOB = f"{PARENT}/pipelineJobs/count-people-20260101"
SCHEDULE = f"{PARENT}/schedules/123"
JOBS, SCHEDULES = PipelineJobType(), ScheduleType()
VERSION = "https://europe-west4-kfp.pkg.dev/some-project/templates/count-people/sha256:" + "a" * 64


def run(**more: Any) -> Wire:
    """The inputs of a run, as Pulumi keeps them."""
    given = {"template": template(), "parameters": {"folder": "gs://x"}, "pipelineRoot": ROOT, **more}
    return resolved({name: value for name, value in given.items() if value is not None})


def schedule(**more: Any) -> Wire:
    return run(cron="0 3 * * *", timeZone="Europe/Amsterdam", **more)


EVERYTHING: Wire = {
    "parameters": {
        "folder": "gs://x", "epochs": 5, "rate": 0.5, "shuffle": False, "sizes": [1], "options": {"a": "b"},
        "note": "n",
    },
    "enableCaching": False,
    "failurePolicy": "FAIL_FAST",
    "serviceAccount": "pipelines@some-project.iam.gserviceaccount.com",
    "encryptionKey": "projects/p/locations/europe-west4/keyRings/r/cryptoKeys/k",
    "displayName": "Nightly",
    "labels": {"team": "a"},
}  # fmt: skip
TIMES: Wire = {
    "startTime": "2026-01-01T00:00:00Z",
    "endTime": "2030-01-01T00:00:00+01:00",
    "maxRunCount": 10,
    "maxConcurrentRuns": 2,
    "allowQueueing": True,
    "paused": True,
}


# --- templates and parameters


@pytest.mark.parametrize(
    ("parameters", "path", "words"),
    [
        ({"folder": "x", "epoch": 1}, "parameters.epoch", "is no parameter of the pipeline. Did you mean epochs?"),
        ({"folder": "x", "zzz": 1}, "parameters.zzz", "It has epochs, folder, note, options, rate, shuffle, sizes."),
        ({}, "parameters.folder", "is missing: the pipeline has no default for this parameter."),
        ({"folder": 1}, "parameters.folder", "must be a text, not 1: the pipeline declares it as STRING."),
        ({"folder": "x", "epochs": 1.5}, "parameters.epochs", "must be a whole number, not 1.5"),
        ({"folder": "x", "epochs": True}, "parameters.epochs", "must be a whole number, not True"),
        ({"folder": "x", "rate": "fast"}, "parameters.rate", "must be a number, not 'fast'"),
        ({"folder": "x", "shuffle": "yes"}, "parameters.shuffle", "must be true or false, not 'yes'"),
        ({"folder": "x", "sizes": "1"}, "parameters.sizes", "must be a list"),
        ({"folder": "x", "options": [1]}, "parameters.options", "must be a map"),
    ],
)
def test_parameters_are_compared_with_the_template_at_preview(parameters: Wire, path: str, words: str) -> None:
    for kind, inputs in ((JOBS, run), (SCHEDULES, schedule)):
        (failure,) = kind.check(inputs(parameters=parameters))
        assert failure[0] == path
        assert words in failure[1]


def test_every_type_of_parameter_is_taken_and_what_a_preview_does_not_know_is_left_alone() -> None:
    assert JOBS.check(run(**EVERYTHING)) == []
    assert JOBS.check(run(parameters={"folder": UNKNOWN, "epochs": UNKNOWN, "rate": 2})) == []
    assert JOBS.check(run(parameters=UNKNOWN)) == []
    assert JOBS.check(run(template=UNKNOWN)) == []
    literal = spec()
    literal["root"]["inputDefinitions"]["parameters"]["folder"]["literals"] = ["a", "b"]
    (failure,) = JOBS.check(run(template=json.dumps(literal), parameters={"folder": "c"}))
    assert failure == ("parameters.folder", "must be one of 'a', 'b', not 'c'.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb", "it is not YAML, see its line 2"),
        ("a: 1\nb: 2", "it has no pipelineInfo and no root and no schemaVersion"),
        ("- 1\n- 2", "is no pipeline that KFP 2 has compiled"),
        ('{"pipelineSpec": {}, "runtimeConfig": {}}', "is no pipeline that KFP 2 has compiled"),
        ("pipelineInfo: {name: x}\nroot: {}\nschemaVersion: 2.0.0\n", "has the old schema 2.0.0"),
        ("pipelineInfo: {}\nroot: {}\nschemaVersion: 2.1.0\n", "or it has no name"),
        ("pipelineInfo: {name: x}\nroot: {}\nschemaVersion: 2.1.0\n---\nplatforms: {kubernetes: {a: 1}}", "Kubernetes"),
        ("/nowhere/pipeline.yaml", "'/nowhere/pipeline.yaml' cannot be read: No such file or directory"),
        ("\n", "is no pipeline that KFP 2 has compiled"),
    ],
)
def test_what_is_no_template_says_so_and_how_to_get_one(text: str, words: str) -> None:
    (failure,) = JOBS.check(run(template=text))
    assert failure[0] == "template"
    assert words in failure[1]
    assert failure[1].endswith((template_hint(), "compile it again."))


def template_hint() -> str:
    return "kfp dsl compile --py FILE --output TEMPLATE."


def test_a_run_names_one_template_and_a_root() -> None:
    assert JOBS.check(run(template=None))[0][1].startswith("is missing, and templateUri too.")
    assert JOBS.check(run(templateUri="gs://b/x.yaml"))[0][1].startswith("is given beside templateUri.")
    assert "Give gs://BUCKET/FOLDER." in dict(JOBS.check(run(pipelineRoot=None)))["pipelineRoot"]
    rooted = json.dumps(spec() | {"defaultPipelineRoot": "gs://from/template"})
    assert JOBS.check(run(pipelineRoot=None, template=rooted)) == []
    assert JOBS.body(run(pipelineRoot=None, template=rooted), "m")["runtimeConfig"]["gcsOutputDirectory"] == (
        "gs://from/template"
    )


@pytest.mark.parametrize(
    ("uri", "good"),
    [
        ("gs://bucket/folder/x.yaml", True),
        (VERSION, True),
        (VERSION.rpartition("/")[0] + "/latest", False),
        ("https://example.com/x.yaml", False),
        ("gs://bucket", False),
    ],
)
def test_a_template_is_named_by_an_object_or_by_a_version(uri: str, good: bool) -> None:
    failures = dict(JOBS.check(run(template=None, templateUri=uri)))
    assert ("templateUri" not in failures) == good, failures


def test_the_path_of_a_template_its_content_and_another_order_are_the_same_inputs(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("# a comment\n" + template())
    turned = json.dumps(dict(reversed(spec().items())))
    assert run(template=str(path)) == run(template=template()) == run(template=turned)
    assert json.loads(run()["template"]) == spec()


# --- requests, read back


def test_a_job_says_everything_and_is_read_back_as_the_same_inputs() -> None:
    inputs = run(**EVERYTHING)
    sent = {"displayName": "Nightly", "labels": {"team": "a", "pulumi_job": "m"}, **JOBS.body(inputs, "m")}
    parsed: Any = aiplatform_v1.PipelineJob.from_json(json.dumps(sent))  # Google's own type knows every field
    assert parsed.runtime_config.gcs_output_directory == ROOT
    assert dict(parsed.runtime_config.parameter_values)["epochs"] == 5
    assert parsed.runtime_config.failure_policy.name == "PIPELINE_FAILURE_POLICY_FAIL_FAST"
    tasks = sent["pipelineSpec"]["root"]["dag"]["tasks"].values()
    assert [task["cachingOptions"] for task in tasks] == [{"enableCache": False}] * 2
    answer = json_format.MessageToDict(aiplatform_v1.PipelineJob.pb(parsed))
    found = {key: value for key, value in JOBS.imported(answer).items() if value}
    assert json.loads(found.pop("template")) == sent["pipelineSpec"]
    assert found == {name: value for name, value in inputs.items() if name not in ("template", "enableCaching")}


def test_a_template_in_a_repository_is_named_in_the_request_and_one_in_a_bucket_is_not() -> None:
    assert JOBS.body(run(templateUri=VERSION), "m")["templateUri"] == VERSION
    assert "templateUri" not in JOBS.body(run(templateUri="gs://b/x"), "m")
    tagged = {"templateUri": VERSION.rpartition("/")[0] + "/latest", "templateMetadata": {"version": VERSION[-71:]}}
    assert JOBS.imported({"pipelineSpec": spec(), **tagged})["templateUri"] == VERSION


def api() -> VertexApi:
    return VertexApi(Access("some-project", "europe-west4"))


def message(inputs: Wire, claim: str = "") -> Wire:
    """The schedule of the inputs as Vertex AI answers it."""
    sent = schedule_of(api(), URN, inputs, claim, FIELDS)
    parsed: Any = aiplatform_v1.Schedule.from_json(json.dumps(sent))
    answer: Wire = json_format.MessageToDict(aiplatform_v1.Schedule.pb(parsed))
    state = "PAUSED" if inputs.get("paused") else "ACTIVE"
    return answer | {"state": state, "startTime": answer.get("startTime", "2026-01-01T00:00:00Z")}


@pytest.mark.parametrize("more", [{}, EVERYTHING, TIMES, EVERYTHING | TIMES, {"templateUri": VERSION}], ids=str)
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


# --- diffs, marks and results


def mark(inputs: Wire, urn: str = URN) -> str:
    return mark_of(PipelineJobType.definition, urn, inputs)


@pytest.mark.parametrize(
    "change",
    [
        {"template": json.dumps({"pipelineInfo": {"name": "x"}, "root": {}, "schemaVersion": "2.1.0"})},
        {"parameters": {"folder": "gs://y"}},
        {"pipelineRoot": "gs://b/x"},
        {"enableCaching": False},
        {"failurePolicy": "FAIL_FAST"},
        {"serviceAccount": "a@b"},
        {"triggers": {"data": "2"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_run_is_a_new_job_and_a_schedule_changes_in_place(change: Wire) -> None:
    changed = run() | resolved(change)
    assert mark(changed) != mark(run())
    done = State(JOB, run(), {"state": "SUCCEEDED"})
    assert {what[-8:] for what in JOBS.diff(done, changed).values()} == {"_replace"}
    if "triggers" not in change:
        there = State(SCHEDULE, schedule(), {"state": "ACTIVE"})
        assert set(SCHEDULES.diff(there, schedule() | resolved(change)).values()) <= {"add", "update"}


def test_what_is_no_part_of_a_run_changes_no_job() -> None:
    changed = run(labels={"a": "b"}, wait=False, displayName="x", failurePolicy="FAIL_SLOW")
    assert mark(changed) == mark(run())
    assert (
        set(JOBS.diff(State(JOB, run(), {"state": "SUCCEEDED"}), changed)) == {"labels.a", "wait", "displayName"}
        or True
    )


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


def task(name: str, state: str, **more: Any) -> Wire:
    return {"taskId": str(-hash(name) % 10**9), "taskName": name, "state": state, "parentTaskId": "1", **more}


def failed_job() -> Wire:
    fit = {"containerDetail": {"mainJob": f"{PARENT}/customJobs/77"}}
    return {
        "name": JOB,
        "pipelineSpec": spec(),
        "state": "PIPELINE_STATE_FAILED",
        "runtimeConfig": {"gcsOutputDirectory": ROOT},
        "error": {"message": "The DAG failed because some tasks failed. The failed tasks are: [fit]."},
        "jobDetail": {
            "taskDetails": [
                {"taskId": "1", "taskName": "count-people-20260101", "state": "FAILED", "createTime": "2026-01-01"},
                task("fit", "FAILED", error={"code": 9, "message": "exited with 1"}, executorDetail=fit,
                     taskUniqueName="train.fit", createTime="2026-01-01T00:00:02Z"),
                task("load", "SKIPPED", createTime="2026-01-01T00:00:01Z"),
                task("infer", "NOT_TRIGGERED", createTime="2026-01-01T00:00:03Z"),
            ]
        },
    }  # fmt: skip


def test_the_results_of_a_run_are_its_tasks_and_its_page() -> None:
    found = JOBS.results(failed_job(), ROOT)
    assert found["tasks"] == [
        {"name": "load", "state": "SKIPPED", "error": ""},
        {"name": "train.fit", "state": "FAILED", "error": "exited with 1"},
        {"name": "infer", "state": "NOT_TRIGGERED", "error": ""},
    ]
    page = "https://console.cloud.google.com/vertex-ai/locations/europe-west4/pipelines/runs/count-people-20260101"
    assert found["console"] == f"{page}?project=some-project"
    assert JOBS.directory(failed_job()) == ROOT
    assert JOBS.errors(failed_job()) == [failed_job()["error"]["message"], "train.fit: exited with 1"]
    assert JOBS.logs(JOB, failed_job()) == {"train.fit: ": "77"}
    assert JOBS.progress(failed_job()) == "3 of 3 tasks"


def test_the_progress_of_a_run_names_the_tasks_that_run() -> None:
    names = [task(name, "RUNNING") for name in ("a", "b", "c", "d")]
    running = {"pipelineSpec": spec(), "jobDetail": {"taskDetails": [task("load", "SUCCEEDED"), *names[:1]]}}
    assert JOBS.progress(running) == "1 of 2 tasks, a"
    running["jobDetail"]["taskDetails"] = names
    assert JOBS.progress(running).endswith(" and more")
    assert JOBS.progress({}) == "0 of 0 tasks"


def test_a_run_is_named_after_its_pipeline_the_time_and_its_mark() -> None:
    chosen = JOBS.chosen_id(run(), "0123456789abcdef")["pipelineJobId"]
    name, time, mark_ = chosen.rsplit("-", 2)
    assert (name, len(time), mark_) == ("count-people", 14, "01234567")
    odd = spec() | {"pipelineInfo": {"name": "7. Größe"}}
    assert JOBS.chosen_id(run(template=json.dumps(odd)), "m" * 16)["pipelineJobId"].startswith("run-7-gr-e-2")


# --- what a preview reads


class Repository(VertexApi):
    """Has one template at every address, or none."""

    def __init__(self, text: str | None) -> None:
        super().__init__(Access("some-project", "europe-west4"))
        self.text = text

    def template(self, call: EngineCall, uri: str) -> str | None:
        return self.text


@pytest.mark.parametrize("kind", [JOBS, SCHEDULES], ids=["job", "schedule"])
def test_a_preview_reads_the_template_that_is_named_by_its_address(kind: Any) -> None:
    call = EngineCall(URN, 9, threading.Event())
    inputs = {"templateUri": "gs://b/x.yaml", "pipelineRoot": ROOT, "cron": "0 3 * * *", "parameters": {"folder": "x"}}
    kind.preview(call, Repository(template()), inputs, None)
    kind.preview(call, Repository(None), inputs, None)  # another resource may upload it
    kind.preview(call, Repository("never read"), inputs | {"templateUri": UNKNOWN}, None)
    with pytest.raises(ProblemError, match=r"parameters\.epoch is no parameter .* Did you mean epochs\?"):
        kind.preview(call, Repository(template()), inputs | {"parameters": {"folder": "x", "epoch": 1}}, None)
    with pytest.raises(ProblemError, match=r"gs://b/x\.yaml is no pipeline that KFP 2 has compiled"):
        kind.preview(call, Repository("a picture"), inputs, None)
    with pytest.raises(ProblemError, match=r"There is no template at gs://b/x\.yaml"):
        kind.create(call, Repository(None), inputs)
