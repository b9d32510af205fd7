"""The output of jobs as log entries.

The entries of Vertex AI's training service are on record: those of the service itself are texts with the task name
`service`; a line of a container is a jsonPayload with `message`, `levelname` and `attrs.tag`, INFO from stdout and
ERROR from stderr. A line that is a JSON object is the jsonPayload itself, without the fields that stand elsewhere in
the entry: https://docs.cloud.google.com/logging/docs/agent/logging/configuration#special-fields
"""

import contextlib
import itertools
import json
import time
from typing import Any

from sandbox.clock import now
from sandbox.conventions import nanoseconds
from sandbox.errors import GoogleError
from sandbox.projects import project_number
from sandbox.runner import Line
from sandbox.store import JSON

# https://cloud.google.com/logging/docs/reference/v2/rest/v2/LogEntry#LogSeverity
SEVERITIES = {
    "DEFAULT": 0,
    "DEBUG": 100,
    "INFO": 200,
    "NOTICE": 300,
    "WARNING": 400,
    "ERROR": 500,
    "CRITICAL": 600,
    "ALERT": 700,
    "EMERGENCY": 800,
}
# What loggers of several languages say instead.
ALIASES = {"WARN": "WARNING", "FATAL": "CRITICAL", "TRACE": "DEBUG", "ERR": "ERROR"}
SPECIAL = {
    "logging.googleapis.com/labels": "labels",
    "logging.googleapis.com/insertId": "insertId",
    "logging.googleapis.com/trace": "trace",
    "logging.googleapis.com/spanId": "spanId",
}


# Entries of the same time are listed by their insertId, so that it grows as they are written.
_numbers = itertools.count()


def severity_of(text: Any) -> str:
    """The severity that a logger's word stands for, or ""."""
    name = ALIASES.get(str(text).upper(), str(text).upper())
    return name if name in SEVERITIES else ""


def _entry(job: str, task: str, trial_id: str, when: str) -> JSON:
    project, job_id = job.split("/")[1], job.rpartition("/")[2]
    return {
        "insertId": f"{time.time_ns():016x}{next(_numbers):08x}",
        "logName": f"projects/{project}/logs/"
        + (task if task != "service" else f"ml.googleapis.com%2F{project_number(project)}%2F{job_id}"),
        "resource": {"type": "ml_job", "labels": {"job_id": job_id, "project_id": project, "task_name": task}},
        "labels": {"ml.googleapis.com/job_id/log_area": "root", "ml.googleapis.com/trial_id": trial_id},
        "timestamp": when,
        "receiveTimestamp": now(),
        "severity": "INFO",
    }


def of_service(job: str, text: str, severity: str = "INFO") -> JSON:
    """A log entry of the training service about a job."""
    return _entry(job, "service", "", now()) | {"severity": severity, "textPayload": text}


def of_pipeline(job: str, state: str, error: str = "") -> JSON:
    """The log entry of a pipeline job that has come to a state.

    https://docs.cloud.google.com/vertex-ai/docs/pipelines/logging
    """
    project, location, job_id = (job.split("/")[n] for n in (1, 3, 5))
    labels = {"pipeline_job_id": job_id, "location": location, "resource_container": project_number(project)}
    payload = {"pipelineName": job, "state": state, **({"error": error} if error else {})}
    return {
        "insertId": f"{time.time_ns():016x}{next(_numbers):08x}",
        "logName": f"projects/{project}/logs/aiplatform.googleapis.com%2Fpipeline_job_events",
        "resource": {"type": "aiplatform.googleapis.com/PipelineJob", "labels": labels},
        "timestamp": now(),
        "receiveTimestamp": now(),
        "severity": "ERROR" if error and state == "PIPELINE_STATE_FAILED" else "INFO",
        "jsonPayload": payload,
    }


def of_line(job: str, replica: str, line: Line, trial_id: str = "") -> JSON:
    """The log entry of a line that a job's container wrote."""
    entry = _entry(job, replica, trial_id, line.time)
    entry["severity"] = "ERROR" if line.stream == "stderr" else "INFO"
    try:
        payload = json.loads(line.text) if line.text.startswith("{") else None
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        plain = {"attrs": {"tag": replica}, "levelname": entry["severity"], "message": line.text}
        return entry | {"jsonPayload": plain}
    if severity := severity_of(payload.get("severity")):
        entry["severity"] = severity
        del payload["severity"]
    for name, target in SPECIAL.items():
        if name in payload and isinstance(payload[name], dict if target == "labels" else str):
            value = payload.pop(name)
            entry[target] = {**entry["labels"], **value} if target == "labels" else value
    if isinstance(payload.get("time"), str):
        with contextlib.suppress(GoogleError):
            nanoseconds(payload["time"])
            entry["timestamp"] = payload.pop("time")
    return entry | {"jsonPayload": payload}
