"""Pipeline jobs of Vertex AI, or of the sandbox: starting, listing and reading them, and their schedules.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.pipelineJobs
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from headcount import jobs
from headcount.google import Google, GoogleError, Place, place_of
from headcount.jobs import Line, lines_of
from headcount.pipeline_graph import ENDED, Node, flat, graph
from headcount.pipeline_template import Template, TemplateError, read

NAME: Final = re.compile(r"projects/([^/]+)/locations/([a-z0-9-]+)/pipelineJobs/[a-z][-a-z0-9]{0,127}")
ID: Final = re.compile(r"[a-z][-a-z0-9]{0,127}")
EXPERIMENT: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
REGISTRY: Final = re.compile(r"https://([a-z0-9-]+)-kfp\.pkg\.dev/(.+)")
FOLDER: Final = "pipelines"  # of a stack's bucket for models, where the stack has no root for pipelines
TEMPLATES: Final = "templates"  # of the same bucket; infra/pipelines.py keeps the steps from writing to it
LISTED: Final = "name,displayName,state,createTime,startTime,endTime,scheduleName,error"  # without the specification
POLL_SECONDS = 5.0  # between two looks at a job
PAUSES = (1.0, 4.0)  # seconds before each further try of a request whose answer was lost
CONTEXT_SECONDS = 600.0  # for which a new job may have no context yet
ADDRESSES = "https://…-kfp.pkg.dev/PROJECT/REPOSITORY/NAME/VERSION"


class PipelineError(GoogleError):
    """A pipeline job cannot be started or read; the message says how to repair it."""


@dataclass(frozen=True)
class Target:
    """Where the pipelines of a stack run.

    root: gs:// folder of their outputs. account: the service account of the tasks; "" for the project's default.
    """

    place: Place
    root: str
    account: str = ""


@dataclass(frozen=True)
class Run:
    """A pipeline job in a list. created, started, ended: RFC 3339, "" where not yet. schedule: its full name or ""."""

    name: str
    display_name: str
    state: str
    created: str = ""
    started: str = ""
    ended: str = ""
    schedule: str = ""
    error: str = ""

    @property
    def id(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


def target(found: dict[str, Any]) -> Target:
    """Where pipelines run, from a stack's outputs. Raises GoogleError."""
    place = place_of(found)
    bucket = str(found.get("modelBucket", ""))
    root = str(found.get("pipelineRoot") or (bucket and f"{bucket}/{FOLDER}"))
    if not root:
        raise PipelineError("The stack has no bucket for the outputs of pipelines yet: run `pulumi up` first.")
    return Target(place, root, str(found.get("pipelineAccount") or ""))


def of_stack(found: dict[str, Any]) -> str:
    """The address of the template that a stack with these outputs has. Raises PipelineError."""
    if not found.get("pipelineTemplate"):
        raise PipelineError("The stack has no pipeline: name a template, or put `pipeline` into the stack's file.")
    return str(found["pipelineTemplate"])


def run_of(found: dict[str, Any]) -> Run:
    """A pipeline job as Vertex AI describes it."""
    return Run(
        str(found["name"]),
        str(found.get("displayName", "")),
        str(found.get("state", "")).removeprefix("PIPELINE_STATE_"),
        str(found.get("createTime", "")),
        str(found.get("startTime", "")),
        str(found.get("endTime", "")),
        str(found.get("scheduleName", "")),
        str(found.get("error", {}).get("message", "")),
    )


def new_id(name: str) -> str:
    """An id for a job of this name, which no other job has."""
    word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    word = word if word[:1].isalpha() else f"run-{word}".rstrip("-")
    return f"{word[:100].rstrip('-')}-{datetime.now(UTC):%Y%m%d%H%M%S}-{secrets.token_hex(2)}"


def request(
    template: Template, values: dict[str, Any], to: Target, name: str, labels: dict[str, str] | None = None
) -> dict[str, Any]:
    """The body that starts a job, as Google's client sends it."""
    body: dict[str, Any] = {
        "displayName": name[:128],
        "pipelineSpec": template.spec,
        "runtimeConfig": {"gcsOutputDirectory": to.root, "parameterValues": values},
    }
    if template.uri:
        body["templateUri"] = template.uri
    if to.account:
        body["serviceAccount"] = to.account
    return body | ({"labels": labels} if labels else {})


