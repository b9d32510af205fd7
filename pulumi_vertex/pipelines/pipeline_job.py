"""`PipelineJob`: a compiled pipeline that runs once on Vertex AI.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.pipelineJobs
"""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Final, TypedDict, Unpack

import pulumi

from ..checks import Failures
from ..definition import PACKAGE, Definition, Field, outputs_of, properties_of
from ..engine_call import EngineCall
from ..jobs.job import Job, JobType
from ..jobs.specification import LABEL
from ..patterns import LABEL_KEY, LABEL_KEY_HINT
from ..resource import State
from ..vertex_api import VertexApi
from ..wire import Wire
from . import specification, template
from .specification import PipelineInputs

MOST_LOGS: Final = 3  # of tasks that have failed
ENDED: Final = ("SUCCEEDED", "FAILED", "SKIPPED", "NOT_TRIGGERED", "CANCELLED")


class PipelineJobInputs(PipelineInputs, total=False):
    triggers: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field("Values that make the pipeline run anew when they change and that it does not see."),
    ]
    display_name: Annotated[
        pulumi.Input[str],
        Field(
            "Name in the console, the resource's name where absent. Vertex AI cannot change it: another one takes "
            "effect when the pipeline runs anew.",
            pattern=r".{1,128}",
            hint="1 to 128 characters",
        ),
    ]
    labels: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field(
            "Labels of the run. Vertex AI cannot change them: other ones take effect when the pipeline runs anew.",
            pattern=rf"(?!{LABEL}$){LABEL_KEY}",
            hint=f"{LABEL_KEY_HINT}, and not {LABEL}",
            high=63,
        ),
    ]
    wait: Annotated[
        pulumi.Input[bool],
        Field("Whether an update waits until the run has ended, and fails if the run does.", default=True),
    ]
    cancel_on_interrupt: Annotated[
        pulumi.Input[bool],
        Field(
            "Whether Ctrl-C cancels the run. Where false, it goes on, and the next update waits for it.",
            default=False,
        ),
    ]


class Task(TypedDict):
    """One task of a run."""

    name: Annotated[str, Field("Name of the task, after those of the pipelines that it is in, such as train.fit.")]
    state: Annotated[str, Field("Such as SUCCEEDED, FAILED, SKIPPED (taken from the cache) or NOT_TRIGGERED.")]
    error: Annotated[str, Field("Why it has failed; empty where it has not.")]


