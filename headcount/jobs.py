"""Jobs of Vertex AI, or of the sandbox: listing them, reading their logs, cancelling them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from headcount.google import Google, GoogleError, Place, place_of
from headcount.results import printable
from headcount.stacks import outputs

# https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.customJobs and
# https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.hyperparameterTuningJobs
KINDS: Final = {"customJobs": "custom", "hyperparameterTuningJobs": "tuning", "batchPredictionJobs": "batch"}
NAME: Final = re.compile(rf"projects/([^/]+)/locations/([a-z0-9-]+)/({'|'.join(KINDS)})/\d+")
ENDED: Final = ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED", "PARTIALLY_SUCCEEDED")
TRIAL: Final = "ml.googleapis.com/trial_id"  # label of a tuning job's log entries
POLL_SECONDS = 5.0  # between two looks at a log; Cloud Logging allows 60 reads a minute and project
LATE_SECONDS: Final = 30.0  # so much later an entry may arrive than its time says


class JobError(GoogleError):
    """A job cannot be listed, read or cancelled; the message says how to repair it."""


@dataclass(frozen=True)
class Job:
    """name: full resource name. kind: custom, tuning or batch. created, ended: RFC 3339, "" where not yet."""

    name: str
    kind: str
    display_name: str
    state: str
    created: str = ""
    ended: str = ""
    why: str = ""

    @property
    def id(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class Line:
    """A line of a log. time: RFC 3339. trial: of a tuning job, or ""."""

    time: str
    text: str
    trial: str = ""

    def __str__(self) -> str:
        said = f"trial {self.trial}: {self.text}" if self.trial else self.text
        return f"{self.time[:19]}Z {printable(said)}"


def of_stack(stack: str) -> Place:
    """Where the jobs of a stack are. Raises StackError where it is not deployed, and JobError."""
    try:
        return place_of(outputs(stack))
    except GoogleError:
        raise JobError(
            f"Stack {stack} has no endpoint among its outputs. Name --project and --region instead."
        ) from None


def job_of(kind: str, found: dict[str, Any]) -> Job:
    """A job as Vertex AI describes it. kind: a key of KINDS."""
    state = str(found.get("state", "")).removeprefix("JOB_STATE_")
    return Job(
        str(found["name"]),
        KINDS[kind],
        str(found.get("displayName", "")),
        state,
        str(found.get("createTime", "")),
        str(found.get("endTime", "")),
        str(found.get("error", {}).get("message", "")),
    )


def lines_of(entry: dict[str, Any]) -> list[Line]:
    """The lines of an entry of Cloud Logging."""
    payload = entry.get("jsonPayload") or {}
    text = entry.get("textPayload") or payload.get("message") or (json.dumps(payload) if payload else "")
    trial = str(entry.get("labels", {}).get(TRIAL, ""))
    return [Line(str(entry.get("timestamp", "")), line, trial) for line in str(text).splitlines() if line.strip()]


def table_text(jobs: Sequence[Job]) -> str:
    """A table, one line a job, as wide as its contents."""
    rows = [("ID", "KIND", "STATE", "CREATED", "ENDED", "NAME")]
    rows += [
        (job.id, job.kind, job.state, job.created[:16], job.ended[:16], printable(job.display_name)) for job in jobs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(line.rstrip() + "\n" for line in lines)


class Jobs(Google):
    """The jobs of one project and region. Raises GoogleError and CredentialsError."""

    def listed(self) -> list[Job]:
        """All jobs, the newest first."""
        found = []
        for kind in KINDS:
            url = f"{self.place.vertex}/v1/projects/{self.place.project}/locations/{self.place.region}/{kind}"
            found += [job_of(kind, job) for job in self.pages("GET", url, kind)]
        return sorted(found, key=lambda job: job.created, reverse=True)

    def find(self, wanted: str) -> Job:
        """A job by its full name, its id, or its display name, of which the newest counts."""
        if match := NAME.fullmatch(wanted):
            return job_of(match[3], self.ask("GET", f"{self.place.vertex}/v1/{wanted}"))
        job = next((job for job in self.listed() if wanted in (job.id, job.display_name)), None)
        if job is None:
            raise JobError(
                f"There is no job {wanted} in {self.place.project}, {self.place.region}: `headcount jobs` lists them."
            )
        return job

    def refreshed(self, job: Job) -> Job:
        return self.find(job.name)

    def cancel(self, job: Job) -> None:
        """Asks Vertex AI to cancel a job, which takes a while."""
        self.ask("POST", f"{self.place.vertex}/v1/{job.name}:cancel", {})

    def log(self, job: Job, *, follow: bool = False) -> Iterator[Line]:
        """The lines of a job's log, oldest first; with `follow`, until the job has ended."""
        wanted = f'resource.type="ml_job" AND resource.labels.job_id="{job.id}"'
        ended = (lambda: self.refreshed(job).has_ended) if follow else None
        for entry in tail(self, lambda: wanted, job.created, ended):
            yield from lines_of(entry)


def tail(
    google: Google, wanted: Callable[[], str], created: str, ended: Callable[[], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """The entries of Cloud Logging that a filter finds, oldest first, each once.

    wanted: the filter, or "" as long as there is nothing to ask for. created: when the first entry can have been
    written, RFC 3339. ended: whether nothing more will be written; None reads what there is.
    """
    seen: set[str] = set()
    since, last = created, ended is None
    while True:
        newest = since
        for entry in _entries(google, wanted(), since):
            if entry.get("insertId") not in seen:
                seen.add(str(entry.get("insertId")))
                newest = max(newest, str(entry.get("timestamp", "")))
                yield entry
        if last or ended is None:
            return
        time.sleep(POLL_SECONDS)
        last = ended()  # one more look after the end, for the last lines
        since = max(created, earlier(newest, LATE_SECONDS))


def _entries(google: Google, wanted: str, since: str) -> Iterator[dict[str, Any]]:
    if not wanted:
        return
    body: dict[str, Any] = {
        "resourceNames": [f"projects/{google.place.project}"],
        # Logging looks at one day only where no time is given.
        "filter": f'{wanted} AND timestamp>="{since}"' if since else wanted,
        "orderBy": "timestamp asc",
        "pageSize": 1000,
    }
    yield from google.pages("POST", f"{google.place.logging}/v2/entries:list", "entries", body)


def earlier(moment: str, seconds: float) -> str:
    """A time of RFC 3339, some seconds earlier; "" of ""."""
    from datetime import datetime, timedelta

    if not moment:
        return ""
    # Python 3.11 reads six digits of a second, and Logging writes nine.
    then = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", moment)) - timedelta(seconds=seconds)
    return then.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
