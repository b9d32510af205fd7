"""The sandbox runs pipelines in real containers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import docker
import pipeline_templates as templates
import pytest
from google_clients import storage_client
from helpers import eventually
from sandbox_jobs import messages
from test_sandbox_jobs_docker import containers
from test_sandbox_pipeline_jobs import bucket, finished, make_bucket, start, states, states_of, tasks

from sandbox.runner import LABEL
from sandbox.testing import RunningSandbox

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sandbox(
    docker_engine: docker.DockerClient, tiny_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningSandbox]:
    with RunningSandbox("--registry-port", "0", runner="docker", state=tmp_path_factory.mktemp("state")) as running:
        make_bucket(running)
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []
        running.stop()
        assert containers(docker_engine) == []
        assert not (running.state / "gcs").exists()


def spec(sandbox: RunningSandbox, tiny_image: str) -> Any:
    """Counts the lines of an object that an importer names, and waits for an object before it says them."""
    return templates.real(tiny_image, f"gs://{bucket(sandbox)}/in.txt", f"/gcs/{bucket(sandbox)}")


def test_containers_hand_files_on_and_survive_the_sandbox(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    with storage_client(sandbox, "a-project") as client:
        objects = client.bucket(bucket(sandbox))
        objects.blob("in.txt").upload_from_string("one\ntwo\n")
        path = start(sandbox, spec(sandbox, tiny_image))
        assert eventually(lambda: "waiting" in said(sandbox, path, "report")), sandbox.do("GET", path)
        (before,) = containers(docker_engine)
        sandbox.kill()
        sandbox.start()
        assert [one.id for one in containers(docker_engine)] == [before.id]
        objects.blob("go").upload_from_string("")
        job = finished(sandbox, path)
        assert job["state"] == "PIPELINE_STATE_SUCCEEDED", job
        found = tasks(job)
        data = found["count"]["outputs"]["copy"]["artifacts"][0]["uri"]
        assert (
            objects.blob(data.partition("/")[2].partition("/")[2].partition("/")[2]).download_as_text() == "ONE\nTWO\n"
        )
    assert found["count"]["execution"]["metadata"]["output:lines"] == 2
    assert said(sandbox, path, "report") == ["waiting", "2 lines: ONE TWO"]
    assert {one for name, one in states(job).items() if name.endswith(".greet")} == {"SUCCEEDED"}
    again = finished(sandbox, start(sandbox, spec(sandbox, tiny_image)))
    assert {states(again)[name] for name in ("count", "report")} == {"SKIPPED"}


def said(sandbox: RunningSandbox, path: str, task: str) -> list[str]:
    """The lines that a task's container has written."""
    job = sandbox.do("GET", path)
    detail = tasks(job).get(task, {}) if "jobDetail" in job else {}
    main = detail.get("executorDetail", {}).get("containerDetail", {}).get("mainJob", "")
    return messages(sandbox, main, "jsonPayload.message:*") if main else []


def test_a_container_that_fails_or_vanishes_fails_its_task(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    with storage_client(sandbox, "a-project") as client:
        client.bucket(bucket(sandbox)).blob("in.txt").upload_from_string("")
    job = finished(sandbox, start(sandbox, spec(sandbox, tiny_image), {"text": "again"}))
    assert states(job)["count"] == "FAILED"
    assert "no lines" in tasks(job)["count"]["error"]["message"]
    path = start(sandbox, templates.patient(tiny_image))
    assert eventually(lambda: states_of(sandbox, path).get("patient") == "RUNNING" and containers(docker_engine))
    (one,) = containers(docker_engine)
    assert one.labels[LABEL + "replica"] == "workerpool0-0"
    one.remove(force=True)
    job = finished(sandbox, path)
    assert (job["state"], states(job)["patient"]) == ("PIPELINE_STATE_FAILED", "FAILED")
    path = start(sandbox, templates.patient(tiny_image))
    assert eventually(lambda: states_of(sandbox, path).get("patient") == "RUNNING" and containers(docker_engine))
    sandbox.do("POST", f"{path}:cancel", {})
    assert finished(sandbox, path)["state"] == "PIPELINE_STATE_CANCELLED"
    assert containers(docker_engine) == []
