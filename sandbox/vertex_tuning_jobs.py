"""Hyperparameter tuning jobs: trials, each a job of its own, suggested one after the other.

https://docs.cloud.google.com/vertex-ai/docs/training/using-hyperparameter-tuning
All that a tuning job knows is in its document, so `advance` goes on from there after each trial and after a kill. A
trial's own job is read by its name, and is not among the custom jobs of a list.
"""

import asyncio
import logging
from dataclasses import dataclass

from sandbox import clock
from sandbox.context import Call, Cloud
from sandbox.conventions import page
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.jobs import ENDED, new_job
from sandbox.operations import OperationKind
from sandbox.store import JSON
from sandbox.study import arguments, check_study, final_measurement, measurements, suggest
from sandbox.training import of_trial
from sandbox.vertex_custom_jobs import LISTED, check_common, check_spec, deletion

log = logging.getLogger("sandbox")

CANCELLED: JSON = {"state": "JOB_STATE_CANCELLED", "error": {"code": 1, "message": "CANCELED"}}


def find(cloud: Cloud, name: str) -> JSON:
    """The tuning job's document. Raises NOT_FOUND."""
    job = cloud.store.get("tuningJob", name)
    if not job:
        raise not_found(f"HyperparameterTuningJob {name} is not found.")
    return job


# ------------------------------------------------------------------------------------------------------ decisions


