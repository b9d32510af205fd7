"""The log of a job in Cloud Logging."""

from __future__ import annotations

import json
from typing import Final

from ..errors import ProblemError
from ..vertex_api import VertexApi
from ..wire import Wire

SOURCE: Final = "ml_job"  # https://cloud.google.com/logging/docs/api/v2/resource-list#resource-types
SERVICE: Final = "service"  # the task name of entries that Vertex AI itself writes
TRIAL: Final = "ml.googleapis.com/trial_id"  # label of a log entry of a tuning job


def last_lines(api: VertexApi, job_id: str, count: int, since: str, *more: str) -> list[str]:
    """The last lines of a job's log, oldest first. Raises ProblemError.

    since: RFC 3339, when the job was made. more: further conditions of Logging's query language.
    """
    wanted = [f'resource.type="{SOURCE}"', f'resource.labels.job_id="{job_id}"', *more]
    if since:
        wanted.append(f'timestamp>="{since}"')  # Logging looks at one day only where no time is given
    body: Wire = {"filter": " AND ".join(wanted), "orderBy": "timestamp desc", "pageSize": count}
    lines = [line for entry in api.log_entries(body) for line in reversed(lines_of(entry))]
    return lines[:count][::-1]


def last_line(api: VertexApi, job_id: str, since: str) -> str:
    """The last line that a job's containers have written, "" where it cannot be read: no reason to stop."""
    try:
        return next(iter(last_lines(api, job_id, 1, since, f'resource.labels.task_name!="{SERVICE}"')), "")
    except ProblemError:
        return ""


def lines_of(entry: Wire) -> list[str]:
    """The lines of a log entry, each with its trial where it has one."""
    said = entry.get("textPayload")
    if said is None:
        payload = entry.get("jsonPayload") or entry.get("protoPayload") or {}
        said = payload.get("message") or json.dumps(payload, sort_keys=True)
    trial = entry.get("labels", {}).get(TRIAL)
    return [f"trial {trial}: {line}" if trial else line for line in str(said).splitlines() if line.strip()]