class PipelineJob(Job):
    """A compiled pipeline that runs once on Vertex AI Pipelines.

    It behaves as a CustomJob does: an update waits until the run has ended and shows which task runs, a failed run
    fails the resource with the tasks that have failed and the last lines of their logs, and the next update runs it
    again; after Ctrl-C the run goes on, and the next update waits for it. The same template with the same parameters
    never runs twice, a changed one runs anew. A preview compares the parameters with the template.

    Deleting the resource cancels a run that has not ended and deletes its record. What the tasks have written stays.
    Its id is `projects/PROJECT/locations/LOCATION/pipelineJobs/ID`: give that to `pulumi import`. Timeouts: 8 days to
    create or update, 1 hour to delete, changed with `custom_timeouts`; they do not end the run.

        vertex.PipelineJob(
            "digits",
            template="digits.yaml",  # kfp dsl compile --py pipeline.py --output digits.yaml
            parameters={"epochs": 3},
            pipeline_root="gs://my-bucket/pipelines",
            service_account=account.email,
        )

    https://cloud.google.com/vertex-ai/docs/pipelines/run-pipeline
    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[PipelineJobInputs],
    ) -> None:
        self._register(resource_name, inputs, opts)

    @property
    def tasks(self) -> pulumi.Output[Sequence[Task]]:
        """The tasks and their states, in the order in which they were made."""
        output: pulumi.Output[Sequence[Task]] = self._output("tasks")
        return output

    @property
    def console(self) -> pulumi.Output[str]:
        """The page of the run in the console."""
        output: pulumi.Output[str] = self._output("console")
        return output


DEFINITION: Final = Definition(
    f"{PACKAGE}:index:PipelineJob",
    PipelineJob.__doc__ or "",
    specification.replacing(properties_of(PipelineJobInputs), *PipelineInputs.__annotations__, "triggers"),
    outputs_of(PipelineJob),
)
PipelineJob.definition = DEFINITION


class PipelineJobType(JobType):
    definition = DEFINITION
    collection: ClassVar = "pipelineJobs"
    id_pattern: ClassVar = r"[A-Za-z0-9][A-Za-z0-9-]{0,127}"

    def resolve(self, inputs: Wire) -> Wire:
        return specification.resolved(inputs)

    def check_together(self, inputs: Wire) -> Failures:
        return specification.check_run(inputs)

    def preview(self, call: EngineCall, api: VertexApi, inputs: Wire, state: State | None) -> Wire:
        specification.previewed(call, api, inputs)
        return super().preview(call, api, inputs, state)

    def complete(self, call: EngineCall, api: VertexApi, inputs: Wire) -> Wire:
        return specification.complete(call, api, inputs)

    def body(self, inputs: Wire, mark: str) -> Wire:
        return specification.job_of(inputs)

    def chosen_id(self, inputs: Wire) -> dict[str, str]:
        """The pipeline's name and the time, which people look for in a list of runs, and a random number."""
        name = re.sub(r"[^a-z0-9]+", "-", template.name_of(specification.spec_of(inputs)).lower()).strip("-")
        name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
        return {"pipelineJobId": f"{name[:90]}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"}

    def imported(self, job: Wire) -> Wire:
        labels = {key: value for key, value in job.get("labels", {}).items() if key in _own_labels(job)}
        return {**specification.run_of(job), "displayName": job.get("displayName"), "labels": labels}

    def directory(self, job: Wire) -> str:
        return str(job.get("runtimeConfig", {}).get("gcsOutputDirectory", ""))

    def planned_directory(self, inputs: Wire, mark: str) -> str:
        return specification.root_of(inputs)

    def results(self, job: Wire, directory: str) -> Wire:
        tasks = [
            {"name": unique_name(one), "state": state_of_task(one), "error": error_of(one)} for one in tasks_of(job)
        ]
        return {"tasks": tasks, "console": self.console(str(job["name"])) if job.get("name") else ""}

    def progress(self, job: Wire) -> str:
        tasks = tasks_of(job)
        ended = sum(state_of_task(one) in ENDED for one in tasks)
        running = [unique_name(one) for one in tasks if state_of_task(one) == "RUNNING"]
        said = f"{ended} of {max(len(tasks), template.task_count(job.get('pipelineSpec', {})))} tasks"
        return f"{said}, {', '.join(running[:3])}{' and more' if running[3:] else ''}" if running else said

    def errors(self, job: Wire) -> list[str]:
        failed = [f"{unique_name(one)}: {error_of(one)}" for one in tasks_of(job) if state_of_task(one) == "FAILED"]
        return [*super().errors(job), *failed]

    def logs(self, name: str, job: Wire) -> dict[str, str]:
        """The custom jobs of the tasks that have failed, or that run."""
        wanted = "RUNNING" if any(state_of_task(one) == "RUNNING" for one in tasks_of(job)) else "FAILED"
        found = {
            f"{unique_name(one)}: ": job_id
            for one in tasks_of(job)
            if state_of_task(one) == wanted and (job_id := _custom_job(one))
        }
        return dict(list(found.items())[:MOST_LOGS])

    def console(self, name: str) -> str:
        """The page of a run, as google-cloud-aiplatform writes it (pipeline_jobs.py, _dashboard_uri)."""
        _, project, _, location, _, id_ = name.split("/")
        host = "https://console.cloud.google.com/vertex-ai"
        return f"{host}/locations/{location}/pipelines/runs/{id_}?project={project}"


def tasks_of(job: Wire) -> list[Wire]:
    """The tasks of a run, in the order in which they were made, without the task that stands for the whole run."""
    tasks: list[Wire] = job.get("jobDetail", {}).get("taskDetails", [])
    whole = {template.name_of(job.get("pipelineSpec", {})), str(job.get("name", "")).rpartition("/")[2]}
    mine = [one for one in tasks if one.get("parentTaskId") or one.get("taskName") not in whole]
    return sorted(mine, key=lambda one: (str(one.get("createTime", "")), str(one.get("taskId", ""))))


def unique_name(task: Wire) -> str:
    return str(task.get("taskUniqueName") or task.get("taskName", ""))


def state_of_task(task: Wire) -> str:
    return str(task.get("state", "STATE_UNSPECIFIED"))


def error_of(task: Wire) -> str:
    return str(task.get("error", {}).get("message", "")).strip()


def _custom_job(task: Wire) -> str:
    """The id of the custom job that runs a task, "" where there is none."""
    detail = task.get("executorDetail", {})
    name = detail.get("containerDetail", {}).get("mainJob") or detail.get("customJobDetail", {}).get("job") or ""
    return str(name).rpartition("/")[2]


def _own_labels(job: Wire) -> set[str]:
    """The labels of a run that its program gave it."""
    given = set(job.get("labels", {})) - {LABEL}
    return {key for key in given if not key.startswith("vertex-ai-pipelines-")}
