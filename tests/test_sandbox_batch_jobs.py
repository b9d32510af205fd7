"""Batch prediction jobs in the sandbox: Google's own client, unchanged, and requests (stub containers)."""

from __future__ import annotations

import ast
import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from google.api_core.exceptions import BadRequest, MethodNotImplemented
from google.cloud import aiplatform
from google_clients import anonymous, storage_client
from helpers import eventually
from sandbox_jobs import create, finished, state

from sandbox.batch_instances import InstanceError, Item, of_csv, of_json_lines, wildcard
from sandbox.testing import RunningSandbox

SPEC = {"imageUri": "image@sha256:" + "0" * 64, "predictRoute": "/predict", "healthRoute": "/ping"}
MACHINE: dict[str, Any] = {"machineSpec": {"machineType": "c3-highcpu-4"}}


@pytest.fixture
def sandbox(stub_sandbox: RunningSandbox, project: str) -> Iterator[RunningSandbox]:
    """With a bucket of the project's name that has five instances."""
    with storage_client(stub_sandbox, project) as client:
        bucket = client.create_bucket(project, location="europe-west4")
        lines = [json.dumps({"image": n, "id": f"p{n}"}) for n in range(5)]
        bucket.blob("in/a.jsonl").upload_from_string("\n".join(lines[:3]) + "\n")
        bucket.blob("in/b.jsonl").upload_from_string("\n".join(lines[3:]))
        aiplatform.init(
            project=project,
            location="europe-west4",
            api_endpoint=stub_sandbox.url,
            api_transport="rest",
            credentials=anonymous(),
        )
        yield stub_sandbox.project(project)


def upload(sandbox: RunningSandbox, **env: str) -> str:
    spec = {**SPEC, "env": [{"name": k, "value": v} for k, v in env.items()]}
    body = {"modelId": "people", "model": {"displayName": "people", "containerSpec": spec}}
    if sandbox.ask("GET", "models/people")[0] == 200:
        body = {"parentModel": f"{sandbox.location}/models/people", "model": body["model"]}
    done = sandbox.do("POST", "models:upload", body)["response"]
    return f"{done['model']}@{done['modelVersionId']}"


def job(bucket: str, model: str, uri: str = "in/*.jsonl", kind: str = "jsonl", **more: Any) -> dict[str, Any]:
    return {
        "displayName": "count",
        "model": model,
        "inputConfig": {"instancesFormat": kind, "gcsSource": {"uris": [f"gs://{bucket}/{uri}"]}},
        "outputConfig": {
            "predictionsFormat": "jsonl",
            "gcsDestination": {"outputUriPrefix": f"gs://{bucket}/out/"},
        },
        "dedicatedResources": MACHINE,
        **more,
    }


def output(sandbox: RunningSandbox, done: Any) -> dict[str, list[Any]]:
    """The lines of a job's output files, by the first part of their names."""
    bucket, _, folder = done["outputInfo"]["gcsOutputDirectory"].removeprefix("gs://").partition("/")
    found: dict[str, list[Any]] = {}
    with storage_client(sandbox, bucket) as client:
        for blob in client.list_blobs(bucket, prefix=folder):
            lines = blob.download_as_text().splitlines()
            read = ast.literal_eval if "errors_stats" in blob.name else json.loads
            found.setdefault(blob.name.rpartition("/")[2].partition("-")[0], []).extend(map(read, lines))
    return found


