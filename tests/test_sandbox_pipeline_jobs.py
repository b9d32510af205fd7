"""Pipeline jobs of the sandbox (stub containers): KFP's compiler writes the templates."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pipeline_templates as templates
import psutil
import pytest
from helpers import eventually
from sandbox_jobs import entries

from sandbox.testing import RunningSandbox

BUCKET = "a-bucket"
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")


@pytest.fixture
def sandbox(stub_sandbox: RunningSandbox, project: str) -> RunningSandbox:
    mine = stub_sandbox.project(project)
    make_bucket(mine)
    return mine


def make_bucket(sandbox: RunningSandbox) -> None:
    project = sandbox.location.split("/")[1]
    status, _ = sandbox.ask_api("storage", "POST", f"v1/b?project={project}", {"name": bucket(sandbox)})
    assert status == 200


def bucket(sandbox: RunningSandbox) -> str:
    return f"{BUCKET}-{sandbox.location.split('/')[1]}"


def body(sandbox: RunningSandbox, spec: Any, values: Any = None, **runtime: Any) -> dict[str, Any]:
    config = {"gcsOutputDirectory": f"gs://{bucket(sandbox)}/runs", "parameterValues": values or {}, **runtime}
    return {"displayName": "a run", "pipelineSpec": spec, "runtimeConfig": config}


def start(sandbox: RunningSandbox, spec: Any, values: Any = None, **runtime: Any) -> str:
    """Makes a job and returns its path."""
    made = sandbox.do("POST", "pipelineJobs", body(sandbox, spec, values, **runtime))
    return f"pipelineJobs/{made['name'].rpartition('/')[2]}"


def state(sandbox: RunningSandbox, path: str) -> str:
    text: str = sandbox.do("GET", path)["state"]
    return text.removeprefix("PIPELINE_STATE_")


def finished(sandbox: RunningSandbox, path: str) -> Any:
    assert eventually(lambda: state(sandbox, path) in ENDED), state(sandbox, path)
    return sandbox.do("GET", path)


def run(sandbox: RunningSandbox, spec: Any, values: Any = None, **runtime: Any) -> Any:
    """The job of a template when it has ended."""
    return finished(sandbox, start(sandbox, spec, values, **runtime))


def tasks(job: Any) -> dict[str, Any]:
    """The details of a job's tasks by their unique names."""
    return {one["taskUniqueName"]: one for one in job["jobDetail"]["taskDetails"] if "taskUniqueName" in one}


def states(job: Any) -> dict[str, str]:
    return {name: one["state"] for name, one in tasks(job).items()}


