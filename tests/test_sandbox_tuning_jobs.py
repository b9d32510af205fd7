"""Hyperparameter tuning jobs in the sandbox, with stubs for the containers of their trials."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import eventually
from sandbox_jobs import create, entries, finished, messages, pool, state, stubbed

from sandbox.testing import RunningSandbox

JOBS = "hyperparameterTuningJobs"
PARAMETERS = [
    {"parameterId": "x", "doubleValueSpec": {"minValue": 1, "maxValue": 2}},
    {"parameterId": "n", "integerValueSpec": {"minValue": "5", "maxValue": "20"}},
]


@pytest.fixture
def sandbox(stub_sandbox: RunningSandbox, project: str) -> RunningSandbox:
    return stub_sandbox.project(project)


def tuning(count: int = 4, parallel: int = 2, failures: int = 0, study: Any = None, **env: str) -> Any:
    metrics = [{"metricId": "accuracy", "goal": "MAXIMIZE"}]
    return {
        "displayName": "tune",
        "studySpec": {"metrics": metrics, "parameters": PARAMETERS, **(study or {})},
        "maxTrialCount": count,
        "parallelTrialCount": parallel,
        "maxFailedTrialCount": failures,
        "trialJobSpec": {
            "workerPoolSpecs": [pool(stubbed(**{"STUB_METRIC": "accuracy", **env}), machine="n1-standard-1")],
            "baseOutputDirectory": {"outputUriPrefix": "gs://bucket/tune"},
        },
    }


def test_a_tuning_job_runs_its_trials(sandbox: RunningSandbox) -> None:
    path = create(sandbox, tuning(STUB_LOG="trained"), JOBS)
    done = finished(sandbox, path)
    assert done["state"] == "JOB_STATE_SUCCEEDED"
    assert done["createTime"] <= done["startTime"] <= done["endTime"]
    assert [t["id"] for t in done["trials"]] == ["1", "2", "3", "4"]
    for trial in done["trials"]:
        assert trial["state"] == "SUCCEEDED"
        chosen = {p["parameterId"]: p["value"] for p in trial["parameters"]}
        (metric,) = trial["finalMeasurement"]["metrics"]
        assert metric["metricId"] == "accuracy"
        assert metric["value"] == pytest.approx(chosen["x"] + chosen["n"])  # as the stub computes it
        child = sandbox.do("GET", f"customJobs/{trial['customJob'].rpartition('/')[2]}")
        assert child["name"] == trial["customJob"]
        assert child["jobSpec"]["baseOutputDirectory"] == {"outputUriPrefix": f"gs://bucket/tune/{trial['id']}"}
    assert sandbox.do("GET", "customJobs") == {}
    assert [j["name"] for j in sandbox.do("GET", JOBS, filter='state="JOB_STATE_SUCCEEDED"')[JOBS]] == [done["name"]]
    logged = entries(sandbox, f'resource.labels.job_id="{path.rpartition("/")[2]}" jsonPayload.message=trained')
    assert sorted(e["labels"]["ml.googleapis.com/trial_id"] for e in logged) == ["1", "2", "3", "4"]
    second = entries(sandbox, 'labels."ml.googleapis.com/trial_id"="2" AND resource.type="ml_job"')
    assert [e["jsonPayload"]["message"] for e in second] == ["trained"]
    assert messages(sandbox, path)[-1] == "Job completed successfully."
    sandbox.do("DELETE", path)
    assert sandbox.ask("GET", path)[0] == 404
    assert sandbox.ask("GET", f"customJobs/{done['trials'][0]['customJob'].rpartition('/')[2]}")[0] == 404


def test_as_many_trials_run_at_a_time_as_asked_for(stub_sandbox: RunningSandbox, sandbox: RunningSandbox) -> None:
    path = create(sandbox, tuning(5, 2, STUB_SECONDS="600"), JOBS)
    assert eventually(lambda: len(sandbox.do("GET", path).get("trials", [])) == 2)
    for trial in sandbox.do("GET", path)["trials"]:
        assert trial["state"] == "ACTIVE"
        sandbox.do("POST", f"customJobs/{trial['customJob'].rpartition('/')[2]}:cancel", {})
    assert eventually(lambda: len(sandbox.do("GET", path)["trials"]) == 4)
    states = [t["state"] for t in sandbox.do("GET", path)["trials"]]
    assert states == ["INFEASIBLE", "INFEASIBLE", "ACTIVE", "ACTIVE"]
    sandbox.do("POST", f"{path}:cancel", {})
    ended = finished(sandbox, path)
    assert (ended["state"], ended["error"]["code"]) == ("JOB_STATE_CANCELLED", 1)
    assert len(ended["trials"]) == 4
    assert "ACTIVE" not in [t["state"] for t in ended["trials"]]


def test_a_trial_that_crashes_counts_as_failed_and_the_study_goes_on(sandbox: RunningSandbox) -> None:
    done = finished(sandbox, create(sandbox, tuning(5, 2, STUB_FAILS="2"), JOBS))
    assert done["state"] == "JOB_STATE_SUCCEEDED"
    assert [t["state"] for t in done["trials"]] == ["SUCCEEDED", "INFEASIBLE", "SUCCEEDED", "SUCCEEDED", "SUCCEEDED"]
    assert "workerpool0-0 exited with a non-zero status of 1" in done["trials"][1]["infeasibleReason"]
    assert "finalMeasurement" not in done["trials"][1]


def test_too_many_failed_trials_fail_the_job(sandbox: RunningSandbox) -> None:
    failed = finished(sandbox, create(sandbox, tuning(6, 1, 2, STUB_FAILS="1,3"), JOBS))
    assert failed["state"] == "JOB_STATE_FAILED"
    assert [t["state"] for t in failed["trials"]] == ["INFEASIBLE", "SUCCEEDED", "INFEASIBLE"]
    assert "2 trials have failed" in failed["error"]["message"]
    silent = finished(sandbox, create(sandbox, tuning(1, 1, STUB_METRIC="loss"), JOBS))
    assert silent["state"] == "JOB_STATE_FAILED"
    assert "The trial did not report accuracy." in silent["error"]["message"]


def test_an_exhausted_grid_ends_the_study(sandbox: RunningSandbox) -> None:
    few = [{"parameterId": "n", "integerValueSpec": {"minValue": "1", "maxValue": "3"}}]
    done = finished(sandbox, create(sandbox, tuning(9, 2, study={"parameters": few, "algorithm": "GRID_SEARCH"}), JOBS))
    assert done["state"] == "JOB_STATE_SUCCEEDED"
    assert [t["parameters"][0]["value"] for t in done["trials"]] == [1, 2, 3]


def test_a_killed_sandbox_goes_on_with_its_study() -> None:
    with RunningSandbox("--registry-port", "0") as sandbox:
        path = create(sandbox, tuning(4, 2, STUB_SECONDS="0.5"), JOBS)
        for count in (1, 3):
            assert eventually(lambda: len(sandbox.do("GET", path).get("trials", [])) >= count)  # noqa: B023
            sandbox.kill()
            sandbox.start()
        done = finished(sandbox, path)
        assert done["state"] == "JOB_STATE_SUCCEEDED"
        assert [t["state"] for t in done["trials"]] == ["SUCCEEDED"] * 4
        waiting = create(sandbox, tuning(2, 1, STUB_SECONDS="600"), JOBS)
        sandbox.do("POST", f"{waiting}:cancel", {})
        sandbox.kill()
        sandbox.start()
        assert finished(sandbox, waiting)["state"] == "JOB_STATE_CANCELLED"


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"maxTrialCount": 0}, 400, "maxTrialCount"),
        ({"parallelTrialCount": 0}, 400, "parallelTrialCount"),
        ({"maxFailedTrialCount": -1}, 400, "maxFailedTrialCount"),
        ({"studySpec": {}}, 400, "metrics"),
        ({"trialJobSpec": {}}, 400, "trial_job_spec.worker_pool_specs"),
        ({"displayName": ""}, 400, "display_name"),
    ],
)
def test_what_vertex_ai_refuses_is_refused(sandbox: RunningSandbox, change: Any, status: int, says: str) -> None:
    refused = sandbox.ask("POST", JOBS, tuning() | change)
    assert refused[0] == status
    assert says in refused[1]["error"]["message"]


def test_faults_are_ordered_for_tuning_jobs_too(stub_sandbox: RunningSandbox, sandbox: RunningSandbox) -> None:
    for when, trials in (("before", 0), ("after", 1)):
        sandbox.fault(f"{JOBS}.create", "operation_error", when=when, status="INTERNAL", message="broken")
        failed = finished(sandbox, create(sandbox, tuning(1, 1), JOBS))
        assert (failed["error"]["message"], len(failed.get("trials", []))) == ("broken", trials)
    sandbox.fault(f"{JOBS}.create", "hold")
    path = create(sandbox, tuning(1, 1), JOBS)
    assert eventually(lambda: state(sandbox, path) == "RUNNING")
    stub_sandbox.release()
    assert finished(sandbox, path)["state"] == "JOB_STATE_SUCCEEDED"
