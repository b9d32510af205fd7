"""Schedules of pipeline runs: their methods, and the runs that they start.

https://docs.cloud.google.com/vertex-ai/docs/pipelines/schedule-pipeline-run
A schedule is a document of the kind `schedule`: `resource`, as the API shows it, and `waiting`, the times of runs that
are queued. `tick` decides all that is due from the document and the sandbox's clock, so a test puts the clock forward.
"""

import asyncio
import datetime
import logging
import random
import re
import zoneinfo

from cronsim import CronSim, CronSimError

from sandbox import clock
from sandbox.context import Call, Cloud
from sandbox.conventions import check_display_name, page, update_mask
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.operations import OperationKind
from sandbox.pipelines.runs import ENDED
from sandbox.store import JSON
from sandbox.vertex_custom_jobs import deletion
from sandbox.vertex_pipeline_jobs import begin, check_supported_in, prepare

log = logging.getLogger("sandbox")

PERIOD = 0.2  # seconds between two looks at the clock, which a test may have put forward
REQUEST = "createPipelineJobRequest"
MUTABLE = (
    "displayName",
    "cron",
    "startTime",
    "endTime",
    "maxRunCount",
    "maxConcurrentRunCount",
    "maxConcurrentActiveRunCount",
    "allowQueueing",
    REQUEST,
)
LISTED = ("displayName", "state", "createTime", "startTime", "endTime", "nextRunTime", REQUEST)
ORDERED = ("createTime", "startTime", "endTime", "nextRunTime")


# -------------------------------------------------------------------------------------------------- when runs are due


def _zone(cron: str) -> tuple[zoneinfo.ZoneInfo, str]:
    """The time zone and the five fields of a cron text such as `TZ=Europe/Amsterdam 0 3 * * *`."""
    match = re.fullmatch(r"(?:(?:CRON_)?TZ=(\S+)\s+)?(.*)", cron.strip())
    assert match is not None
    try:
        return zoneinfo.ZoneInfo(match[1] or "UTC"), match[2]
    except (zoneinfo.ZoneInfoNotFoundError, ValueError):
        raise invalid(f'Invalid cron "{cron}": {match[1]} is no time zone of the IANA database.') from None


def next_time(cron: str, after: float) -> float | None:
    """When a cron text is next due after a time, both in seconds since 1970; None where it never is.

    Raises INVALID_ARGUMENT for a text that is none.
    """
    zone, fields = _zone(cron)
    if len(fields.split()) != 5:
        raise invalid(f'Invalid cron "{cron}": minute, hour, day of month, month and day of week are expected.')
    try:
        found = next(CronSim(fields, datetime.datetime.fromtimestamp(after, zone)), None)
    except CronSimError as error:
        raise invalid(f'Invalid cron "{cron}": {error}.') from None
    return found.timestamp() if found else None


def next_run(resource: JSON, after: float) -> str:
    """nextRunTime of a schedule, or "" where no further run is due before its end."""
    earliest = clock.seconds(resource["startTime"]) - 1e-6
    due = next_time(resource["cron"], max(after, earliest))
    if due is None or ("endTime" in resource and due >= clock.seconds(resource["endTime"])):
        return ""
    return clock.rfc3339(due)


def has_run_enough(resource: JSON) -> bool:
    most = int(resource.get("maxRunCount", 0))
    return most > 0 and int(resource.get("startedRunCount", 0)) >= most


# ------------------------------------------------------------------------------------------------------------ running


async def watch(cloud: Cloud) -> None:
    """Starts the runs that are due, until the sandbox stops."""
    while True:
        await asyncio.sleep(PERIOD)
        try:
            for name, document in cloud.store.list("schedule"):
                if document["resource"]["state"] == "ACTIVE":
                    tick(cloud, name, clock.time())
        except Exception:
            log.exception("schedules")


def resume(cloud: Cloud) -> None:
    """At start: skips the runs that were missed while the sandbox did not run, unless they are to be caught up."""
    now = clock.time()
    for name, document in cloud.store.list("schedule"):
        resource = document["resource"]
        missed = "nextRunTime" in resource and clock.seconds(resource["nextRunTime"]) < now
        if resource["state"] == "ACTIVE" and missed and not resource.get("catchUp"):
            _plan(resource, now)
            _save(cloud, name, document)


