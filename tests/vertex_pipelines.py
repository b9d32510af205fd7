"""Runs and schedules as values, for the tests of the decisions about them."""

from __future__ import annotations

from typing import Any

from parameter_template import template
from vertex_plugin import PARENT, Wire

from pulumi_vertex.access import Access
from pulumi_vertex.pipelines import PipelineJobType, ScheduleType
from pulumi_vertex.pipelines.specification import resolved
from pulumi_vertex.vertex_api import VertexApi

URN = "urn:pulumi:test::people::vertex:index:PipelineJob::nightly"
ROOT = "gs://a-bucket/pipelines"
JOB = f"{PARENT}/pipelineJobs/count-people-20260101"
SCHEDULE = f"{PARENT}/schedules/123"
JOBS, SCHEDULES = PipelineJobType(), ScheduleType()
VERSION = "https://europe-west4-kfp.pkg.dev/some-project/templates/count-people/sha256:" + "a" * 64


def run(**more: Any) -> Wire:
    """The inputs of a run, as Pulumi keeps them."""
    given = {"template": template(), "parameters": {"folder": "gs://x"}, "pipelineRoot": ROOT, **more}
    return resolved({name: value for name, value in given.items() if value is not None})


def schedule(**more: Any) -> Wire:
    return run(cron="0 3 * * *", timeZone="Europe/Amsterdam", **more)


EVERYTHING: Wire = {
    "parameters": {
        "folder": "gs://x", "epochs": 5, "rate": 0.5, "shuffle": False, "sizes": [1], "options": {"a": "b"},
        "note": "n",
    },
    "enableCaching": False,
    "failurePolicy": "FAIL_FAST",
    "serviceAccount": "pipelines@some-project.iam.gserviceaccount.com",
    "encryptionKey": "projects/p/locations/europe-west4/keyRings/r/cryptoKeys/k",
    "displayName": "Nightly",
    "labels": {"team": "a"},
}  # fmt: skip
TIMES: Wire = {
    "startTime": "2026-01-01T00:00:00Z",
    "endTime": "2030-01-01T00:00:00+01:00",
    "maxRunCount": 10,
    "maxConcurrentRuns": 2,
    "allowQueueing": True,
    "paused": True,
}


def api() -> VertexApi:
    return VertexApi(Access("some-project", "europe-west4"))
