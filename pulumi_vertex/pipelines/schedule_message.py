"""The inputs of a schedule, and Vertex AI's Schedule that is made from them, and read back.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.schedules
"""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

import hashlib
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Required

import pulumi

from ..definition import Field, properties_of
from ..differences import with_defaults
from ..errors import ProblemError
from ..patterns import LABEL_KEY, LABEL_KEY_HINT
from ..vertex_api import VertexApi
from ..wire import Wire
from . import cron, specification, template
from .specification import PipelineInputs

# Schedules have no labels. The job that they make has, and carries these two to each run.
LABEL: Final = "pulumi_schedule"  # the mark by which a repeated create finds its schedule
CLAIM: Final = "pulumi_claim"  # see ownership.py
ACTIVE, PAUSED, COMPLETED = "ACTIVE", "PAUSED", "COMPLETED"
# "The non-empty fields cannot be unset": UpdateScheduleRequest.
NEVER_UNSET: Final = ("startTime", "endTime", "maxRunCount")
REQUEST: Final = "createPipelineJobRequest"


class ScheduleInputs(PipelineInputs, total=False):
    cron: Required[
        Annotated[
            pulumi.Input[str],
            Field(f"When it fires: five fields, {cron.FIELDS}, {cron.EXAMPLE}."),
        ]
    ]
    time_zone: Annotated[
        pulumi.Input[str],
        Field("Time zone of cron, a name of the IANA database such as Europe/Amsterdam.", default=cron.DEFAULT_ZONE),
    ]
    max_concurrent_runs: Annotated[
        pulumi.Input[int],
        Field(
            "Runs that may be under way at the same time. When so many are, the next one is skipped.", low=1, default=1
        ),
    ]
    allow_queueing: Annotated[
        pulumi.Input[bool],
        Field("Whether a run waits, instead of being skipped, while max_concurrent_runs are under way.", default=False),
    ]
    start_time: Annotated[pulumi.Input[str], Field("When it may fire first, as RFC 3339; at once where absent.")]
    end_time: Annotated[pulumi.Input[str], Field("When it fires no more, as RFC 3339; never where absent.")]
    max_run_count: Annotated[
        pulumi.Input[int], Field("Runs that it starts in all; without a limit where absent.", low=1)
    ]
    paused: Annotated[
        pulumi.Input[bool],
        Field("Whether it starts no runs for now. What it misses meanwhile is never made up for.", default=False),
    ]
    display_name: Annotated[
        pulumi.Input[str],
        Field(
            "Name of the schedule and of its runs in the console, the resource's name where absent.",
            pattern=r".{1,128}",
            hint="1 to 128 characters",
        ),
    ]
    labels: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field(
            "Labels of the runs.",
            pattern=rf"(?!({LABEL}|{CLAIM})$){LABEL_KEY}",
            hint=f"{LABEL_KEY_HINT}, and neither {LABEL} nor {CLAIM}",
            high=62,
        ),
    ]


PROPERTIES: Final = properties_of(ScheduleInputs)
PIPELINE: Final = ("template", "templateUri", "enableCaching", "pipelineRoot")  # compared as one thing
# The fields of Vertex AI's that an input is a part of, by its name, where they are not called like it.
_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    **{p.wire: (REQUEST,) for p in properties_of(PipelineInputs)},
    "labels": (REQUEST,),
    "displayName": ("displayName", REQUEST),
    "timeZone": ("cron",),
    "maxConcurrentRuns": ("maxConcurrentRunCount", "maxConcurrentActiveRunCount"),
    "paused": (),  # a method of its own
}


def fields_of(names: Iterable[str]) -> set[str]:
    """The fields of a Schedule that have to be sent when inputs of these names change."""
    return {field for name in names for field in _FIELDS.get(name, (name,))}


FIELDS: Final = fields_of(p.wire for p in PROPERTIES)


def mark_of(urn: str) -> str:
    """16 hexadecimal digits by which a create that was killed finds its own schedule again."""
    return hashlib.sha256(urn.encode()).hexdigest()[:16]