def tick(cloud: Cloud, name: str, now: float) -> None:
    """Starts the runs of one schedule that are due at a time, in seconds since 1970."""
    while (document := cloud.store.get("schedule", name)) and document["resource"]["state"] == "ACTIVE":
        resource, waiting = document["resource"], document["waiting"]
        due = resource.get("nextRunTime", "")
        is_due = bool(due) and clock.seconds(due) <= now
        active = _active(cloud, name)
        most = int(resource.get("maxConcurrentActiveRunCount", 0))
        room = not most or active < most
        if has_run_enough(resource):
            pass
        elif waiting and room:
            _start(cloud, document, waiting.pop(0))
            _save(cloud, name, document)
            continue
        elif is_due:
            _plan(resource, clock.seconds(due))
            if room:
                _start(cloud, document, due)
            elif resource.get("allowQueueing"):
                waiting.append(due)
            else:
                said = f"Skipped: {active} runs are active, as many as max_concurrent_active_run_count allows."
                resource["lastScheduledRunResponse"] = {"scheduledRunTime": due, "runResponse": said}
            _save(cloud, name, document)
            continue
        if has_run_enough(resource) or ("endTime" in resource and now >= clock.seconds(resource["endTime"])):
            resource["state"] = "COMPLETED"
            resource.pop("nextRunTime", None)
            document["waiting"] = []
            _save(cloud, name, document)
        return


def _active(cloud: Cloud, name: str) -> int:
    jobs = (document["resource"] for _, document in cloud.store.list("pipelineJob", _location(name) + "/"))
    return sum(job.get("scheduleName") == name and job["state"] not in ENDED for job in jobs)


def _location(name: str) -> str:
    return "/".join(name.split("/")[:4])


def _plan(resource: JSON, after: float) -> None:
    resource.pop("nextRunTime", None)
    if due := next_run(resource, after):
        resource["nextRunTime"] = due


def _start(cloud: Cloud, document: JSON, due: str) -> None:
    """Starts a run, and notes the answer in the resource, also where the request is refused."""
    resource = document["resource"]
    request: JSON = resource[REQUEST]
    try:
        location = request["parent"]
        prepared = prepare(cloud, location, request["pipelineJob"])
        name = prepared[0]["pipelineSpec"]["pipelineInfo"]["name"]
        job_id = f"{name[:80]}-{due[:19].translate({ord(c): None for c in '-:T'})}-{random.randrange(10**6):06}"
        job_id = job_id if job_id[0].isalpha() else f"run-{job_id}"
        made = begin(cloud, location, job_id, prepared, schedule=resource["name"], scheduled=due)
        said = f"Started {made['name']}."
        resource["startedRunCount"] = str(int(resource.get("startedRunCount", 0)) + 1)
    except GoogleError as error:
        said = f"{error.status}: {error.message}"
    resource["lastScheduledRunResponse"] = {"scheduledRunTime": due, "runResponse": said}


def _save(cloud: Cloud, name: str, document: JSON) -> None:
    document["resource"]["updateTime"] = clock.now()
    with cloud.store.transaction():
        cloud.store.put("schedule", name, document)


# ------------------------------------------------------------------------------------------------------------ methods


def _find(call: Call) -> JSON:
    document = call.cloud.store.get("schedule", call.name)
    if not document:
        raise not_found(f"Schedule {call.name} is not found.")
    return document


def _check(call: Call, resource: JSON, after: float) -> None:
    """Raises INVALID_ARGUMENT for what is wrong in a schedule whose next run is after a time."""
    check_display_name(resource)
    check_supported_in(resource, ("createNotebookExecutionJobRequest",), "schedule")
    if not resource.get("cron"):
        raise invalid("Required field cron is not set.")
    for name, least in (("maxConcurrentRunCount", 1), ("maxRunCount", 0), ("maxConcurrentActiveRunCount", 0)):
        if int(resource.get(name, 0)) < least:
            text = re.sub("[A-Z]", lambda m: "_" + m[0].lower(), name)
            raise invalid(f"{text} must be at least {least or 1}; it is {resource.get(name, 0)}.")
    if "endTime" in resource and clock.seconds(resource["endTime"]) <= clock.seconds(resource["startTime"]):
        raise invalid(f"end_time {resource['endTime']} must be after start_time {resource['startTime']}.")
    if not next_run(resource, after):
        end = f" before end_time {resource['endTime']}" if "endTime" in resource else ""
        raise invalid(f'The schedule would never start a run: cron "{resource["cron"]}" is due at no time{end}.')
    request: JSON = resource.get(REQUEST, {})
    if not request.get("pipelineJob"):
        raise invalid("Required field create_pipeline_job_request.pipeline_job is not set.")
    if request.get("pipelineJobId"):
        raise invalid("create_pipeline_job_request.pipeline_job_id can not be set: each run has an id of its own.")
    request["parent"] = call.cloud.projects.by_id(request.get("parent", ""))
    if request["parent"] != call.location:
        raise invalid(f"create_pipeline_job_request.parent must be {call.location}; it is {request['parent']}.")
    prepare(call.cloud, call.location, request["pipelineJob"])


