"""The sandbox runs batch prediction jobs in real containers, which read the buckets themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator

import docker
import images
import pytest
from google_clients import storage_client
from helpers import eventually
from sandbox_jobs import create, finished, state

from sandbox.testing import RunningSandbox

pytestmark = pytest.mark.slow

BUCKET = "a-bucket-of-pictures"


@pytest.fixture(scope="module")
def sandbox(
    docker_engine: docker.DockerClient, tiny_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningSandbox]:
    """With ten pictures, an instance for each, and a model."""
    with RunningSandbox("--registry-port", "0", runner="docker", state=tmp_path_factory.mktemp("state")) as running:
        with storage_client(running, "a-project") as client:
            bucket = client.create_bucket(BUCKET, location="europe-west4")
            uris = [f"gs://{BUCKET}/{n}.jpg" for n in range(10)]
            for n in range(10):
                bucket.blob(f"{n}.jpg").upload_from_string(f"picture {n}")
            bucket.blob("in.jsonl").upload_from_string("\n".join(json.dumps({"image": {"uri": uri}}) for uri in uris))
        spec = {"imageUri": tiny_image, "predictRoute": "/predict", "healthRoute": "/ping"}
        body = {"modelId": "people", "model": {"displayName": "people", "containerSpec": spec}}
        running.do("POST", "models:upload", body)
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []


def job(sandbox: RunningSandbox, **parameters: object) -> str:
    """Starts a job of two replicas."""
    machines = {"machineSpec": {"machineType": "n1-standard-2"}, "startingReplicaCount": 2, "maxReplicaCount": 2}
    body = {
        "displayName": "count",
        "model": f"{sandbox.location}/models/people@1",
        "inputConfig": {"instancesFormat": "jsonl", "gcsSource": {"uris": [f"gs://{BUCKET}/in.jsonl"]}},
        "outputConfig": {"predictionsFormat": "jsonl", "gcsDestination": {"outputUriPrefix": f"gs://{BUCKET}/out"}},
        "dedicatedResources": machines,
        "manualBatchTuningParameters": {"batchSize": 1},
        "modelParameters": parameters,
    }
    return create(sandbox, body, "batchPredictionJobs")


def containers(docker_engine: docker.DockerClient) -> list[str]:
    """The names of this run's containers."""
    found = docker_engine.containers.list(filters={"label": f"{images.LABEL}={images.RUN}"}, ignore_removed=True)
    return sorted(str(container.name) for container in found)


def test_the_replicas_of_a_job_read_the_bucket_and_are_gone_at_its_end(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient
) -> None:
    path = job(sandbox, sleep=0.2)  # so that one replica cannot do it all
    assert eventually(lambda: state(sandbox, path) == "RUNNING")
    running = containers(docker_engine)
    sandbox.kill()
    sandbox.start()  # which begins the job again, with containers of its own
    done = finished(sandbox, path)
    assert done["state"] == "JOB_STATE_SUCCEEDED", done
    assert done["completionStats"] == {"successfulCount": "10", "failedCount": "0"}
    assert len(running) == min(2, docker_engine.info()["NCPU"])
    assert eventually(lambda: containers(docker_engine) == [])
    folder = done["outputInfo"]["gcsOutputDirectory"].removeprefix(f"gs://{BUCKET}/")
    with storage_client(sandbox, "a-project") as client:
        blobs = list(client.list_blobs(BUCKET, prefix=f"{folder}/prediction.results"))
        lines = [json.loads(line) for blob in blobs for line in blob.download_as_text().splitlines()]
    assert len(blobs) == len(running)
    read = {line["instance"]["image"]["uri"]: line["prediction"]["read"] for line in lines}
    assert read == {f"gs://{BUCKET}/{n}.jpg": f"picture {n}" for n in range(10)}
    assert len({line["prediction"]["host"] for line in lines}) == len(running)
    assert {line["prediction"]["env"]["AIP_MODE"] for line in lines} == {"PREDICTION"}


def test_a_container_that_ends_leaves_a_job_that_fails_with_its_reason(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient
) -> None:
    done = finished(sandbox, job(sandbox, status=404))
    assert done["state"] == "JOB_STATE_FAILED"
    assert 'Non-OK result 404 ({"error": "no such picture"})' in done["error"]["message"]
    assert eventually(lambda: containers(docker_engine) == [])