def schedule_of(api: VertexApi, urn: str, inputs: Wire, claim: str, fields: Collection[str]) -> Wire:
    """Some fields of Vertex AI's Schedule. For REQUEST the inputs have to be complete."""
    display_name, most = display_name_of(urn, inputs), inputs.get("maxConcurrentRuns", 1)
    limit = inputs.get("maxRunCount")
    times: Wire = {
        "displayName": display_name,
        "cron": cron.zoned(inputs["cron"], inputs.get("timeZone") or cron.DEFAULT_ZONE),
        # The first counts starts and the second the runs under way. "At the same time" means both.
        "maxConcurrentRunCount": str(most),
        "maxConcurrentActiveRunCount": str(most),
        "allowQueueing": inputs.get("allowQueueing") is True,
        "maxRunCount": str(limit) if limit else None,
        "startTime": inputs.get("startTime"),
        "endTime": inputs.get("endTime"),
    }
    found = {name: value for name, value in times.items() if name in fields and value is not None}
    if REQUEST in fields:
        labels = {**inputs.get("labels", {}), LABEL: mark_of(urn), **({CLAIM: claim} if claim else {})}
        job = {**specification.job_of(inputs), "displayName": display_name, "labels": labels}
        found[REQUEST] = {"parent": api.parent, "pipelineJob": job}
    return found


def inputs_of(there: Wire) -> Wire:
    """The inputs that a Schedule was made from, without those that it has nothing to say of. Raises ProblemError."""
    if REQUEST not in there:
        raise ProblemError("The schedule runs no pipeline, and only such schedules can be imported.")
    job, (expression, zone) = job_in(there), cron.unzoned(there.get("cron", ""))
    labels = {key: value for key, value in job.get("labels", {}).items() if key not in (LABEL, CLAIM)}
    most = there.get("maxRunCount")
    found = {
        **specification.run_of(job),
        "labels": {key: value for key, value in labels.items() if not key.startswith("vertex-ai-pipelines-")},
        "displayName": there.get("displayName"),
        "cron": expression,
        "timeZone": zone,
        "maxConcurrentRuns": int(there.get("maxConcurrentRunCount") or 1),
        "allowQueueing": bool(there.get("allowQueueing")),
        "startTime": there.get("startTime"),
        "endTime": there.get("endTime"),
        "maxRunCount": int(most) if most else None,
        "paused": there.get("state") == PAUSED,
    }
    return {key: value for key, value in found.items() if value not in (None, "", [], {})}


def as_there(inputs: Wire, there: Wire, display_name: str) -> Wire:
    """The inputs with what was changed by hand. What says the same in other words stays as it is."""
    found = inputs_of(there)
    if not inputs:
        # A schedule without a start time of its own is answered with the time at which it was made.
        return {key: value for key, value in found.items() if key != "startTime"}
    mine = {"displayName": display_name, **with_defaults(PROPERTIES, inputs)}
    theirs = with_defaults(PROPERTIES, found)
    same_pipeline = _same_pipeline(inputs, there)
    known: Wire = {}
    for name in (p.wire for p in PROPERTIES):
        if name in PIPELINE:
            same = same_pipeline
        elif name == "startTime" and name not in inputs:
            same = True
        else:
            same = _plain(name, mine.get(name)) == _plain(name, theirs.get(name))
        if name in (source := inputs if same else found):
            known[name] = source[name]
    return known


def _same_pipeline(inputs: Wire, there: Wire) -> bool:
    """Whether a schedule runs the pipeline of the inputs. Of a template in a bucket only its address is known."""
    job = job_in(there)
    root = job.get("runtimeConfig", {}).get("gcsOutputDirectory", "")
    if "template" not in inputs:
        uri = str(inputs.get("templateUri", ""))
        if specification.REPOSITORY in uri and job.get("templateUri", uri) != uri:
            return False
        return bool(inputs.get("pipelineRoot", root) == root)
    spec = template.whole(job.get("pipelineSpec"))
    return bool(specification.spec_of(inputs) == spec and specification.root_of(inputs) == root)


def _plain(name: str, value: Any) -> Any:
    """A value for comparison: a moment is the same however it is written."""
    if name in ("startTime", "endTime") and value:
        return cron.moment(str(value))
    return value


def changeable(there: Wire, inputs: Wire) -> bool:
    """Whether a schedule that exists can be brought to the inputs: it has not ended, and loses no limit."""
    unset = any(there.get(name) and not inputs.get(name) for name in ("endTime", "maxRunCount"))
    # Vertex AI gives each schedule a start time. Only one to come is a limit.
    starts = there.get("startTime")
    waits = bool(starts) and not inputs.get("startTime") and cron.moment(str(starts)) > datetime.now(UTC)
    return there.get("state") in (ACTIVE, PAUSED) and not unset and not waits


def job_in(there: Wire) -> Wire:
    job: Wire = there.get(REQUEST, {}).get("pipelineJob", {})
    return job


def full_name(api: VertexApi, there: Wire) -> str:
    """The full name of a schedule, with the project as it is configured: answers give its number."""
    return f"{api.parent}/schedules/{str(there['name']).rpartition('/')[2]}"


def display_name_of(urn: str, inputs: Wire) -> str:
    return str(inputs.get("displayName") or urn.rpartition("::")[2][:128])
