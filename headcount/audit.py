"""Who changed a resource last, from Cloud Audit Logs.

Admin Activity logs are always on and kept for 400 days; reading them needs roles/logging.viewer.
https://cloud.google.com/logging/docs/audit
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from headcount.drift import NAMES, Author, Finding
from headcount.google import Google

ACTIVITY: Final = "cloudaudit.googleapis.com%2Factivity"


def wanted(finding: Finding, project: str, since: str) -> str:
    """The filter for the changes of a finding's resource since a time (RFC 3339).

    https://cloud.google.com/logging/docs/view/logging-query-language
    """
    return " AND ".join(
        [
            f'logName="projects/{project}/logs/{ACTIVITY}"',
            f'timestamp>"{since}"',
            f"({' OR '.join(_names(finding))})",
        ]
    )


def _names(finding: Finding) -> list[str]:
    """What tells the resource in an entry: its name there has the project's number or id, or a number of its own."""
    id_ = finding.id
    called = NAMES.get(finding.type, "")
    if called == "access to the bucket":
        return [_has(f"buckets/{id_.split('/')[1]}")]
    if called.startswith("access to the "):
        id_ = id_.partition("/roles/")[0]
    if called == "bucket":
        return [_has(f"buckets/{id_}")]
    if called == "service account":
        email = id_.rpartition("/")[2]
        return [f'resource.labels.email_id="{email}"', _has(email)]
    last = "/".join(id_.split("/")[-2:]).partition("@")[0]
    return [_has(last.rpartition("/")[2] if called == "API" else last)]


def _has(text: str) -> str:
    return f'protoPayload.resourceName:"{text}"'


def author(entry: Mapping[str, Any]) -> Author:
    """The caller of an entry's change."""
    payload = entry.get("protoPayload") or {}
    who = (payload.get("authenticationInfo") or {}).get("principalEmail") or "a caller without a name"
    return Author(str(who), str(payload.get("methodName", "")), str(entry.get("timestamp", "")))


def last_change(google: Google, finding: Finding, since: str) -> Author | None:
    """The last change of a resource since a time, None where the log has none. Raises GoogleError."""
    project = google.place.project
    body = {
        "resourceNames": [f"projects/{project}"],
        "filter": wanted(finding, project, since),
        "orderBy": "timestamp desc",
        "pageSize": 1,
    }
    entries = google.ask("POST", f"{google.place.logging}/v2/entries:list", body).get("entries") or []
    return author(entries[0]) if entries else None
