"""`headcount batch gs://…`: plans, and batches against the sandbox with stubs for containers."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google_clients import storage_client
from helpers import eventually
from sandbox_jobs import state
from typer.testing import CliRunner

from headcount import batch_bucket, batch_command, batch_job
from headcount.batch_bucket import Found, fill, row_of, write_instances
from headcount.batch_plan import Plan, in_region, plan, request_size, vcpus
from headcount.cli import app
from headcount.ledger import BatchError, Ledger, Row
from headcount.stacks import StackError
from review.prices import PREDICTION, Price, Prices, load
from sandbox.testing import RunningSandbox

C3 = {"machineType": "c3-highcpu-4"}


@dataclass
class Stack:
    """A stack on the sandbox whose release is a stub."""

    sandbox: RunningSandbox
    project: str
    outputs: dict[str, Any]

    def put(self, *names: str, bucket: str = "", content_type: str = "image/jpeg") -> None:
        with storage_client(self.sandbox, self.project) as client:
            for name in names:
                client.bucket(bucket or self.project).blob(name).upload_from_string(b"x", content_type=content_type)

    def read(self, uri: str) -> str:
        bucket, _, name = uri.removeprefix("gs://").partition("/")
        with storage_client(self.sandbox, self.project) as client:
            return str(client.bucket(bucket).blob(name).download_as_text())

    def release(self, **env: str) -> None:
        """Deploys a release, which gets all traffic."""
        variables = {"HEADCOUNT_BUCKETS": self.project, "STUB_ECHO": "1"} | env
        spec = {"imageUri": "image@sha256:" + "0" * 64, "predictRoute": "/predictions/people", "healthRoute": "/ping"}
        container = {**spec, "env": [{"name": k, "value": v} for k, v in variables.items()]}
        model = {"displayName": "people", "containerSpec": container}
        version = self.sandbox.do("POST", "models:upload", {"modelId": "people", "model": model})["response"]
        resources = {"minReplicaCount": 1, "machineSpec": C3}
        deployed = {"id": "1", "model": version["model"], "dedicatedResources": resources}
        self.sandbox.do("POST", "endpoints", {"displayName": "people"}, endpointId=1)
        body = {"deployedModel": deployed, "trafficSplit": {"0": 100}}
        self.sandbox.do("POST", "endpoints/1:deployModel", body)

    def batch(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["batch", *arguments, "--stack", "dev"])

    def jobs(self) -> list[Any]:
        """The batch prediction jobs, the oldest first."""
        return list(reversed(self.sandbox.do("GET", "batchPredictionJobs").get("batchPredictionJobs", [])))


@pytest.fixture
def stack(stub_sandbox: RunningSandbox, project: str, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """With the buckets PROJECT of pictures and PROJECT-models of results; nothing is deployed."""
    sandbox = stub_sandbox.project(project)
    with storage_client(sandbox, project) as client:
        for name in (project, f"{project}-models"):
            client.create_bucket(name, location="europe-west4")
    url = f"{sandbox.url}/v1/{sandbox.location}/endpoints/1"
    found = {"endpoint": f"{sandbox.location}/endpoints/1", "url": url, "modelBucket": f"gs://{project}-models"}
    monkeypatch.setattr(batch_command, "outputs", lambda _: found)
    monkeypatch.setattr(batch_job, "POLL_SECONDS", 0.02)
    return Stack(sandbox, project, found)


def rows(text: str) -> list[list[str]]:
    header, *found = csv.reader(io.StringIO(text))
    assert header == ["picture", "count", "error"]
    return found


def table_of(stack: Stack, done: Any) -> list[list[str]]:
    return rows(stack.read(re.search(r"in (gs://\S+/table\.csv)", done.stderr)[1]))  # type: ignore[index]


def test_all_pictures_of_a_bucket_are_in_one_table(stack: Stack) -> None:
    stack.release(STUB_COUNT="3", STUB_BAD="bad")
    names = [f"photos/{n}.jpg" for n in range(20)]
    stack.put(*names, "photos/bad.jpg", "photos/no-suffix", "other/1.jpg")
    stack.put("photos/notes.txt", "photos/", content_type="text/plain")
    source = f"gs://{stack.project}/photos/"
    done = stack.batch(source, "--detail", "fast", "--confidence", "0.4", "--machines", "2")
    assert done.exit_code == 1, done.output  # because one was not counted
    expected = [[f"gs://{stack.project}/{name}", "3", ""] for name in [*names, "photos/no-suffix"]]
    expected.append([f"{source}bad.jpg", "", "this is no picture"])
    assert table_of(stack, done) == sorted(expected)
    assert "22 pictures on 2 × c3-highcpu-4: about 0.1 hours, at least 0.03 USD (Compute Engine's price" in done.stderr
    assert "22 pictures, 1 not counted, 63 people, in gs://" in done.stderr
    (job,) = stack.jobs()
    assert job["model"].endswith("/models/people@1")
    assert job["inputConfig"]["instancesFormat"] == "jsonl"
    assert job["modelParameters"] == {"detail": "fast", "confidence": 0.4, "max_people": 0, "inline_errors": True}
    assert job["manualBatchTuningParameters"]["batchSize"] == 64
    assert job["dedicatedResources"]["startingReplicaCount"] == 2
    assert stack.batch(source).exit_code == 1  # a batch that is done is not gone on with
    assert len(stack.jobs()) == 2


def test_only_what_failed_is_counted_again(stack: Stack) -> None:
    stack.release(STUB_CROWD="/3.jpg")
    stack.put(*(f"photos/{n}.jpg" for n in range(10)))
    done = stack.batch(f"gs://{stack.project}/photos/")
    assert done.exit_code == 0, done.output
    assert [row[1:] for row in table_of(stack, done)] == [["4", ""]] * 10
    first, second = stack.jobs()
    assert first["completionStats"] == {"successfulCount": "6", "failedCount": "4"}
    assert second["completionStats"] == {"successfulCount": "4", "failedCount": "0"}
    assert second["manualBatchTuningParameters"]["batchSize"] == 1
    assert "again: 4 pictures" in done.stderr


def test_a_bucket_that_the_container_may_not_read_is_sent_to_it(stack: Stack) -> None:
    stack.release(HEADCOUNT_BUCKETS="another", STUB_BAD="none")
    stack.put("photos/1.jpg")
    done = stack.batch(f"gs://{stack.project}/photos/")
    assert table_of(stack, done) == [[f"gs://{stack.project}/photos/1.jpg", "4", ""]]
    assert stack.jobs()[0]["inputConfig"]["instancesFormat"] == "file-list"


def test_a_batch_is_left_and_taken_up_again(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.release()
    stack.put("photos/1.jpg", "photos/2.jpg")
    source = f"gs://{stack.project}/photos/"
    stack.sandbox.fault("batchPredictionJobs.create", "hold")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("headcount.batch_job.time.sleep", interrupt)
        left = stack.batch(source)
    assert left.exit_code == 130
    name = re.search(r"headcount batch --resume (\S+) --stack dev", left.stderr)[1]  # type: ignore[index]
    assert f"cancel {stack.jobs()[0]['name'].rpartition('/')[2]}" in left.stderr
    wrong = stack.batch("--resume", "batch-none")
    assert (wrong.exit_code, name in wrong.stderr) == (1, True)
    stack.sandbox.release()
    done = stack.batch(source) if os.getpid() % 2 else stack.batch("--resume", name)
    assert done.exit_code == 0, done.output
    assert [row[1:] for row in table_of(stack, done)] == [["4", ""]] * 2
    assert len(stack.jobs()) == 1


def test_a_job_that_costs_more_than_the_limit_is_cancelled(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.release()
    stack.put("photos/1.jpg")
    stack.sandbox.fault("batchPredictionJobs.create", "hold")
    ask = batch_job.Vertex.job
    spent = {"resourcesConsumed": {"replicaHours": 10}}
    monkeypatch.setattr(batch_job.Vertex, "job", lambda self, name: ask(self, name) | spent)
    done = stack.batch(f"gs://{stack.project}/photos/", "--limit-usd", "1.5")
    assert done.exit_code == 1
    assert "at least 1.79 USD so far" in done.stderr
    assert "the limit of 1.5 USD is reached: the job is cancelled" in done.stderr
    assert "ended as CANCELLED" in done.stderr
    assert "go on with: headcount batch --resume batch-" in done.stderr


def test_a_network_that_fails_for_a_while_does_not_end_the_command(stack: Stack) -> None:
    stack.release()
    stack.put("photos/1.jpg")
    stack.sandbox.fault("batchPredictionJobs.get", "status", code=503, count=3)
    done = stack.batch(f"gs://{stack.project}/photos/")
    assert (done.exit_code, done.stderr.count("trying again")) == (0, 3), done.output
    stack.sandbox.fault("batchPredictionJobs.get", "status", code=403)
    refused = stack.batch(f"gs://{stack.project}/photos/")
    assert refused.exit_code == 1
    assert "answers 403" in refused.stderr
    assert "its job goes on. Take it up again: headcount batch --resume" in refused.stderr


def test_a_bucket_that_fails_meanwhile_ends_the_command_with_how_to_go_on(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise StackError("gs://b cannot be used: try later")

    stack.release()
    stack.put("photos/1.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(batch_job, "collect", refused)
        done = stack.batch(f"gs://{stack.project}/photos/")
    assert done.exit_code == 1
    first, second = done.stderr.splitlines()[-2:]
    assert first == "gs://b cannot be used: try later"
    assert "Take it up again: headcount batch --resume batch-" in second


def test_the_limit_pays_for_all_jobs_of_a_batch(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.release(STUB_CROWD="1.jpg")
    stack.put("photos/1.jpg", "photos/2.jpg", *(f"photos/a{n}.jpg" for n in range(4)))
    ask = batch_job.Vertex.job
    spent = {"resourcesConsumed": {"replicaHours": 1}}
    monkeypatch.setattr(batch_job.Vertex, "job", lambda self, name: ask(self, name) | spent)
    done = stack.batch(f"gs://{stack.project}/photos/", "--limit-usd", "0.18")
    assert done.exit_code == 1
    assert "That is more than the limit of 0.00139" in done.stderr  # after an hour of a machine for 0.1786 USD
    assert len(stack.jobs()) == 1


def test_a_cancelled_batch_begins_a_new_job(stack: Stack) -> None:
    stack.release()
    stack.put("photos/1.jpg")
    stack.sandbox.fault("batchPredictionJobs.create", "hold")
    results: list[Any] = []
    command = threading.Thread(target=lambda: results.append(stack.batch(f"gs://{stack.project}/photos/")))
    command.start()
    assert eventually(stack.jobs)
    path = f"batchPredictionJobs/{stack.jobs()[0]['name'].rpartition('/')[2]}"
    assert eventually(lambda: state(stack.sandbox, path) == "RUNNING")
    stack.sandbox.do("POST", f"{path}:cancel", {})
    command.join()
    assert results[0].exit_code == 1
    assert "ended as CANCELLED: CANCELED. Not counted yet: 1 of 1." in results[0].stderr
    done = stack.batch(f"gs://{stack.project}/photos/")
    assert done.exit_code == 0, done.output
    assert [job["displayName"][-2:] for job in stack.jobs()] == ["-0", "-1"]


class KilledError(BaseException):
    """The command is killed. What it leaves is in the buckets and in jobs, so an exception leaves the same."""


@pytest.mark.parametrize(
    "point", ["write_instances", "Batch._start", "Vertex.start", "Batch._follow", "collect", "Buckets.upload"]
)
def test_a_killed_command_starts_no_second_job(stack: Stack, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.release()
    stack.put("photos/1.jpg", "photos/2.jpg")
    source = f"gs://{stack.project}/photos/"

    def killed(*arguments: Any, **more: Any) -> None:
        if point == "Vertex.start":  # the job is started, and not noted
            original(*arguments, **more)
        raise KilledError

    with monkeypatch.context() as patch:
        original = batch_job.Vertex.start
        patch.setattr(f"headcount.batch_job.{point}", killed)
        with pytest.raises(KilledError):
            stack.batch(source)
    done = stack.batch(source)
    assert done.exit_code == 0, done.output
    assert ("going on with batch-" in done.stderr) == (point != "write_instances")
    assert [row[1:] for row in table_of(stack, done)] == [["4", ""]] * 2
    assert len(stack.jobs()) == 1


def test_what_cannot_be_counted_is_said_before_anything_is_started(stack: Stack) -> None:
    source = f"gs://{stack.project}/photos/"

    def said(*arguments: str, code: int = 1) -> str:
        done = stack.batch(*arguments)
        assert done.exit_code == code, done.output
        return str(done.stderr)

    assert "answers 404" in said(source)  # no endpoint
    stack.sandbox.do("POST", "endpoints", {"displayName": "people"}, endpointId=1)
    assert "has no release that serves: `pulumi up -s dev` first" in said(source)
    stack.sandbox.do("DELETE", "endpoints/1")
    stack.release()
    assert "has no pictures" in said(source)
    assert "gs://no-such-bucket does not exist" in said("gs://no-such-bucket/a")
    assert "is no address of a bucket" in said("gs://Bucket/a")
    assert "would be among the pictures" in said(source, "--out", f"{source}out")
    assert "would be among the pictures" in said(f"gs://{stack.project}", "--out", f"{source}out")
    stack.put("photos/1.jpg")
    assert "That is more than the limit of 0.01 USD" in said(source, "--limit-usd", "0.01")
    assert "review/prices.csv has no price" in said(source, "--limit-usd", "1", "--machine-type", "n1-standard-4")
    assert "write gs://BUCKET/FOLDER" in said(source, "--out", "table.csv", code=2)
    assert "leave the address out" in said(source, "--resume", "batch-1", code=2)
    with storage_client(stack.sandbox, stack.project) as client:
        client.create_bucket(f"{stack.project}-us", location="us-central1")
        stack.put("1.jpg", bucket=f"{stack.project}-us")
    assert "is in US-CENTRAL1, and the model in europe-west4" in said(f"gs://{stack.project}-us/")
    stack.sandbox.admin(
        "POST", "faults", {"method": "storage.buckets.get", "kind": "status", "code": 403, "match": stack.project}
    )
    assert f"You have no access to gs://{stack.project}: ask for" in said(source)
    assert "1 pictures on 1 × c3-highcpu-4" in said(source, "--dry-run", code=0)
    assert stack.jobs() == []
    with storage_client(stack.sandbox, stack.project) as client:
        assert list(client.list_blobs(f"{stack.project}-models")) == []


# ------------------------------------------------------------------------------------------------------- decisions


def test_the_machines_follow_from_the_pictures_the_time_and_the_limit() -> None:
    def planned(pictures: int, **more: Any) -> Plan:
        return plan(pictures, "fast", C3, "europe-west4", load(), **more)

    assert (planned(10).machines, planned(1_000_000).machines, planned(1_000_000, hours=0.5).machines) == (1, 8, 17)
    assert planned(1_000_000, machines=20).machines == 20
    few, many = planned(1_000_000, machines=1), planned(1_000_000, machines=20)
    assert few.hours > many.hours
    assert few.usd is not None
    assert many.usd is not None
    assert few.usd < many.usd  # because each machine's start is paid for
    assert planned(1_000_000, hours=0.2, limit=few.usd + 0.05).machines < planned(1_000_000, hours=0.2).machines
    with pytest.raises(BatchError, match=r"more than the limit of 0\.2 USD: raise --limit-usd"):
        planned(1_000_000, limit=0.2)
    with pytest.raises(BatchError, match="on 20 × c3-highcpu-4"):
        planned(1_000_000, machines=20, limit=few.usd)
    known = [Price(PREDICTION, item, "*", "hour", 0.05, "2026-01-01", "") for item in ("C3 vCPU", "C3 GB")]
    assert "0.8 hours, 1.40 USD (Vertex AI's price, of 2026-01-01)" in str(
        plan(300_000, "fast", C3, "europe-west4", Prices(known))
    )
    assert (vcpus("c3-highcpu-22"), vcpus("a2-highgpu-1g"), vcpus("odd")) == (22, 1, 1)
    assert (request_size("fast"), request_size("auto"), request_size("full")) == (64, 4, 1)
    assert (request_size("fast", 500_000), request_size("fast", 50_000_000)) == (24, 1)


@pytest.mark.parametrize(
    ("bucket", "region", "inside"),
    [
        ({"location": "EUROPE-WEST4"}, "europe-west4", True),
        ({"location": "EUROPE-WEST4"}, "europe-west1", False),
        ({"location": "EU"}, "europe-west4", True),
        ({"location": "EU"}, "europe-west2", False),
        ({"location": "US"}, "us-central1", True),
        ({"location": "NAM4"}, "us-east1", True),
        ({"location": "US", "customPlacementConfig": {"dataLocations": ["US-EAST4"]}}, "us-east4", True),
        ({"location": "ASIA"}, "europe-west4", False),
        ({}, "europe-west4", False),
    ],
)
def test_a_bucket_is_in_a_region_or_around_it(bucket: dict[str, Any], region: str, inside: bool) -> None:
    assert in_region(bucket, region) is inside


def test_what_a_line_of_results_says() -> None:
    def said(prediction: Any, instance: Any = "gs://a/b") -> Row | None:
        return row_of(json.dumps({"instance": instance, "prediction": prediction}))

    assert said({"count": 3}) == Row("gs://a/b", 3)
    assert said({"count": 3}, {"image": {"uri": "gs://a/c"}}) == Row("gs://a/c", 3)
    assert said({"error": {"code": 400, "message": "instances[3]: no picture"}}) == Row("gs://a/b", error="no picture")
    assert said({"error": {"code": 503, "message": "arrived damaged"}}) is None
    assert said({"score": [1]}) == Row(
        "gs://a/b", error="the answer has no count: does the stack's release count people?"
    )


@pytest.mark.parametrize(("listed", "ending"), [(True, "txt"), (False, "jsonl")])
def test_instances_are_written_in_files_of_so_many_lines(
    monkeypatch: pytest.MonkeyPatch, listed: bool, ending: str
) -> None:
    monkeypatch.setattr(batch_bucket, "SHARD", 2)
    uris = [f"gs://a/{i}.jpg" for i in range(5)]
    written: dict[str, str] = {}
    files, number = write_instances(written.__setitem__, uris, "gs://b/job", listed)
    assert (files, number) == ([f"gs://b/job-0000{i}.{ending}" for i in range(3)], 5)
    lines = [line for file in files for line in written[file].splitlines()]
    assert [batch_bucket.picture_of(line if listed else json.loads(line)) for line in lines] == uris
    assert [written[file].count("\n") for file in files] == [2, 2, 1]


def test_a_million_names_are_never_in_memory(tmp_path: Path) -> None:
    """Lists and writes the instances of many pictures; see docs/batch.md for the figure of a million."""
    number = int(os.environ.get("BATCH_NAMES", 20_000))
    ledger = Ledger(tmp_path / "ledger", {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = (Found(f"gs://a-bucket/camera-{i % 97}/2026/{i:09}.jpg", 200_000) for i in range(number))
    assert fill(ledger, found) == (number, number * 200_000)
    sizes: list[int] = []
    files, written = write_instances(lambda _, text: sizes.append(len(text)), ledger.left(), "gs://a/0", False)
    assert written == number
    assert len(files) == len(sizes) == -(-number // 50_000)
    print(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} MB more at the most")
    assert ledger.totals().left == number
    ledger.close()
