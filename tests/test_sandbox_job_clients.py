"""Google's own clients of jobs and logs, unchanged, against the sandbox (stub containers)."""

from __future__ import annotations

import json

import pytest
from google.api_core.exceptions import BadRequest
from google.cloud import aiplatform
from google.cloud.aiplatform import hyperparameter_tuning
from google_clients import anonymous, service
from helpers import eventually
from sandbox_jobs import IMAGE, stubbed

from sandbox.testing import RunningSandbox


@pytest.fixture(autouse=True)
def _client(stub_sandbox: RunningSandbox, project: str) -> None:
    aiplatform.init(
        project=project,
        location="europe-west4",
        api_endpoint=stub_sandbox.url,
        api_transport="rest",
        credentials=anonymous(),
        staging_bucket="gs://a-bucket",
    )


def custom_job(name: str = "train", machine: str = "n1-standard-1", **env: str) -> aiplatform.CustomJob:
    machine_spec = {"machine_type": machine}
    container_spec = {"image_uri": IMAGE, "args": ["--epochs=3"], "env": stubbed(**env)["env"]}
    pools = [{"machine_spec": machine_spec, "replica_count": 1, "container_spec": container_spec}]
    return aiplatform.CustomJob(
        display_name=name, worker_pool_specs=pools, base_output_dir="gs://a-bucket/out", labels={"stack": "dev"}
    )


def test_the_life_of_a_custom_job() -> None:
    job = custom_job(STUB_LOG="trained")
    job.run(
        service_account="trainer@a-project.iam.gserviceaccount.com",
        timeout=3600,
        restart_job_on_worker_restart=True,
        scheduling_strategy=aiplatform.gapic.Scheduling.Strategy.SPOT,
    )
    assert job.state == aiplatform.gapic.JobState.JOB_STATE_SUCCEEDED
    assert job.start_time
    assert job.end_time
    assert job.start_time <= job.end_time
    assert not getattr(job.error, "code", 0)
    spec = aiplatform.CustomJob.get(job.resource_name).gca_resource.job_spec
    assert spec.worker_pool_specs[0].container_spec.args == ["--epochs=3"]
    assert spec.base_output_directory.output_uri_prefix == "gs://a-bucket/out"
    assert spec.scheduling.strategy == aiplatform.gapic.Scheduling.Strategy.SPOT
    assert spec.scheduling.timeout.total_seconds() == 3600
    listed = aiplatform.CustomJob.list(filter='labels.stack=dev AND state="JOB_STATE_SUCCEEDED"')
    assert [one.resource_name for one in listed] == [job.resource_name]
    job.delete()
    assert aiplatform.CustomJob.list() == []


def test_a_failed_and_a_cancelled_job_reach_the_client() -> None:
    with pytest.raises(RuntimeError, match="workerpool0-0 exited with a non-zero status of 2"):
        custom_job(STUB_EXIT="2").run()
    job = custom_job(STUB_SECONDS="600")
    job.submit()
    with pytest.raises(BadRequest, match="cancel it"):
        aiplatform.CustomJob.get(job.resource_name).delete()
    job.cancel()
    assert eventually(lambda: job.state == aiplatform.gapic.JobState.JOB_STATE_CANCELLED)
    assert job.error
    assert job.error.code == 1
    with pytest.raises(BadRequest, match="machine_type"):
        custom_job(machine="").submit()