def test_the_life_of_a_job(sandbox: RunningSandbox, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", sandbox.url)  # for the storage client that iter_outputs makes
    monkeypatch.setattr("google.cloud.aiplatform.jobs._JOB_WAIT_TIME", 0.05)
    upload(sandbox, STUB_COUNT="7", STUB_ECHO="1")
    model = aiplatform.Model("people")
    made = model.batch_predict(
        job_display_name="count",
        gcs_source=f"gs://{project}/in/*.jsonl",
        gcs_destination_prefix=f"gs://{project}/out",
        machine_type="c3-highcpu-4",
        starting_replica_count=2,
        max_replica_count=2,
        batch_size=2,
        model_parameters={"confidence": 0.5},
        labels={"stack": "dev"},
    )
    assert made.state == aiplatform.gapic.JobState.JOB_STATE_SUCCEEDED
    assert made.completion_stats
    assert (made.completion_stats.successful_count, made.completion_stats.failed_count) == (5, 0)
    assert not made.partial_failures
    files = [blob.name.rpartition("/")[2] for blob in made.iter_outputs()]
    assert files == [
        "prediction.errors_stats-00000-of-00001",
        "prediction.results-00000-of-00002",
        "prediction.results-00001-of-00002",
    ]
    found = sandbox.do("GET", f"batchPredictionJobs/{made.name}")
    assert found["modelVersionId"] == "1"
    assert found["createTime"] <= found["startTime"] <= found["endTime"]
    assert found["resourcesConsumed"]["replicaHours"] > 0
    lines = output(sandbox, found)
    assert sorted(line["instance"]["image"] for line in lines["prediction.results"]) == [0, 1, 2, 3, 4]
    assert all(line["prediction"]["sent"] == line["instance"] for line in lines["prediction.results"])
    assert all(line["prediction"]["parameters"] == {"confidence": 0.5} for line in lines["prediction.results"])
    listed = aiplatform.BatchPredictionJob.list(filter='display_name="count" AND labels.stack=dev')
    assert [one.resource_name for one in listed] == [made.resource_name]
    made.delete()
    assert aiplatform.BatchPredictionJob.list() == []


def test_a_cancelled_job_has_no_output(sandbox: RunningSandbox, project: str) -> None:
    model = upload(sandbox)
    sandbox.fault("batchPredictionJobs.create", "hold")
    made = aiplatform.BatchPredictionJob.submit(
        job_display_name="count",
        model_name=model,
        gcs_source=[f"gs://{project}/in/a.jsonl"],
        gcs_destination_prefix=f"gs://{project}/out",
        machine_type="c3-highcpu-4",
    )
    assert eventually(lambda: made.state == aiplatform.gapic.JobState.JOB_STATE_RUNNING)
    with pytest.raises(BadRequest, match="cancel it"):
        made.delete()
    made.cancel()
    with pytest.raises(RuntimeError, match="CANCELED"):
        made.wait_for_completion()
    assert output(sandbox, sandbox.do("GET", f"batchPredictionJobs/{made.name}")) == {}


def test_the_files_of_a_list_are_sent_as_base64_and_shown_by_their_names(sandbox: RunningSandbox, project: str) -> None:
    model = upload(sandbox, STUB_ECHO="1")
    with storage_client(sandbox, project) as client:
        bucket = client.bucket(project)
        bucket.blob("pictures/1.jpg").upload_from_string(b"one")
        uris = [f"gs://{project}/pictures/{n}.jpg" for n in (1, 2)]
        bucket.blob("list.txt").upload_from_string("\n".join(uris) + "\n")
    done = finished(sandbox, create(sandbox, job(project, model, "list.txt", "file-list"), "batchPredictionJobs"))
    (line,) = output(sandbox, done)["prediction.results"]
    assert line["instance"] == uris[0]
    assert line["prediction"]["sent"] == {"b64": base64.b64encode(b"one").decode()}
    assert done["completionStats"] == {"successfulCount": "1", "failedCount": "1"}
    assert uris[1] in done["partialFailures"][0]["message"]


def test_a_batch_that_is_refused_fails_as_a_whole(sandbox: RunningSandbox, project: str) -> None:
    model = upload(sandbox, STUB_CROWD='"image": 4')
    body = job(project, model, manualBatchTuningParameters={"batchSize": 3})
    done = finished(sandbox, create(sandbox, body, "batchPredictionJobs"))
    assert done["state"] == "JOB_STATE_SUCCEEDED"
    assert done["completionStats"] == {"successfulCount": "3", "failedCount": "2"}
    lines = output(sandbox, done)
    ((message, number),) = lines["prediction.errors_stats"]
    assert message.startswith(
        "Post request fails. Cannot get predictions. Error: Exceeded retries: Non-OK result 500 (too"
    )
    assert number == 2
    assert [line["instance"]["image"] for line in lines["errors_0001.jsonl"]] == [3, 4]
    failed = upload(sandbox, STUB_STATUS="422", STUB_LOG="no")
    done = finished(sandbox, create(sandbox, job(project, failed), "batchPredictionJobs"))
    assert done["state"] == "JOB_STATE_FAILED"
    assert "Non-OK result 422 (no)" in done["error"]["message"]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "projects/a-project/locations/europe-west4/models/none"}, 404, "none is not found"),
        ({"dedicatedResources": {}}, 400, "machine_type is not set"),
        ({"dedicatedResources": {**MACHINE, "startingReplicaCount": 11}}, 400, "between 1 and max_replica_count"),
        ({"instanceConfig": {"includedFields": ["a"], "excludedFields": ["b"]}}, 400, "Only one of"),
        ({"instanceConfig": {"instanceType": "list"}}, 400, "object or array"),
        ({"inputConfig": {"instancesFormat": "jsonl"}}, 400, "uris is not set"),
        ({"inputConfig": {"instancesFormat": "xml"}}, 400, 'instances_format "xml"'),
        ({"inputConfig": {"instancesFormat": "tf-record"}}, 501, "instances_format tf-record"),
        (
            {"inputConfig": {"instancesFormat": "jsonl", "bigquerySource": {"inputUri": "bq://a"}}},
            501,
            "bigquerySource",
        ),
        ({"generateExplanation": True}, 501, "generateExplanation"),
        ({"unmanagedContainerModel": {"artifactUri": "gs://a/b"}}, 501, "unmanagedContainerModel"),
    ],
)
def test_what_a_job_cannot_have(
    sandbox: RunningSandbox, project: str, change: dict[str, Any], status: int, message: str
) -> None:
    got, answer = sandbox.ask("POST", "batchPredictionJobs", job(project, upload(sandbox)) | change)
    assert (got, message in answer["error"]["message"]) == (status, True), answer