async def create(call: Call) -> JSON:
    now = clock.time()
    resource: JSON = {k: v for k, v in call.body.items() if k in MUTABLE or k == "createNotebookExecutionJobRequest"}
    resource.setdefault("startTime", clock.rfc3339(now))
    _check(call, resource, now)
    made = {
        **resource,
        "name": f"{call.location}/schedules/{random.randrange(10**18, 9 * 10**18)}",
        "state": "ACTIVE",
        "createTime": clock.rfc3339(now),
        "nextRunTime": next_run(resource, now),
    }
    _save(call.cloud, made["name"], {"resource": made, "waiting": []})
    return made


async def get(call: Call) -> JSON:
    resource: JSON = _find(call)["resource"]
    return resource


async def list_(call: Call) -> JSON:
    """The schedules, the newest first."""
    found = [document["resource"] for _, document in call.cloud.store.list("schedule", call.name + "/")]
    found.sort(key=lambda one: str(one["createTime"]), reverse=True)
    return page(call, "schedules", found, "schedule", LISTED, ORDERED)


async def patch(call: Call) -> JSON:
    document = _find(call)
    resource, now = dict(document["resource"]), clock.time()
    if resource["state"] == "COMPLETED":
        raise precondition(f"Schedule {call.name} is completed: only an active or a paused one can be updated.")
    for path in update_mask(call.query):
        name = path.partition(".")[0]
        if name not in MUTABLE:
            raise invalid(f"Field {path} of a schedule can not be updated.")
        resource.pop(name, None)
        if name in call.body:
            resource[name] = call.body[name]
    resource.setdefault("startTime", resource["createTime"])
    _check(call, resource, now)
    if resource["state"] == "ACTIVE":
        _plan(resource, now)
    # "All unstarted runs before the update time will be skipped".
    _save(call.cloud, call.name, {"resource": resource, "waiting": []})
    return resource


async def pause(call: Call) -> JSON:
    document = _find(call)
    resource = document["resource"]
    if resource["state"] != "ACTIVE":
        raise precondition(f"Schedule {call.name} is in state {resource['state']}: only an active one can be paused.")
    resource |= {"state": "PAUSED", "lastPauseTime": clock.now()}
    document["paused"] = resource.pop("nextRunTime", "")
    _save(call.cloud, call.name, document)
    return {}


async def resume_(call: Call) -> JSON:
    document = _find(call)
    resource, now = document["resource"], clock.time()
    if resource["state"] != "PAUSED":
        raise precondition(f"Schedule {call.name} is in state {resource['state']}: only a paused one can be resumed.")
    resource |= {"state": "ACTIVE", "lastResumeTime": clock.rfc3339(now)}
    resource.pop("catchUp", None)
    if call.body.get("catchUp"):
        resource["catchUp"] = True
    if resource.get("catchUp") and document.get("paused"):
        resource["nextRunTime"] = document["paused"]  # "having a next_run_time in the past": the missed runs come first
    else:
        _plan(resource, now)
    _save(call.cloud, call.name, document)
    return {}


async def delete(call: Call) -> JSON:
    """Runs that were started go on."""
    _find(call)
    return call.cloud.operations.start(call, "deleteSchedule", call.location, call.name, {})


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    return {"deleteSchedule": deletion(cloud, "schedule")}


_HANDLERS = {"create": create, "get": get, "list": list_, "patch": patch, "delete": delete}
METHODS = {
    f"aiplatform.projects.locations.schedules.{name}": handler
    for name, handler in {**_HANDLERS, "pause": pause, "resume": resume_}.items()
}
