"""Google's own clients of pipeline jobs and schedules, unchanged, against the sandbox (stub containers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipeline_templates as templates
import pytest
import yaml
from google.api_core.exceptions import BadRequest, Conflict, NotFound
from google.cloud import aiplatform
from google.cloud.aiplatform import gapic, pipeline_jobs
from google.cloud.aiplatform.utils import resource_manager_utils
from google.cloud.artifactregistry_v1 import Repository
from google_clients import anonymous, artifact_registry, service, storage_client
from googleapiclient.errors import HttpError
from helpers import eventually
from kfp.registry.registry_client import ApiAuth, RegistryClient

from sandbox.projects import project_number
from sandbox.testing import RunningSandbox

# Google's client warns so.
pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning")
STATE = gapic.PipelineState
TASK = gapic.PipelineTaskDetail.State


@pytest.fixture(autouse=True)
def _client(stub_sandbox: RunningSandbox, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", stub_sandbox.url)
    monkeypatch.setattr(pipeline_jobs, "_JOB_WAIT_TIME", 0.1)  # 5 s between two looks
    # The client asks whose the bucket is, and has no option for the address of Resource Manager.
    monkeypatch.setattr(resource_manager_utils, "get_project_number", lambda project, *_: project_number(project))
    aiplatform.init(
        project=project,
        location="europe-west4",
        api_endpoint=stub_sandbox.url,
        api_transport="rest",
        credentials=anonymous(),
    )


@pytest.fixture
def root(stub_sandbox: RunningSandbox, project: str) -> str:
    """A folder in a bucket of the project."""
    with storage_client(stub_sandbox, project) as client:
        return f"gs://{client.create_bucket(f'bucket-of-{project}').name}/runs"


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "linear.yaml"
    path.write_text(yaml.safe_dump(templates.linear()))
    return str(path)


def job(template: str, root: str, times: int = 1, job_id: str | None = None) -> aiplatform.PipelineJob:
    return aiplatform.PipelineJob(
        display_name="count",
        template_path=template,
        job_id=job_id,
        pipeline_root=root,
        parameter_values={"times": times},
        labels={"stack": "dev"},
        failure_policy="slow",
    )


def test_the_life_of_a_pipeline_job(template: str, root: str, project: str) -> None:
    first = job(template, root, job_id="first-run")
    first.submit(service_account=f"runner@{project}.iam.gserviceaccount.com")
    first.wait()  # type: ignore[no-untyped-call]
    assert first.state == STATE.PIPELINE_STATE_SUCCEEDED
    assert first.resource_name.endswith("/locations/europe-west4/pipelineJobs/first-run")
    details = {one.task_name: one for one in first.task_details}
    assert set(details) == {"first-run", "make", "use"}
    assert details["make"].state == TASK.SUCCEEDED
    assert details["make"].outputs["data"].artifacts[0].uri.startswith(root)
    assert details["make"].execution.metadata["output:count"] == 1
    main = details["use"].executor_detail.container_detail.main_job
    assert aiplatform.CustomJob.get(main).state == gapic.JobState.JOB_STATE_SUCCEEDED
    with pytest.raises(Conflict):
        job(template, root, job_id="first-run").submit()

    again = aiplatform.PipelineJob.get("first-run").clone(job_id="second-run", parameter_values={"times": 2})
    again.run()
    assert {one.task_name: one.state for one in again.task_details if one.task_name != "second-run"} == {
        "make": TASK.SKIPPED,
        "use": TASK.SUCCEEDED,
    }
    listed = aiplatform.PipelineJob.list(
        filter='pipeline_name="linear" AND labels.stack=dev AND state="PIPELINE_STATE_SUCCEEDED"',
        order_by="create_time desc",
        enable_simple_view=True,
    )
    assert [one.name for one in listed] == ["second-run", "first-run"]
    assert listed[0].gca_resource.pipeline_spec["pipelineInfo"]["name"] == "linear"
    assert "deploymentSpec" not in listed[0].gca_resource.pipeline_spec
    assert aiplatform.PipelineJob.list(filter='pipeline_name="another"') == []
    first.delete()
    with pytest.raises(NotFound):
        aiplatform.PipelineJob.get("first-run")


def test_a_failure_and_a_cancellation_reach_the_client(root: str, tmp_path: Path) -> None:
    path = tmp_path / "failing.yaml"
    path.write_text(yaml.safe_dump(templates.linear(fail="3")))
    with pytest.raises(RuntimeError, match=r"The failed tasks are: \[use\]"):
        job(str(path), root, job_id="failing").run()
    path.write_text(yaml.safe_dump(templates.linear(seconds="600")))
    slow = job(str(path), root, job_id="slow")  # the client's own ids are times in seconds
    slow.submit()
    assert eventually(lambda: slow.task_details)
    with pytest.raises(BadRequest, match="cancel it"):
        slow.delete()
    slow.cancel()
    assert eventually(slow.done)
    assert slow.state == STATE.PIPELINE_STATE_CANCELLED
    assert slow.gca_resource.error.code == 1


def test_jobs_are_cancelled_and_deleted_by_the_dozen(root: str, project: str, tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text(yaml.safe_dump(templates.linear(seconds="600")))
    jobs = [job(str(path), root, job_id=f"run-{number}") for number in range(2)]
    for one in jobs:
        one.submit()
    names = [one.name for one in jobs]
    jobs[0].batch_cancel(project, "europe-west4", names).result()
    assert eventually(lambda: all(one.done() for one in jobs))
    deleted = jobs[0].batch_delete(project, "europe-west4", names)
    assert [one.name.rpartition("/")[2] for one in deleted.pipeline_jobs] == names
    assert aiplatform.PipelineJob.list() == []


def test_the_life_of_a_schedule(template: str, root: str) -> None:
    made = job(template, root).create_schedule(
        cron="TZ=Europe/Amsterdam 0 3 1 1 *",
        display_name="yearly",
        max_concurrent_run_count=1,
        max_concurrent_active_run_count=2,
        max_run_count=3,
        allow_queueing=True,
    )
    assert isinstance(made, aiplatform.PipelineJobSchedule)
    state = gapic.Schedule.State
    assert (made.state, made.max_run_count, made.allow_queueing) == (state.ACTIVE, 3, True)
    due = made.gca_resource.next_run_time
    made.pause()
    assert made.state == state.PAUSED
    made.resume(catch_up=False)
    assert made.state == state.ACTIVE
    made.update(display_name="monthly", cron="0 3 1 * *", max_run_count=5)
    found = aiplatform.PipelineJobSchedule.get(made.resource_name)
    assert (found.display_name, found.cron, found.max_run_count) == ("monthly", "0 3 1 * *", 5)
    assert found.gca_resource.next_run_time <= due
    listed = aiplatform.PipelineJobSchedule.list(filter='state="ACTIVE" AND display_name:"month*"')
    assert [one.resource_name for one in listed] == [made.resource_name]
    assert made.list_jobs() == []
    made.delete()
    assert aiplatform.PipelineJobSchedule.list() == []


def test_a_template_is_read_from_artifact_registry(
    stub_sandbox: RunningSandbox, root: str, project: str, template: str
) -> None:
    parent = f"projects/{project}/locations/europe-west4"
    with artifact_registry(stub_sandbox) as registry, service(stub_sandbox, "aiplatform", "v1") as vertex:
        made = registry.create_repository(
            parent=parent, repository_id="pipelines", repository=Repository(format_=Repository.Format.KFP)
        ).result(timeout=60)
        address = registry.get_repository(name=made.name).registry_uri
        client = RegistryClient(host=f"http://{address}", auth=ApiAuth("sandbox"))
        _, version = client.upload_pipeline(template, tags="latest")
        jobs = vertex.projects().locations().pipelineJobs()
        body: dict[str, Any] = {"runtimeConfig": {"gcsOutputDirectory": root, "parameterValues": {"times": 1}}}
        body["templateUri"] = f"https://europe-west4-kfp.pkg.dev/{project}/pipelines/linear/latest"
        made = jobs.create(parent=parent, body=body).execute()
        body["templateUri"] = f"https://europe-west4-kfp.pkg.dev/{project}/pipelines/linear/another"
        with pytest.raises(HttpError, match="No template is at"):
            jobs.create(parent=parent, body=body).execute()
    assert made["templateMetadata"] == {"version": version}
    assert made["pipelineSpec"]["pipelineInfo"]["name"] == "linear"


def test_a_template_is_read_from_a_bucket(stub_sandbox: RunningSandbox, root: str, project: str, template: str) -> None:
    with storage_client(stub_sandbox, project) as client, service(stub_sandbox, "aiplatform", "v1") as vertex:
        bucket = client.bucket(root.split("/")[2])
        bucket.blob("templates/linear.yaml").upload_from_filename(template)
        runtime = {"gcsOutputDirectory": root, "parameterValues": {"times": 1}}
        body = {"templateUri": f"gs://{bucket.name}/templates/linear.yaml", "runtimeConfig": runtime}
        jobs = vertex.projects().locations().pipelineJobs()
        made = jobs.create(parent=f"projects/{project}/locations/europe-west4", body=body).execute()
    assert made["pipelineSpec"]["pipelineInfo"]["name"] == "linear"