def test_where_a_job_reads_and_writes(sandbox: RunningSandbox, project: str) -> None:
    model = upload(sandbox)
    with storage_client(sandbox, project) as client:
        client.create_bucket(f"{project}-us", location="us-central1")
    for bucket, message in (("no-such-bucket", "does not exist"), (f"{project}-us", "must be in europe-west4")):
        _, answer = sandbox.ask("POST", "batchPredictionJobs", job(bucket, model))
        assert message in answer["error"]["message"]
    failed = finished(sandbox, create(sandbox, job(project, model, "in/none-*.jsonl"), "batchPredictionJobs"))
    assert (failed["state"], failed["error"]["code"]) == ("JOB_STATE_FAILED", 5)
    with pytest.raises(MethodNotImplemented, match="bigqueryDestination"):
        aiplatform.BatchPredictionJob.submit(
            job_display_name="count",
            model_name=model,
            gcs_source=[f"gs://{project}/in/a.jsonl"],
            bigquery_destination_prefix="bq://a-project",
            machine_type="c3-highcpu-4",
        )


def test_a_killed_sandbox_begins_a_job_again() -> None:
    with RunningSandbox("--registry-port", "0", "--suppose", "partial-success") as sandbox:
        with storage_client(sandbox, "a-project") as client:
            bucket = client.create_bucket("a-bucket", location="europe-west4")
            bucket.blob("in.jsonl").upload_from_string('{"a": 1}\nnone\n')
        sandbox.fault("batchPredictionJobs.create", "hold")
        path = create(sandbox, job("a-bucket", upload(sandbox), "in.jsonl"), "batchPredictionJobs")
        assert eventually(lambda: state(sandbox, path) == "RUNNING")
        sandbox.kill()
        sandbox.start()
        assert eventually(lambda: state(sandbox, path) == "RUNNING")
        sandbox.release()
        assert eventually(lambda: state(sandbox, path) == "PARTIALLY_SUCCEEDED")
        done = sandbox.do("GET", path)
        assert "is not JSON" in done["partialFailures"][0]["message"]
        assert [line["instance"] for line in output(sandbox, done)["prediction.results"]] == [{"a": 1}]


def test_instances_are_transformed_as_instance_config_says() -> None:
    def sent(line: str, **config: Any) -> tuple[Any, Any]:
        (item,) = of_json_lines([line], config)
        assert isinstance(item, Item), item
        return item.sent, item.shown

    row = '{"id": 1001, "a": 1, "b": 2}'
    assert sent("[1, 2]") == ([1, 2], {"instance": [1, 2]})
    assert sent(row, keyField="id") == ({"a": 1, "b": 2}, {"key": 1001})
    assert sent(row, includedFields=["b", "a"], instanceType="array")[0] == [2, 1]
    assert sent(row, includedFields=["b"])[1] == {"instance": {"b": 2}}
    assert sent(row, excludedFields=["id"]) == ({"a": 1, "b": 2}, {"instance": {"id": 1001, "a": 1, "b": 2}})
    bad: list[tuple[str, dict[str, Any]]] = [
        ("{", {}),
        ("1", {"keyField": "a"}),
        ("{}", {"keyField": "a"}),
        ("[1]", {"instanceType": "object"}),
        ("{}", {"includedFields": ["a"]}),
        (row, {"instanceType": "array"}),
    ]
    for line, config in bad:
        assert isinstance(next(of_json_lines([line], config)), InstanceError)
    # The example of Google's page.
    rows = ['"input1","input2","input3"\n', '0.1,1.2,"cat1"\n', '4.0,5.0,"cat2"\n']
    assert [item.sent for item in of_csv(rows, {}) if isinstance(item, Item)] == [[0.1, 1.2, "cat1"], [4, 5, "cat2"]]
    assert [item.shown for item in of_csv(rows, {"keyField": "input3"}) if isinstance(item, Item)] == [
        {"key": "cat1"},
        {"key": "cat2"},
    ]
    assert isinstance(next(of_csv([rows[0], "1,2\n"], {})), InstanceError)
    assert isinstance(next(of_csv([rows[0], "cat,1,2\n"], {})), InstanceError)


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("in/*.jsonl", "in/a.jsonl", "in/b/a.jsonl"),
        ("in/**.jsonl", "in/b/a.jsonl", "a.jsonl"),
        ("in/?.jsonl", "in/a.jsonl", "in/ab.jsonl"),
        ("in/[ab].jsonl", "in/b.jsonl", "in/c.jsonl"),
        ("in/a.b", "in/a.b", "in/aab"),
    ],
)
def test_wildcards(pattern: str, matching: str, other: str) -> None:
    assert wildcard(pattern).fullmatch(matching)
    assert not wildcard(pattern).fullmatch(other)