def console(run: Run, place: Place) -> str:
    """The address of the job's page in Google's console; "" on the sandbox, which has none."""
    if place.base:
        return ""
    return (
        f"https://console.cloud.google.com/vertex-ai/locations/{place.region}/pipelines/runs/{run.id}"
        f"?project={place.project}"
    )


def stored_name(template: Template, content: bytes) -> str:
    """The name of a template's object in a bucket: the same content has the same name."""
    word = re.sub(r"[^a-z0-9]+", "-", template.name.lower()).strip("-")
    return f"{TEMPLATES}/{word}-{hashlib.sha256(content).hexdigest()[:16]}.yaml"


class Pipelines(Google):
    """The pipeline jobs of one project and region. Raises GoogleError and CredentialsError."""

    @property
    def _parent(self) -> str:
        return f"projects/{self.place.project}/locations/{self.place.region}"

    def _url(self, name: str) -> str:
        return f"{self.place.vertex}/v1/{name}"

    # --- templates

    def template(self, source: str) -> Template:
        """The template at a gs:// address or in a KFP repository. Raises TemplateError, too."""
        if match := re.fullmatch(r"gs://([^/]+)/(.+)", source):
            return read(self.download(match[1], match[2]), source)
        if match := REGISTRY.fullmatch(source):
            base = self.place.base  # the sandbox has Artifact Registry's hosts as paths of its own
            return read(self.content(f"{base}/kfp/{match[1]}/{match[2]}" if base else source), source, source)
        raise TemplateError(f"{source} is no address of a template; give a file, gs://BUCKET/NAME, or {ADDRESSES}.")

    def download(self, bucket: str, name: str) -> bytes:
        from urllib.parse import quote

        base = self.place.base or "https://storage.googleapis.com"
        return self.content(f"{base}/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media")

    # --- jobs

    def start(self, body: dict[str, Any], job_id: str) -> Run:
        """Starts a job once, also where an answer is lost, because the caller chooses its id."""
        url = self._url(f"{self._parent}/pipelineJobs")
        for pause in (*PAUSES, None):
            try:
                return run_of(self.ask("POST", url, body, pipelineJobId=job_id))
            except GoogleError as error:
                if error.status == 409 and pause != PAUSES[0]:  # the request before has started it
                    return run_of(self.get(job_id))
                if error.status not in (0, 429, 500, 502, 503, 504):
                    raise
                if pause is None:
                    raise PipelineError(
                        f"{error}. Whether {job_id} has started is not known: `headcount pipelines show {job_id}` "
                        "tells it.",
                        error.status,
                    ) from None
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def get(self, job_id: str) -> dict[str, Any]:
        return self.ask("GET", self._url(f"{self._parent}/pipelineJobs/{job_id}"))

    def listed(self) -> Iterator[Run]:
        """All jobs, the newest first, page after page."""
        url = self._url(f"{self._parent}/pipelineJobs")
        query = {"orderBy": "create_time desc", "pageSize": "100", "readMask": LISTED}
        return map(run_of, self.pages("GET", url, "pipelineJobs", None, **query))

    def find(self, wanted: str) -> dict[str, Any]:
        """A job by its full name, its id, or its display name, of which the newest counts."""
        if NAME.fullmatch(wanted):
            return self.ask("GET", self._url(wanted))
        if ID.fullmatch(wanted):
            try:
                return self.get(wanted)
            except GoogleError as error:
                if error.status != 404:
                    raise
        for run in self.listed():
            if run.display_name == wanted:
                return self.get(run.id)
        raise PipelineError(
            f"There is no pipeline job {wanted} in {self.place.project}, {self.place.region}: "
            "`headcount pipelines list` lists them."
        )

    def schedules(self) -> list[dict[str, Any]]:
        """All schedules of pipelines."""
        found = self.pages("GET", self._url(f"{self._parent}/schedules"), "schedules")
        return [one for one in found if "createPipelineJobRequest" in one]

    def changes(self, job_id: str) -> Iterator[tuple[str, Node]]:
        """Each change of a task's state until the job has ended: its path, and the task as it is then."""
        known: dict[str, str] = {}
        while True:
            job = self.get(job_id)
            for path, node in flat(graph(job)):
                if node.state not in (known.get(path, "waiting"), "not run"):
                    known[path] = node.state
                    yield path, node
            if run_of(job).has_ended:
                return
            time.sleep(POLL_SECONDS)

    # --- logs

    def log(self, job_id: str, task: str = "", *, follow: bool = False) -> Iterator[tuple[str, Line]]:
        """The lines of a job's tasks with the path of their task, oldest first; with `follow`, until it has ended.

        task: the name or path of a task, of which a group has those in it; "" for all. Raises PipelineError if there
        is none.
        """
        job = self.get(job_id)
        names: dict[str, str] = {}  # path by custom job

        def wanted() -> str:
            names.update({name.rpartition("/")[2]: path for path, node in of_task(job, task) for name in node.jobs})
            one = " OR ".join(f'resource.labels.job_id="{name}"' for name in names)
            return f'resource.type="ml_job" AND ({one})' if names else ""

        def ended() -> bool:
            nonlocal job
            job = self.get(job_id)
            return run_of(job).has_ended

        for entry in jobs.tail(self, wanted, str(job.get("createTime", "")), ended if follow else None):
            path = names.get(str(entry.get("resource", {}).get("labels", {}).get("job_id", "")), "")
            for line in lines_of(entry):
                yield path, line

    # --- experiments

    def experiment(self, name: str) -> str:
        """The full name of an experiment of Vertex AI, which is made where there is none.

        An experiment is a context of the project's metadata store:
        https://cloud.google.com/vertex-ai/docs/experiments/intro-vertex-ai-experiments
        """
        store = f"{self._parent}/metadataStores/default"
        body = {
            "displayName": name,
            "schemaTitle": "system.Experiment",
            "schemaVersion": "0.0.1",
            "metadata": {"experiment_deleted": False},
        }
        self._ensure_store(store)
        try:
            found = self.ask("POST", self._url(f"{store}/contexts"), body, contextId=name)
        except GoogleError as error:
            if error.status != 409:
                raise
            found = self.ask("GET", self._url(f"{store}/contexts/{name}"))
        if found.get("schemaTitle") != "system.Experiment":
            raise PipelineError(
                f"{name} is the name of another context ({found.get('schemaTitle')}): take another one."
            )
        return str(found["name"])

    def _ensure_store(self, store: str) -> None:
        """The project's metadata store exists since its first pipeline or experiment, and is made by either."""
        try:
            self.ask("GET", self._url(store))
            return
        except GoogleError as error:
            if error.status != 404:
                raise
        parent, _, name = store.partition("/metadataStores/")
        operation = self.ask("POST", self._url(f"{parent}/metadataStores"), {}, metadataStoreId=name)
        while not operation.get("done"):
            time.sleep(POLL_SECONDS)
            operation = self.ask("GET", self._url(str(operation["name"])))
        if message := operation.get("error", {}).get("message"):
            raise PipelineError(f"The metadata store of {self.place.project} cannot be made: {message}")

    def associate(self, job_id: str, experiment: str) -> None:
        """Puts a job into an experiment. Vertex AI makes the job's own context while it starts."""
        end = time.monotonic() + CONTEXT_SECONDS
        while True:
            job = self.get(job_id)
            context = job.get("jobDetail", {}).get("pipelineRunContext", {}).get("name")
            if context:
                self.ask("POST", self._url(f"{experiment}:addContextChildren"), {"childContexts": [context]})
                return
            if run_of(job).has_ended or time.monotonic() > end:
                raise PipelineError(f"{job_id} is not in the experiment, because Vertex AI made no context for it.")
            time.sleep(POLL_SECONDS)


def of_task(job: dict[str, Any], task: str) -> list[tuple[str, Node]]:
    """The nodes of a task by name or path, and of those in it; of all tasks for "". Raises PipelineError."""
    nodes = list(flat(graph(job)))
    if not task:
        return nodes
    paths = [path for path, node in nodes if task in (path, node.name)]
    if not paths:
        known = ", ".join(path for path, node in nodes if not node.nodes) or "none yet"
        raise PipelineError(f"{job['name'].rpartition('/')[2]} has no task {task}. It has: {known}.")
    return [(path, node) for path, node in nodes if any(re.match(rf"{re.escape(p)}($|[.\[])", path) for p in paths)]