def command(sandbox: RunningSandbox, task: Any) -> list[str]:
    """The command and the arguments of a task's container."""
    name = task["executorDetail"]["containerDetail"]["mainJob"].rpartition("/")[2]
    spec = sandbox.do("GET", f"customJobs/{name}")["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]
    return [*spec.get("command", []), *spec.get("args", [])]


def test_tasks_hand_parameters_and_artifacts_on(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.linear(), {"text": "it's", "times": 5})
    assert job["state"] == "PIPELINE_STATE_SUCCEEDED"
    first, second = tasks(job)["make"], tasks(job)["use"]
    data = first["outputs"]["data"]["artifacts"][0]
    job_id = job["name"].rpartition("/")[2]
    assert data["uri"].startswith(f"gs://{bucket(sandbox)}/runs/{job['name'].split('/')[1]}/{job_id}/make_")
    assert data["schemaTitle"] == "system.Dataset"
    path = data["uri"].replace("gs://", "/gcs/")
    assert command(sandbox, first) == ["make", "it's", path, path.replace("/data", "/count")]
    model = second["outputs"]["model"]["artifacts"][0]["uri"]
    assert command(sandbox, second) == ["use", "--n", "5", "--data", path, "--model", model]
    assert second["inputs"]["data"]["artifacts"][0]["name"] == data["name"]
    assert first["execution"]["metadata"] == {"input:text": "it's", "output:count": 1}
    assert second["startTime"] >= first["endTime"]
    assert [one["state"] for one in first["pipelineTaskStatus"]] == ["PENDING", "RUNNING", "SUCCEEDED"]
    whole = job["jobDetail"]["taskDetails"][0]
    assert (whole["taskName"], whole["state"], first["parentTaskId"]) == (job_id, "SUCCEEDED", whole["taskId"])
    status, content = sandbox.ask_api("storage", "GET", f"v1/b/{bucket(sandbox)}/o")
    assert status == 200
    assert data["uri"].partition("/runs/")[2] in " ".join(item["name"] for item in content["items"])


def test_a_second_run_repeats_nothing(sandbox: RunningSandbox) -> None:
    spec = templates.linear()
    first = run(sandbox, spec, {"times": 1})
    again = run(sandbox, spec, {"times": 1})
    assert states(again) == {"make": "SKIPPED", "use": "SKIPPED"}
    assert tasks(again)["use"]["outputs"] == {
        key: {"artifacts": [{**one, "createTime": tasks(again)["use"]["endTime"]} | {
            "updateTime": tasks(again)["use"]["endTime"]} for one in value["artifacts"]]}
        for key, value in tasks(first)["use"]["outputs"].items()
    }  # fmt: skip
    changed = run(sandbox, spec, {"times": 2})
    assert states(changed) == {"make": "SKIPPED", "use": "SUCCEEDED"}
    other = run(sandbox, templates.linear(set_caching_options=[False]), {"times": 1})
    assert states(other) == {"make": "SKIPPED", "use": "SUCCEEDED"}


@pytest.mark.parametrize(
    ("best", "score", "taken"),
    [("left", "0.1", "condition-2"), (templates.ODD, "0.9", "condition-3"), (templates.ODD, "0.7", "condition-4")],
)
def test_conditions_choose_one_branch(sandbox: RunningSandbox, best: str, score: str, taken: str) -> None:
    job = run(sandbox, templates.branches(best, score))
    assert job["state"] == "PIPELINE_STATE_SUCCEEDED", job
    found = states(job)
    whole = "condition-branches-1"
    assert {name for name in found if found[name] == "NOT_TRIGGERED"} == {
        f"{whole}.condition-{n}" for n in (2, 3, 4) if f"condition-{n}" != taken
    }
    assert found[f"{whole}.{taken}"] == found[whole] == "SUCCEEDED"


@pytest.mark.parametrize("left", [True, False])
def test_one_of_two_artifacts_goes_on(sandbox: RunningSandbox, left: bool) -> None:
    found = tasks(run(sandbox, templates.chosen_artifact(), {"left": left}))
    branch = "condition-2.make" if left else "condition-3.make-2"
    made = found[f"condition-branches-1.{branch}"]["outputs"]["data"]["artifacts"][0]["uri"]
    assert found["use"]["inputs"]["data"]["artifacts"][0]["uri"] == made


def test_loops_run_once_for_each_item(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.loops())
    assert job["state"] == "PIPELINE_STATE_SUCCEEDED", job
    made = [one for name, one in tasks(job).items() if one["taskName"] == "make"]
    assert sorted(one["execution"]["metadata"]["input:text"] for one in made) == ["a", "b", "c"]
    assert len({one["outputs"]["data"]["artifacts"][0]["uri"] for one in made}) == 3
    assert command(sandbox, tasks(job)["gather"])[1:] == ["[1, 1, 1]"]
    said = [command(sandbox, one)[1] for one in tasks(job).values() if one["taskName"] == "say"]
    assert sorted(said) == ["number 1", "number 2"]


def test_loops_nest_and_may_have_no_items(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.loops_in_loops())
    assert job["state"] == "PIPELINE_STATE_SUCCEEDED", job
    said = [command(sandbox, one)[1] for one in tasks(job).values() if one["taskName"] == "say"]
    assert sorted(said) == ["part 1", "part 2", "part 3"]
    gathered = {command(sandbox, one)[1] for one in tasks(job).values() if one["taskName"].startswith("gather")}
    assert gathered == {"[]", "[1, 1]"}


def test_pipelines_nest_and_import(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.nested(), {"uri": "gs://elsewhere/data.csv"})
    assert job["state"] == "PIPELINE_STATE_SUCCEEDED", job
    found = tasks(job)
    assert found["importer"]["outputs"]["artifact"]["artifacts"][0]["uri"] == "gs://elsewhere/data.csv"
    assert found["importer"]["outputs"]["artifact"]["artifacts"][0]["metadata"] == {"rows": 3}
    assert "--data /gcs/elsewhere/data.csv" in " ".join(command(sandbox, found["inner.use"]))
    assert found["inner.use"]["parentTaskId"] == found["inner"]["taskId"]
    # Tasks of one component have folders of their own.
    assert command(sandbox, found["use"])[4] != command(sandbox, found["use-2"])[4]


def test_inputs_may_be_left_out(sandbox: RunningSandbox) -> None:
    assert command(sandbox, tasks(run(sandbox, templates.optional()))["perhaps"]) == ["perhaps", "--none"]
    job = run(sandbox, templates.optional(), {"text": "here", "number": None})
    assert command(sandbox, tasks(job)["perhaps"]) == ["perhaps", "--text", "here"]


def test_lightweight_components_get_their_input_as_json(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.lightweight())
    assert job["state"] == "PIPELINE_STATE_SUCCEEDED", job
    said = " ".join(command(sandbox, tasks(job)["measured"]))
    assert '"outputFile": "/gcs/' in said
    assert f'"uri": "gs://{bucket(sandbox)}/runs/' in said
    assert "\0" not in said


def test_a_failing_task_names_itself(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.linear(fail="7"), {"times": 1})
    assert job["state"] == "PIPELINE_STATE_FAILED"
    assert job["error"]["message"].startswith(
        "The DAG failed because some tasks failed. The failed tasks are: [use].; Job (project_id = "
    )
    task = tasks(job)["use"]
    assert task["state"] == "FAILED"
    assert "exited with a non-zero status of 7" in task["error"]["message"]
    # A rerun goes on from it.
    again = run(sandbox, templates.linear(), {"times": 1})
    assert states(again) == {"make": "SKIPPED", "use": "SUCCEEDED"}


def test_a_task_is_repeated_as_often_as_it_says(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.linear(fail="7", set_retry=[2, "0s"]), {"times": 1})
    task = tasks(job)["use"]
    detail = task["executorDetail"]["containerDetail"]
    assert len({detail["mainJob"], *detail["failedMainJobs"]}) == 3
    errors = [one["state"] for one in task["pipelineTaskStatus"] if "error" in one]
    assert errors == ["PENDING", "PENDING", "FAILED"]


def test_an_output_that_is_missing_is_a_failure(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.unwritten())
    assert "did not write its outputs score to /gcs/" in tasks(job)["choose"]["error"]["message"]


@pytest.mark.parametrize("policy", ["SLOW", "FAST"])
def test_the_failure_policy_decides_on_tasks_that_could_still_run(sandbox: RunningSandbox, policy: str) -> None:
    job = run(sandbox, templates.independent(), failurePolicy=f"PIPELINE_FAILURE_POLICY_FAIL_{policy}")
    found = states(job)
    assert found.pop("z-last") == ("SUCCEEDED" if policy == "SLOW" else "NOT_TRIGGERED")
    assert found == {"a-first": "FAILED", "after-first": "NOT_TRIGGERED"}


def test_exit_tasks_run_after_a_failure_and_know_of_it(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.exit_handled("1"))
    assert job["state"] == "PIPELINE_STATE_FAILED"
    assert states(job)["told"] == "SUCCEEDED"
    status = tasks(job)["told"]["execution"]["metadata"]["input:status"]
    assert (status["state"], status["pipelineTaskName"]) == ("FAILED", "exit-handler-1")
    assert status["pipelineJobResourceName"] == job["name"]
    assert states(run(sandbox, templates.exit_handled("0")))["told"] == "SUCCEEDED"


def test_limits_choose_the_machine(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.linear(set_cpu_limit=["8"], set_memory_limit=["16G"]), {"times": 1})
    name = tasks(job)["use"]["executorDetail"]["containerDetail"]["mainJob"].rpartition("/")[2]
    custom = sandbox.do("GET", f"customJobs/{name}")
    assert custom["jobSpec"]["workerPoolSpecs"][0]["machineSpec"] == {"machineType": "e2-standard-8"}
    assert custom["labels"] == job["labels"]


def test_a_limit_may_be_the_output_of_a_task(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.limited_by_a_task())
    name = tasks(job)["say"]["executorDetail"]["containerDetail"]["mainJob"].rpartition("/")[2]
    pools = sandbox.do("GET", f"customJobs/{name}")["jobSpec"]["workerPoolSpecs"]
    assert pools[0]["machineSpec"]["machineType"] == "e2-standard-8"


def test_what_is_not_implemented_says_its_name(sandbox: RunningSandbox) -> None:
    status, answer = sandbox.ask("POST", "pipelineJobs", body(sandbox, templates.workspace()))
    assert (status, answer["error"]["status"]) == (501, "UNIMPLEMENTED")
    assert "workspaces" in answer["error"]["message"]


def test_a_cancelled_job_ends_its_container(sandbox: RunningSandbox) -> None:
    path = start(sandbox, templates.linear(seconds="600"), {"times": 1})
    assert eventually(lambda: states_of(sandbox, path).get("use") == "RUNNING")
    status, answer = sandbox.ask("DELETE", path)
    assert (status, "cancel it" in answer["error"]["message"]) == (400, True)
    assert sandbox.do("POST", f"{path}:cancel", {}) == {}
    job = finished(sandbox, path)
    assert job["state"] == "PIPELINE_STATE_CANCELLED"
    assert states(job) == {"make": "SUCCEEDED", "use": "CANCELLED"}
    custom = tasks(job)["use"]["executorDetail"]["containerDetail"]["mainJob"].rpartition("/")[2]
    assert sandbox.do("GET", f"customJobs/{custom}")["state"] == "JOB_STATE_CANCELLED"
    sandbox.do("DELETE", path)
    assert sandbox.ask("GET", path)[0] == 404


def states_of(sandbox: RunningSandbox, path: str) -> dict[str, str]:
    job = sandbox.do("GET", path)
    return states(job) if "jobDetail" in job else {}


def test_logs_have_the_job_and_its_containers(sandbox: RunningSandbox) -> None:
    job = run(sandbox, templates.linear(set_env_variable=["STUB_LOG", "counted"]), {"times": 1})
    found = entries(sandbox, f'resource.labels.pipeline_job_id="{job["name"].rpartition("/")[2]}"')
    assert [one["jsonPayload"]["state"].removeprefix("PIPELINE_STATE_") for one in found] == [
        "PENDING",
        "RUNNING",
        "SUCCEEDED",
    ]
    name = tasks(job)["use"]["executorDetail"]["containerDetail"]["mainJob"].rpartition("/")[2]
    lines = entries(sandbox, f'resource.type="ml_job" resource.labels.job_id="{name}" jsonPayload.message="counted"')
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"values": {"times": 1, "tmes": 2}}, 400, "parameter tmes is not found .* it has text, times"),
        ({"values": {}}, 400, "parameters are not set in runtime_config: times"),
        ({"values": {"times": "many"}}, 400, "times must be a NUMBER_INTEGER; it is 'many'"),
        ({"values": {"times": 1.5}}, 400, "times must be a NUMBER_INTEGER"),
        ({"values": {"times": True}}, 400, "times must be a NUMBER_INTEGER"),
        ({"folder": ""}, 400, "gcs_output_directory is not set"),
        ({"folder": "s3://somewhere"}, 400, "gs://BUCKET/FOLDER is expected"),
        ({"folder": "gs://nobodys-bucket"}, 400, "to the bucket `nobodys-bucket`.*create it"),
        ({"spec": {"name": "x"}}, 400, "compiled with kfp.compiler"),
        ({"spec": {"pipelineInfo": {"name": "x"}, "schemaVersion": "2.0.0"}}, 501, "schema_version 2.0.0"),
        ({"spec": {"pipelineInfo": {"name": "x"}, "schemaVersion": "2.1.0"}}, 400, "root has no tasks"),
        ({"more": {"pipelineSpec": {}}}, 400, "pipeline_spec or template_uri is not set"),
        ({"more": {"pipelineSpec": {}, "templateUri": "gs://nobodys-bucket/x"}}, 404, "nobodys-bucket/x is not found"),
        ({"more": {"labels": {"A": "b"}}}, 400, "Invalid label key"),
        ({"more": {"reservedIpRanges": ["a"]}}, 501, "reservedIpRanges"),
        ({"runtime": {"inputArtifacts": {"a": {"artifactId": "1"}}}}, 501, "inputArtifacts"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_made(
    sandbox: RunningSandbox, change: dict[str, Any], status: int, message: str
) -> None:
    request = body(sandbox, change.get("spec") or templates.linear(), change.get("values", {"times": 1}))
    if "folder" in change:
        request["runtimeConfig"]["gcsOutputDirectory"] = change["folder"]
    request["runtimeConfig"] |= change.get("runtime", {})
    got, answer = sandbox.ask("POST", "pipelineJobs", {**request, **change.get("more", {})})
    assert got == status, answer
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer["error"]["message"])
    assert sandbox.do("GET", "pipelineJobs") == {}