def test_the_life_of_a_tuning_job() -> None:
    tuning = aiplatform.HyperparameterTuningJob(
        display_name="tune",
        custom_job=custom_job(STUB_METRIC="accuracy"),
        metric_spec={"accuracy": "maximize"},
        parameter_spec={
            "lr": hyperparameter_tuning.DoubleParameterSpec(min=0.001, max=0.1, scale="log"),
            "n": hyperparameter_tuning.IntegerParameterSpec(min=5, max=20, scale="linear"),
            "b": hyperparameter_tuning.DiscreteParameterSpec(values=[32, 64, 128], scale="linear"),
            "m": hyperparameter_tuning.CategoricalParameterSpec(values=["cnn", "dnn"]),
        },
        max_trial_count=3,
        parallel_trial_count=2,
        max_failed_trial_count=1,
        search_algorithm="random",
    )
    tuning.run()
    assert tuning.state == aiplatform.gapic.JobState.JOB_STATE_SUCCEEDED
    assert [trial.id for trial in tuning.trials] == ["1", "2", "3"]
    assert tuning.gca_resource.study_spec.algorithm == aiplatform.gapic.StudySpec.Algorithm.RANDOM_SEARCH
    for trial in tuning.trials:
        chosen = {p.parameter_id: p.value for p in trial.parameters}
        assert set(chosen) == {"lr", "n", "b", "m"}
        assert chosen["b"] in (32, 64, 128)
        assert trial.state == aiplatform.gapic.Trial.State.SUCCEEDED
        total = 3 + sum(v for v in chosen.values() if not isinstance(v, str))  # --epochs=3 is an argument too
        assert trial.final_measurement.metrics[0].value == pytest.approx(total)
        assert aiplatform.CustomJob.get(trial.custom_job).state == aiplatform.gapic.JobState.JOB_STATE_SUCCEEDED
    tuning.delete()


def test_googles_discovery_client_reads_the_log(stub_sandbox: RunningSandbox, project: str) -> None:
    lines = ["plain", json.dumps({"severity": "WARNING", "message": "structured", "loss": 0.25, "step": 7}), "{broken"]
    job = custom_job(STUB_LOG="\n".join(lines), STUB_ERRORS="careful")
    job.run()
    job_id = job.resource_name.rpartition("/")[2]
    with service(stub_sandbox, "logging", "v2") as logging:

        def read(text: str = "", **more: object) -> list[dict[str, object]]:
            wanted = f'resource.type="ml_job" AND resource.labels.job_id="{job_id}" {text}'
            body = {"resourceNames": [f"projects/{project}"], "filter": wanted, **more}
            return list(logging.entries().list(body=body).execute().get("entries", []))

        everything = read()
        assert everything[-1]["textPayload"] == "Job completed successfully."
        assert [e["insertId"] for e in read(orderBy="timestamp desc")] == [e["insertId"] for e in everything][::-1]
        mine = read('AND resource.labels.task_name="workerpool0-0"')
        assert [(e["severity"], e["jsonPayload"]) for e in mine] == [
            ("INFO", {"attrs": {"tag": "workerpool0-0"}, "levelname": "INFO", "message": "plain"}),
            ("WARNING", {"message": "structured", "loss": 0.25, "step": 7}),
            ("INFO", {"attrs": {"tag": "workerpool0-0"}, "levelname": "INFO", "message": "{broken"}),
            ("ERROR", {"attrs": {"tag": "workerpool0-0"}, "levelname": "ERROR", "message": "careful"}),
        ]
        assert {e["logName"] for e in mine} == {f"projects/{project}/logs/workerpool0-0"}
        assert len(read("severity>=WARNING")) == 2
        assert len(read("jsonPayload.loss<0.3 jsonPayload.step=7")) == 1
        assert len(read("jsonPayload.loss<0.2")) == 0
        assert [e["jsonPayload"] for e in read('"STRUCTURED"')] == [mine[1]["jsonPayload"]]
        assert len(read('jsonPayload.message=~"^pl..n$"')) == 1
        assert len(read("severity=(WARNING OR ERROR) -jsonPayload.message:careful")) == 1
        last = everything[-1]["timestamp"]
        assert [e["timestamp"] for e in read(f'timestamp>="{last}"')] == [last]
        assert last not in [e["timestamp"] for e in read(f'timestamp<"{last}"')]
        # So gcloud asks for what it has not shown yet.
        second = everything[1]
        shown, number = second["timestamp"], second["insertId"]
        assert read(f'(timestamp>"{shown}" OR (timestamp="{shown}" AND insertId>"{number}"))') == everything[2:]
        assert read('timestamp>"2100-01-01T00:00:00Z"') == []

        request = logging.entries().list(
            body={"resourceNames": [f"projects/{project}"], "filter": 'resource.type="ml_job"', "pageSize": 2}
        )
        seen = []
        while request is not None:
            answer = request.execute()
            seen += answer.get("entries", [])
            request = logging.entries().list_next(request, answer)
        assert seen == everything
