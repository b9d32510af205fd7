"""What is decided about the runs of pipelines, as pure functions: their checks, requests, diffs and results."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from google.cloud import aiplatform_v1
from google.protobuf import json_format
from parameter_template import spec, template
from pulumi.runtime import rpc
from vertex_pipelines import EVERYTHING, JOB, JOBS, ROOT, SCHEDULE, SCHEDULES, URN, VERSION, run, schedule
from vertex_plugin import PARENT, Wire

from pulumi_vertex.access import Access
from pulumi_vertex.engine_call import EngineCall
from pulumi_vertex.errors import PassingError, ProblemError, RefusedError
from pulumi_vertex.ownership import mark_of
from pulumi_vertex.pipelines import PipelineJobType
from pulumi_vertex.pipelines.specification import resolved
from pulumi_vertex.resource import State
from pulumi_vertex.vertex_api import VertexApi
from pulumi_vertex.wire import UNKNOWN, unwrapped

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
        ("a: 1\nb: c: d\n", "it is not YAML, see its line 2"),
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


def test_a_template_that_is_a_secret_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(template())
    found = resolved({"template": rpc.wrap_rpc_secret(str(path))})["template"]
    assert rpc.is_rpc_secret(found)
    assert unwrapped(found) == run()["template"]


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


def test_a_run_is_named_after_its_pipeline_and_the_time() -> None:
    chosen = JOBS.chosen_id(run())["pipelineJobId"]
    name, time, number = chosen.rsplit("-", 2)
    assert (name, len(time), len(number)) == ("count-people", 14, 8)
    assert JOBS.chosen_id(run())["pipelineJobId"] != chosen
    odd = spec() | {"pipelineInfo": {"name": "7. Größe"}}
    assert JOBS.chosen_id(run(template=json.dumps(odd)))["pipelineJobId"].startswith("run-7-gr-e-2")


class Forgetful(VertexApi):
    """Starts a run and loses the answer; its list does not have the run yet."""

    def __init__(self) -> None:
        super().__init__(Access("some-project", "europe-west4"))
        self.ids: list[str] = []

    def listed(self, call: EngineCall, path: str, field_name: str, **query: str) -> list[Wire]:
        return []

    def find(self, call: EngineCall, path: str, *, version: str = "v1") -> Wire:
        return {"name": path, "state": "PIPELINE_STATE_PENDING"}

    def change(self, http: str, path: str, body: Wire | None = None, *, version: str = "v1", **query: str) -> Wire:
        self.ids.append(query["pipelineJobId"])
        raise RefusedError("ALREADY_EXISTS", "it exists") if len(self.ids) > 1 else PassingError("The answer got lost.")


def test_a_run_whose_answer_got_lost_is_known_by_its_name() -> None:
    vertex_ai = Forgetful()
    made = JOBS.create(EngineCall(URN, 30, threading.Event()), vertex_ai, run(wait=False))
    assert made.id == f"{PARENT}/pipelineJobs/{vertex_ai.ids[0]}"
    assert len(set(vertex_ai.ids)) == 1


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