def test_runs_go_on_after_restarts(tmp_path: Path) -> None:
    with RunningSandbox("--registry-port", "0", state=tmp_path) as sandbox:
        make_bucket(sandbox)
        path = start(sandbox, templates.linear(seconds="2"), {"times": 1})
        other = start(sandbox, templates.linear(seconds="600"), {"times": 2})
        assert eventually(lambda: {states_of(sandbox, one).get("use") for one in (path, other)} == {"RUNNING"})
        before = tasks(sandbox.do("GET", path))
        sandbox.do("POST", f"{other}:cancel", {})
        for how in (signal.SIGKILL, signal.SIGTERM):
            sandbox.stop(how)
            sandbox.start()
        job = finished(sandbox, path)
        assert states(job) == {"make": "SUCCEEDED", "use": "SUCCEEDED"}
        after = tasks(job)
        assert after["make"] == before["make"]
        assert after["use"]["executorDetail"] == before["use"]["executorDetail"]
        assert finished(sandbox, other)["state"] == "PIPELINE_STATE_CANCELLED"


def test_a_process_that_ends_early_fails_its_job(sandbox: RunningSandbox) -> None:
    path = start(sandbox, templates.linear(seconds="600"), {"times": 1})
    assert eventually(lambda: states_of(sandbox, path).get("use") == "RUNNING")
    assert sandbox.process is not None
    [server] = [p for p in psutil.Process(sandbox.process.pid).children() if "forkserver" in " ".join(p.cmdline())]
    for child in server.children():
        child.kill()
    job = finished(sandbox, path)
    assert (job["state"], job["error"]["code"]) == ("PIPELINE_STATE_FAILED", 13)
    assert states(job)["use"] == "CANCELLED"


def test_faults_hold_jobs_and_fail_them(sandbox: RunningSandbox) -> None:
    spec = templates.linear()
    sandbox.fault("pipelineJobs.create", "hold")
    held = start(sandbox, spec, {"times": 1})
    assert eventually(lambda: states_of(sandbox, held).get("make") == "RUNNING")
    sandbox.release()
    assert finished(sandbox, held)["state"] == "PIPELINE_STATE_SUCCEEDED"
    sandbox.fault("pipelineJobs.create", "operation_error", message="No quota.", status="RESOURCE_EXHAUSTED")
    job = run(sandbox, spec, {"times": 1})
    assert (job["state"], job["error"]) == ("PIPELINE_STATE_FAILED", {"code": 8, "message": "No quota."})
    assert "jobDetail" not in job
