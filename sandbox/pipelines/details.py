"""What a pipeline job shows of its tasks: PipelineJob.jobDetail of the discovery document, made from its document."""

import hashlib
from collections.abc import Callable
from typing import Any

from sandbox.store import JSON

# A container's task stands as its custom job does.
JOB_STATES = {
    "JOB_STATE_QUEUED": "PENDING",
    "JOB_STATE_PENDING": "PENDING",
    "JOB_STATE_CANCELLING": "CANCELLING",
}
EXECUTIONS = {
    "PENDING": "NEW",
    "RUNNING": "RUNNING",
    "CANCELLING": "RUNNING",
    "SUCCEEDED": "COMPLETE",
    "SKIPPED": "CACHED",
    "FAILED": "FAILED",
    "CANCELLED": "CANCELLED",
}
SCHEMAS = {
    "container": "system.ContainerExecution",
    "importer": "system.ImporterExecution",
    "dag": "system.DagExecution",
}
RUN = "system.Run"  # the task that stands for the whole pipeline
JOB_TASK = {
    "PIPELINE_STATE_PENDING": "PENDING",
    "PIPELINE_STATE_RUNNING": "RUNNING",
    "PIPELINE_STATE_SUCCEEDED": "SUCCEEDED",
    "PIPELINE_STATE_FAILED": "FAILED",
    "PIPELINE_STATE_CANCELLING": "CANCELLING",
    "PIPELINE_STATE_CANCELLED": "CANCELLED",
}
# As KFP's cache marks artifacts among outputs.
ARTIFACT, ARTIFACTS = "__kfp_artifact__", "__kfp_artifact_list__"


def task_details(document: JSON, find_job: Callable[[str], JSON | None]) -> list[JSON]:
    """PipelineTaskDetail of every task that was begun or decided on, the pipeline's own first.

    find_job: the document of a custom job by its name, None for one that was deleted.
    """
    resource = document["resource"]
    store = f"{'/'.join(resource['name'].split('/')[:4])}/metadataStores/default"
    job_id = resource["name"].rpartition("/")[2]
    root: JSON = {
        "name": job_id,
        "id": _number(resource["name"]),
        "type": "",
        "state": JOB_TASK[resource["state"]],
        "inputs": document["arguments"],
        "jobs": [],
        **{key: resource[key] for key in ("createTime", "endTime", "error") if key in resource},
    }
    shown = [_detail(store, "", root, [], "")] if "startTime" in resource else []
    ids = {"": root["id"], **{unique: task["id"] for unique, task in document["tasks"].items()}}
    for unique, task in document["tasks"].items():
        jobs = [(name, job["resource"] if (job := find_job(name)) else None) for name in task["jobs"]]
        shown.append(_detail(store, unique, task, jobs, str(ids.get(task["parent"], root["id"]))))
    return shown


def _number(text: str) -> str:
    return str(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1)


def _detail(store: str, unique: str, task: JSON, jobs: list[tuple[str, JSON | None]], parent: str) -> JSON:
    last = jobs[-1][1] if jobs else None
    state = task["state"]
    if state == "RUNNING" and task["type"] == "container":
        state = JOB_STATES.get(last["state"], "RUNNING") if last else "PENDING"
    began = [job["startTime"] for _, job in jobs if job and "startTime" in job]
    started = began[0] if began else "" if task["type"] == "container" and jobs else task["createTime"]
    detail: JSON = {
        "taskId": task["id"],
        "taskName": task["name"],
        "createTime": task["createTime"],
        "state": state,
        "pipelineTaskStatus": _statuses(task, state, jobs),
    }
    if unique:
        detail |= {"taskUniqueName": unique, "parentTaskId": parent}
    if started and state not in ("PENDING", "NOT_TRIGGERED"):
        detail["startTime"] = started
    detail |= {key: task[key] for key in ("endTime", "error") if key in task}
    if task["type"] == "container" and state != "NOT_TRIGGERED":
        container: JSON = {}
        if jobs:
            container["mainJob"] = jobs[-1][0]
        if len(jobs) > 1:
            container["failedMainJobs"] = [name for name, _ in jobs[:-1]]
        detail["executorDetail"] = {"containerDetail": container}
    for side in ("inputs", "outputs"):
        lists = {key: _artifacts(value) for key, value in task.get(side, {}).items()}
        if found := {key: [_artifact(store, key, one, task) for one in many] for key, many in lists.items() if many}:
            detail[side] = {key: {"artifacts": many} for key, many in found.items()}
    if state in EXECUTIONS:
        detail["execution"] = _execution(store, task, state)
    return detail


def _statuses(task: JSON, state: str, jobs: list[tuple[str, JSON | None]]) -> list[JSON]:
    """How the state went, with the errors of attempts that were repeated."""
    found: list[JSON] = []

    def note(time: str, state: str, error: JSON | None = None) -> None:
        found.append({"updateTime": time, "state": state, **({"error": error} if error else {})})

    if state != "NOT_TRIGGERED":
        note(task["createTime"], "PENDING" if jobs or state == "PENDING" else "RUNNING")
    for number, (_, job) in enumerate(jobs):
        if job and "startTime" in job:
            note(job["startTime"], "RUNNING")
        if job and "endTime" in job and number < len(jobs) - 1:
            note(job["endTime"], "PENDING", job.get("error"))
    if "endTime" in task:
        note(task["endTime"], state, task.get("error"))
    elif found and found[-1]["state"] != state:
        note(found[-1]["updateTime"], state)
    return found


def _artifacts(value: Any) -> list[JSON]:
    if isinstance(value, dict) and value.get(ARTIFACT):
        return [value]
    return list(value["artifacts"]) if isinstance(value, dict) and value.get(ARTIFACTS) else []


def _artifact(store: str, key: str, artifact: JSON, task: JSON) -> JSON:
    """The Artifact of Vertex ML Metadata, of which the sandbox has contexts only. The same URI has the same name."""
    time = task.get("endTime", task["createTime"])
    shown: JSON = {
        "name": f"{store}/artifacts/{_number(artifact['uri'])}",
        "displayName": key,
        "uri": artifact["uri"],
        "schemaTitle": artifact.get("schema_title", "system.Artifact"),
        "schemaVersion": artifact.get("schema_version") or "0.0.1",
        "state": "LIVE",
        "createTime": time,
        "updateTime": time,
    }
    return shown | ({"metadata": artifact["metadata"]} if artifact.get("metadata") else {})


def _execution(store: str, task: JSON, state: str) -> JSON:
    """The Execution, whose metadata has the parameters: `input:NAME` and `output:NAME`."""
    values = {
        f"{side}:{key}": value
        for side, values in (("input", task.get("inputs", {})), ("output", task.get("outputs", {})))
        for key, value in values.items()
        if not _artifacts(value)
    }
    return {
        "name": f"{store}/executions/{task['id']}",
        "displayName": task["name"],
        "state": EXECUTIONS[state],
        "schemaTitle": SCHEMAS.get(task["type"], RUN),
        "schemaVersion": "0.0.1",
        "createTime": task["createTime"],
        "updateTime": task.get("endTime", task["createTime"]),
        **({"metadata": values} if values else {}),
    }
