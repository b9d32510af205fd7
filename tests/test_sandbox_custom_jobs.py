"""Custom jobs in the sandbox, with stubs for their containers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers import eventually
from sandbox_jobs import container, create, entries, finished, job, messages, pool, run, state, stubbed

from sandbox.testing import RunningSandbox


@pytest.fixture
def sandbox(stub_sandbox: RunningSandbox, project: str) -> RunningSandbox:
    return stub_sandbox.project(project)


def stub(**env: str) -> Any:
    return pool(stubbed(**env))


def test_a_job_runs_to_its_end(sandbox: RunningSandbox) -> None:
    made = sandbox.do("POST", "customJobs", job(stub(STUB_LOG="one\ntwo"), labels={"stack": "dev"}))
    assert re.fullmatch(r"projects/\d+/locations/europe-west4/customJobs/\d+", made["name"])
    assert made["state"] == "JOB_STATE_QUEUED"
    assert made["createTime"] == made["updateTime"]
    assert "startTime" not in made
    path = f"customJobs/{made['name'].rpartition('/')[2]}"
    done = finished(sandbox, path)
    assert done["state"] == "JOB_STATE_SUCCEEDED"
    assert done["createTime"] <= done["startTime"] <= done["endTime"] <= done["updateTime"]
    assert (done["displayName"], done["labels"]) == ("train", {"stack": "dev"})
    assert done["jobSpec"]["workerPoolSpecs"][0]["diskSpec"] == {"bootDiskType": "pd-ssd", "bootDiskSizeGb": 100}
    assert messages(sandbox, path)[0] == "Waiting for job to be provisioned."
    assert messages(sandbox, path, 'resource.labels.task_name="workerpool0-0"') == ["one", "two"]
    assert messages(sandbox, path)[-1] == "Job completed successfully."
    sandbox.do("DELETE", path)
    assert sandbox.ask("GET", path)[0] == 404
    assert messages(sandbox, path)[-1] == "Job completed successfully."  # the log stays


def test_a_failed_job_says_which_replica_failed_and_how(sandbox: RunningSandbox) -> None:
    failed = run(sandbox, job(stub(STUB_EXIT="3", STUB_ERRORS="Traceback\nValueError: no rows")))
    assert failed["state"] == "JOB_STATE_FAILED"
    number, job_id = failed["name"].split("/")[1], failed["name"].rpartition("/")[2]
    assert failed["error"]["code"] == 3
    assert failed["error"]["message"] == (
        "The replica workerpool0-0 exited with a non-zero status of 3. Termination reason: Error.\n"
        "Traceback\nValueError: no rows\n\nTo find out more about why your job exited please check the logs: "
        f"https://console.cloud.google.com/logs/viewer?project={number}&resource=ml_job%2Fjob_id%2F{job_id}"
        f"&advancedFilter=resource.type%3D%22ml_job%22%0Aresource.labels.job_id%3D%22{job_id}%22"
    )
    assert messages(sandbox, failed["name"], "severity>=ERROR")[:2] == ["Traceback", "ValueError: no rows"]
    assert "ran out of memory" in run(sandbox, job(stub(STUB_EXIT="137")))["error"]["message"]


def test_a_job_that_ends_by_a_signal_is_tried_again(sandbox: RunningSandbox) -> None:
    for retries, scheduling in ((3, {}), (0, {"disableRetries": True})):
        path = create(sandbox, job(stub(STUB_EXIT="139"), scheduling=scheduling))
        assert finished(sandbox, path)["state"] == "JOB_STATE_FAILED"
        assert messages(sandbox, path).count("Job is running.") == 1
        said = [m for m in messages(sandbox, path) if "exited with a non-zero status of 139" in m]
        assert len(said) == retries + 1


def test_a_job_is_cancelled(sandbox: RunningSandbox) -> None:
    path = create(sandbox, job(stub(STUB_SECONDS="600")))
    assert eventually(lambda: state(sandbox, path) == "RUNNING")
    status, refused = sandbox.ask("DELETE", path)
    assert (status, refused["error"]["status"]) == (400, "FAILED_PRECONDITION")
    assert sandbox.do("POST", f"{path}:cancel", {}) == {}
    ended = finished(sandbox, path)
    assert ended["state"] == "JOB_STATE_CANCELLED"
    assert ended["error"]["code"] == 1
    assert sandbox.do("POST", f"{path}:cancel", {}) == {}  # one that has ended stays as it is
    assert sandbox.do("GET", path) == ended


def test_a_job_that_takes_too_long_is_cancelled(sandbox: RunningSandbox) -> None:
    ended = run(sandbox, job(stub(STUB_SECONDS="600"), scheduling={"timeout": "0.2s", "strategy": "SPOT"}))
    assert ended["state"] == "JOB_STATE_CANCELLED"
    assert "longer than its timeout of 0.2 s" in ended["error"]["message"]


def test_jobs_wait_for_cpus_in_their_order() -> None:
    with RunningSandbox("--registry-port", "0") as sandbox:  # of its own, because jobs of all projects share the CPUs
        big = job(pool(stubbed(STUB_SECONDS="600"), machine="n1-standard-96"))
        first, second, third = (create(sandbox, big) for _ in range(3))
        assert eventually(lambda: state(sandbox, first) == "RUNNING")
        small = create(sandbox, job(pool(container(), machine="e2-highcpu-2")))
        assert {state(sandbox, path) for path in (second, third, small)} == {"QUEUED"}
        sandbox.do("POST", f"{second}:cancel", {})
        assert finished(sandbox, second)["state"] == "JOB_STATE_CANCELLED"
        assert "startTime" not in sandbox.do("GET", second)
        sandbox.do("POST", f"{first}:cancel", {})
        assert eventually(lambda: state(sandbox, third) == "RUNNING")
        assert state(sandbox, small) == "QUEUED"
        sandbox.do("POST", f"{third}:cancel", {})
        assert finished(sandbox, small)["state"] == "JOB_STATE_SUCCEEDED"
        halves = [create(sandbox, job(pool(stubbed(STUB_SECONDS="600"), machine="e2-highcpu-2"))) for _ in range(2)]
        assert eventually(lambda: [state(sandbox, path) for path in halves] == ["RUNNING", "RUNNING"])


def test_a_killed_sandbox_goes_on_with_its_jobs() -> None:
    with RunningSandbox("--registry-port", "0") as sandbox:
        running = create(sandbox, job(pool(stubbed(STUB_SECONDS="1"), machine="n1-standard-96")))
        waiting = create(sandbox, job(pool(container(), machine="n1-standard-96")))
        assert eventually(lambda: state(sandbox, running) == "RUNNING")
        began = sandbox.do("GET", running)["startTime"]
        sandbox.kill()
        sandbox.start()
        assert finished(sandbox, running)["state"] == "JOB_STATE_SUCCEEDED"
        assert sandbox.do("GET", running)["startTime"] == began
        assert finished(sandbox, waiting)["state"] == "JOB_STATE_SUCCEEDED"
        sandbox.stop()
        sandbox.start()
        assert state(sandbox, waiting) == "SUCCEEDED"


def test_jobs_are_listed_by_their_fields_the_newest_first(sandbox: RunningSandbox) -> None:
    bodies = [job(stub(STUB_EXIT=code), name=name, labels={"n": code}) for name, code in (("a-1", "0"), ("a-2", "1"))]
    older, newer = (run(sandbox, body)["name"] for body in bodies)

    def names(**query: Any) -> list[str]:
        return [j["name"] for j in sandbox.do("GET", "customJobs", **query).get("customJobs", [])]

    assert names() == [newer, older]
    assert names(filter='state="JOB_STATE_FAILED"') == [newer]
    assert names(filter='state!="JOB_STATE_FAILED" OR display_name="a-2"') == [newer, older]
    assert names(filter='display_name:"a-*" AND labels.n=0') == [older]
    assert names(filter='NOT display_name="a-1"') == [newer]
    assert names(filter="labels.n:* AND labels.n!=0") == [newer]
    created = sandbox.do("GET", f"customJobs/{newer.rpartition('/')[2]}")["createTime"]
    assert names(filter=f'create_time>="{created}"') == [newer]
    assert names(filter=f'create_time<"{created}"') == [older]
    assert names(filter='create_time>"2021-05-18T00:00:00Z"') == [newer, older]
    first = sandbox.do("GET", "customJobs", pageSize=1)
    assert names(pageSize=1, pageToken=first["nextPageToken"]) == [older]
    assert sandbox.ask("GET", "customJobs", filter='end_time="x"')[0] == 400


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"displayName": ""}, 400, "display_name"),
        ({"labels": {"Big": "x"}}, 400, "Invalid label key"),
        ({"encryptionSpec": {"kmsKeyName": "key"}}, 400, "kms_key_name"),
        ({"jobSpec": {}}, 400, "worker_pool_specs"),
        ({"jobSpec.workerPoolSpecs": [{}]}, 400, "worker_pool_specs"),
        ({"jobSpec.workerPoolSpecs": [stub(), stub(), stub(), stub(), stub()]}, 400, "At most 4"),
        ({"jobSpec.workerPoolSpecs": [pool(container(""))]}, 400, "image_uri"),
        ({"jobSpec.workerPoolSpecs": [pool(container(), count=2)]}, 400, "replica_count must be 1"),
        ({"jobSpec.workerPoolSpecs": [stub(), pool(container(), count=0)]}, 400, "at least 1"),
        ({"jobSpec.workerPoolSpecs": [pool(container(), machine="")]}, 400, "machine_type"),
        ({"jobSpec.workerPoolSpecs": [{"pythonPackageSpec": {"pythonModule": "m"}}]}, 501, "pythonPackageSpec"),
        ({"jobSpec.network": "default"}, 400, "PROJECT_NUMBER"),
        ({"jobSpec.baseOutputDirectory": {"outputUriPrefix": "/tmp"}}, 400, "gs://"),
        ({"jobSpec.enableWebAccess": True}, 501, "enableWebAccess"),
        ({"jobSpec.persistentResourceId": "p"}, 501, "persistentResourceId"),
        ({"jobSpec.tensorboard": "projects/p/locations/l/tensorboards/1"}, 400, "service_account"),
        ({"jobSpec.colour": "red"}, 400, "Unknown name"),
        ({"jobSpec.scheduling": {"strategy": "CHEAP"}}, 400, "TYPE_ENUM"),
    ],
)
def test_what_vertex_ai_refuses_is_refused(sandbox: RunningSandbox, change: Any, status: int, says: str) -> None:
    body = job(stub())
    for path, value in change.items():
        outer, _, inner = path.partition(".")
        if inner:
            body[outer][inner] = value
        else:
            body[outer] = value
    refused = sandbox.ask("POST", "customJobs", body)
    assert refused[0] == status
    assert says in refused[1]["error"]["message"]
    assert sandbox.do("GET", "customJobs") == {}


def test_faults_are_ordered_for_jobs_too(stub_sandbox: RunningSandbox, sandbox: RunningSandbox) -> None:
    for when in ("before", "after"):
        sandbox.fault("customJobs.create", "operation_error", when=when, status="RESOURCE_EXHAUSTED", message="no GPU")
        failed = run(sandbox, job(stub()))
        assert failed["state"] == "JOB_STATE_FAILED"
        assert failed["error"] == {"code": 8, "message": "no GPU"}
    sandbox.fault("customJobs.create", "hold")
    path = create(sandbox, job(stub()))
    assert eventually(lambda: state(sandbox, path) == "RUNNING")
    assert state(sandbox, path) == "RUNNING"
    stub_sandbox.release()
    assert finished(sandbox, path)["state"] == "JOB_STATE_SUCCEEDED"


def test_several_pools_run_together(sandbox: RunningSandbox) -> None:
    workers = pool(stubbed(STUB_LOG="worker"), count=2, machine="e2-highcpu-2")
    path = create(sandbox, job(stub(STUB_LOG="primary"), {}, workers))
    assert finished(sandbox, path)["state"] == "JOB_STATE_SUCCEEDED"
    tasks = [
        e["resource"]["labels"]["task_name"] for e in entries(sandbox, 'jsonPayload.message:("primary" OR worker)')
    ]
    assert sorted(tasks) == ["workerpool0-0", "workerpool2-0", "workerpool2-1"]
    failed = run(sandbox, job(stub(STUB_SECONDS="600"), pool(stubbed(STUB_EXIT="1"))))
    assert "The replica workerpool1-0 exited" in failed["error"]["message"]