def most_failures(resource: JSON) -> int:
    """How many failed trials make the job fail. 0: "Vertex AI decides", and here half of the trials."""
    return int(resource.get("maxFailedTrialCount") or (resource["maxTrialCount"] + 1) // 2)


def settled(trial: JSON, job: JSON, study: JSON) -> JSON:
    """A trial after its job has ended."""
    resource = job["resource"]
    reported = measurements(study, job.get("metrics", ""), trial["startTime"])
    final = final_measurement(study, reported)
    trial = {**trial, "endTime": resource["endTime"]}
    if reported:
        trial["measurements"] = reported
    if resource["state"] == "JOB_STATE_SUCCEEDED" and final:
        return {**trial, "state": "SUCCEEDED", "finalMeasurement": final}
    reason = resource.get("error", {}).get("message", "")
    if not reason:
        reason = f"The trial did not report {', '.join(metric['metricId'] for metric in study['metrics'])}."
    return {**trial, "state": "INFEASIBLE", "infeasibleReason": reason}


@dataclass(frozen=True)
class Step:
    """What a tuning job does next: it ends, or it starts so many trials."""

    outcome: JSON | None
    trials: int


def next_step(resource: JSON, *, exhausted: bool = False) -> Step:
    """Decides by the states of the trials; `exhausted` says that nothing is left to be suggested."""
    trials = resource.get("trials", [])
    active = sum(trial["state"] == "ACTIVE" for trial in trials)
    failed = sum(trial["state"] == "INFEASIBLE" for trial in trials)
    if failed >= most_failures(resource):
        message = f"{failed} trials have failed, so the job fails. The last one: {_last_reason(trials)}"
        return Step({"state": "JOB_STATE_FAILED", "error": invalid(message).rpc_status()}, 0)
    left = 0 if exhausted else resource["maxTrialCount"] - len(trials)
    if not left and not active:
        return Step({"state": "JOB_STATE_SUCCEEDED"}, 0)
    return Step(None, min(left, resource["parallelTrialCount"] - active))


def _last_reason(trials: list[JSON]) -> str:
    return str([trial["infeasibleReason"] for trial in trials if trial["state"] == "INFEASIBLE"][-1])


# --------------------------------------------------------------------------------------------------------- running


async def advance(cloud: Cloud, name: str) -> None:
    """Settles the trials that have ended, and starts the next ones or ends the job."""
    async with cloud.jobs.lock:
        while True:
            document = cloud.store.get("tuningJob", name)
            if not document or document["resource"]["state"] in ENDED:
                return
            _settle(cloud, document)
            resource = document["resource"]
            step = next_step(resource, exhausted=document.get("exhausted", False))
            if not document.get("verdict") and step.outcome:
                document["verdict"] = _after_faults(document["fault"], step.outcome)
            if verdict := document.get("verdict"):
                _end(cloud, document, verdict)
                return
            if step.trials < 1:
                _save(cloud, document)
                return
            problem = None
            try:
                values = await asyncio.to_thread(suggest, resource["studySpec"], resource.get("trials", []), name)
            except Exception as error:  # of Optuna
                log.exception("tuning job %s", name)
                problem = GoogleError("INTERNAL", f"No trial could be suggested: {error!r}")
            document = find(cloud, name)  # it may have been cancelled meanwhile
            if document.get("verdict"):
                continue
            if problem:
                document["verdict"] = {"state": "JOB_STATE_FAILED", "error": problem.rpc_status()}
                _save(cloud, document)
            elif values is None:
                document["exhausted"] = True
                _save(cloud, document)
            else:
                _start_trial(cloud, document, values)


def _settle(cloud: Cloud, document: JSON) -> None:
    resource = document["resource"]
    trials = []
    for trial in resource.get("trials", []):
        job = cloud.jobs.find(trial["customJob"]) if trial["state"] == "ACTIVE" else None
        over = job is not None and job["resource"]["state"] in ENDED
        trials.append(settled(trial, job, resource["studySpec"]) if job and over else trial)
    if trials:
        resource["trials"] = trials


def _after_faults(fault: JSON, outcome: JSON) -> JSON:
    if fault.get("kind") != "operation_error":
        return outcome
    return {"state": "JOB_STATE_FAILED", "error": GoogleError(fault["status"], fault["message"]).rpc_status()}


def _save(cloud: Cloud, document: JSON) -> None:
    document["resource"]["updateTime"] = clock.now()
    with cloud.store.transaction():
        cloud.store.put("tuningJob", document["resource"]["name"], document)


def _start_trial(cloud: Cloud, document: JSON, values: list[JSON]) -> None:
    resource = document["resource"]
    trials: list[JSON] = resource.setdefault("trials", [])
    trial_id, name, now = str(len(trials) + 1), resource["name"], clock.now()
    child: JSON = {"displayName": f"{resource['displayName'][:110]}-trial-{trial_id}"}
    for key in ("labels", "encryptionSpec"):
        if key in resource:
            child[key] = resource[key]
    child["jobSpec"] = of_trial(resource["trialJobSpec"], trial_id)
    made = new_job("/".join(name.split("/")[:4]), "customJobs", child)
    trials.append(
        {"id": trial_id, "state": "ACTIVE", "parameters": values, "startTime": now, "customJob": made["name"]}
    )
    if resource["state"] == "JOB_STATE_QUEUED":
        resource |= {"state": "JOB_STATE_RUNNING", "startTime": now}
    fault: JSON = (cloud.store.get("tuningJob", name) or document)["fault"]  # may have been released meanwhile
    first = fault if trial_id == "1" and fault.get("kind") in ("hold", "slow") else {}
    trial = {"job": name, "id": trial_id, "arguments": arguments(values)}
    with cloud.store.transaction():
        _save(cloud, document)
        cloud.jobs.put(made, first, trial)
    cloud.jobs.start(made["name"])


def _end(cloud: Cloud, document: JSON, verdict: JSON) -> None:
    """Ends a tuning job, after the trials that still run were cancelled and have ended."""
    resource = document["resource"]
    active = [trial for trial in resource.get("trials", []) if trial["state"] == "ACTIVE"]
    if not active:
        resource |= {**verdict, "endTime": clock.now()}
    _save(cloud, document)
    for trial in active:
        cloud.jobs.cancel(trial["customJob"])
    if not active:
        cloud.jobs.announce(resource["name"], verdict)


def resume(cloud: Cloud) -> None:
    """At start: goes on with the tuning jobs of before."""
    for name, document in cloud.store.list("tuningJob"):
        if document["resource"]["state"] not in ENDED:
            cloud.jobs.background(advance(cloud, name))


def job_ended(cloud: Cloud, name: str) -> None:
    """Goes on with the tuning job of which a custom job was a trial."""
    job = cloud.jobs.find(name)
    if job and job["trial"]:
        cloud.jobs.background(advance(cloud, job["trial"]["job"]))


# --------------------------------------------------------------------------------------------------------- methods


async def create(call: Call) -> JSON:
    resource: JSON = call.body
    check_common(call)
    for name in ("maxTrialCount", "parallelTrialCount"):
        if resource.get(name, 0) < 1:
            raise invalid(f"{name} must be at least 1; it is {resource.get(name, 0)}.")
    if resource.get("maxFailedTrialCount", 0) < 0:
        raise invalid("maxFailedTrialCount can not be negative.")
    check_study(resource.setdefault("studySpec", {}))
    check_spec(call, resource.setdefault("trialJobSpec", {}), "trial_job_spec")
    made = new_job(call.location, "hyperparameterTuningJobs", resource)
    document: JSON = {"resource": made, "fault": call.fault}
    if call.fault.get("kind") == "operation_error" and call.fault["when"] == "before":
        document["verdict"] = _after_faults(call.fault, {})
    with call.cloud.store.transaction():
        call.cloud.store.put("tuningJob", made["name"], document)
    call.cloud.jobs.background(advance(call.cloud, made["name"]))
    return dict(made)


async def get(call: Call) -> JSON:
    resource: JSON = find(call.cloud, call.name)["resource"]
    return resource


async def list_(call: Call) -> JSON:
    jobs = [document["resource"] for _, document in call.cloud.store.list("tuningJob", call.name + "/")]
    jobs.sort(key=lambda job: str(job["createTime"]), reverse=True)
    return page(call, "hyperparameterTuningJobs", jobs, "hyperparameter_tuning_job", LISTED)


async def cancel(call: Call) -> JSON:
    document = find(call.cloud, call.name)
    if document["resource"]["state"] not in ENDED:
        document["verdict"] = CANCELLED
        document["resource"]["state"] = "JOB_STATE_CANCELLING"
        _save(call.cloud, document)
        call.cloud.jobs.background(advance(call.cloud, call.name))
    return {}


async def delete(call: Call) -> JSON:
    resource = find(call.cloud, call.name)["resource"]
    if (state := resource["state"]) not in ENDED:
        raise precondition(f"HyperparameterTuningJob {call.name} is in state {state}: cancel it before its deletion.")
    return call.cloud.operations.start(call, "deleteTuningJob", call.location, call.name, {})


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    def also(document: JSON) -> None:
        for trial in document["resource"].get("trials", []):
            cloud.store.delete("customJob", trial["customJob"])

    return {"deleteTuningJob": deletion(cloud, "tuningJob", also)}


METHODS = {
    f"aiplatform.projects.locations.hyperparameterTuningJobs.{name}": handler
    for name, handler in {"create": create, "get": get, "list": list_, "cancel": cancel, "delete": delete}.items()
}
