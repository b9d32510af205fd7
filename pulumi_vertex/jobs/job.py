"""What all kinds of jobs have in common: they run once, are waited for, and their records are kept.

A job's record cannot be changed once it is made. A label with a mark, a hash of the resource and its specification,
lets a create find the job that an earlier run has started: a job that runs is waited for, one that has succeeded is
taken over, and only one that has failed, or was cancelled, runs again.
"""

from __future__ import annotations

import contextlib
import re
import time
from abc import abstractmethod
from typing import ClassVar, Final

import pulumi

from .. import operations
from ..checks import Failures
from ..engine_call import EngineCall, duration
from ..errors import HalfMadeError, ProblemError, RefusedError, StoppedError
from ..ownership import as_output, claim_of, mark_of, new_claim
from ..resource import Resource, ResourceType, State
from ..retries import Wait, converge, pauses
from ..vertex_api import VertexApi
from ..wire import UNKNOWN, Wire
from .logs import last_line, last_lines
from .specification import LABEL, check_specification, known, output_directory

# https://cloud.google.com/vertex-ai/docs/reference/rest/v1/JobState and PipelineState
STATE: Final = "JOB_STATE_"
PIPELINE_STATE: Final = "PIPELINE_STATE_"
CANCELLING: Final = "CANCELLING"
UNSPECIFIED: Final = "UNSPECIFIED"  # also that of a job which could not be read
RUNNING: Final = ("QUEUED", "PENDING", "RUNNING", "PAUSED", "UPDATING", UNSPECIFIED)
SUCCEEDED: Final = ("SUCCEEDED", "PARTIALLY_SUCCEEDED")

DAY: Final = 24 * 3600.0
STOPPED_SECONDS: Final = 15.0  # for a last look, or a cancellation, after Ctrl-C
LOG_LINES: Final = 20  # of a job that has failed
GOES_ON: Final = "The job goes on: the next `pulumi up` waits for it, and `pulumi destroy` cancels it."
ENDING: Final = Wait(
    frozenset({"FAILED_PRECONDITION"}),
    "",
    120,
    "the job is about to end",
    "recorded for training pipelines, '… is in state … and cannot be canceled'; for jobs it is assumed",
)


class Job(Resource):
    """The outputs of all kinds of jobs."""

    @property
    def name(self) -> pulumi.Output[str]:
        """Full name of the job, which is its id too."""
        output: pulumi.Output[str] = self._output("name")
        return output

    @property
    def state(self) -> pulumi.Output[str]:
        """State of the job, such as SUCCEEDED."""
        output: pulumi.Output[str] = self._output("state")
        return output

    @property
    def create_time(self) -> pulumi.Output[str]:
        """When the job was made, as RFC 3339."""
        output: pulumi.Output[str] = self._output("createTime")
        return output

    @property
    def start_time(self) -> pulumi.Output[str]:
        """When the job began to run, as RFC 3339; empty before."""
        output: pulumi.Output[str] = self._output("startTime")
        return output

    @property
    def end_time(self) -> pulumi.Output[str]:
        """When the job ended, as RFC 3339; empty before."""
        output: pulumi.Output[str] = self._output("endTime")
        return output

    @property
    def output_directory(self) -> pulumi.Output[str]:
        """Folder of the job's output: the specification's own below base_output_directory, or the pipeline root."""
        output: pulumi.Output[str] = self._output("outputDirectory")
        return output


class JobType(ResourceType):
    """All kinds of jobs for the engine. What differs is in the methods before "what the engine asks"."""

    seconds: ClassVar = {"create": 8 * DAY, "update": 8 * DAY, "delete": 3600.0, "read": 120.0}
    collection: ClassVar[str]  # in the names of Vertex AI, such as customJobs
    id_pattern: ClassVar = r"\d+"

    def __init__(self) -> None:
        # The claim of the state that the engine looked at last, by id: see ownership.py.
        self._claims: dict[str, str] = {}

    def complete(self, call: EngineCall, api: VertexApi, inputs: Wire) -> Wire:
        """The inputs with what has to be fetched before a job can be started. Raises ProblemError."""
        return inputs

    @abstractmethod
    def body(self, inputs: Wire, mark: str) -> Wire:
        """The job that is sent, without its name and labels."""

    def chosen_id(self, inputs: Wire) -> dict[str, str]:
        """The query parameter with an id that no other job has, {} where Vertex AI chooses it."""
        return {}

    @abstractmethod
    def imported(self, job: Wire) -> Wire:
        """The inputs that a job was made from. Raises ProblemError."""

    @abstractmethod
    def results(self, job: Wire, directory: str) -> Wire:
        """The outputs beyond those of `Job`; `directory` is the folder of its output."""

    def progress(self, job: Wire) -> str:
        """How far a job is, in a few words, or ""."""
        return ""

    @abstractmethod
    def directory(self, job: Wire) -> str:
        """The folder of a job's output, "" where it has none."""

    def planned_directory(self, inputs: Wire, mark: str) -> str:
        """The folder in which the output of a job will be, "" where it has none."""
        return output_directory(inputs, mark)

    def errors(self, job: Wire) -> list[str]:
        """What Vertex AI says of a job that has failed."""
        return [str(job.get("error", {}).get("message", "")).strip()]

    def logs(self, name: str, job: Wire) -> dict[str, str]:
        """The ids under which Cloud Logging has what a job's containers say, by words that go before the lines."""
        return {"": name.rpartition("/")[2]}

    def console(self, name: str) -> str:
        """The page of a job in the console, as google-cloud-aiplatform writes it (jobs.py, _dashboard_uri)."""
        return console(name)

    # -- what the engine asks

    def check_together(self, inputs: Wire) -> Failures:
        return check_specification(inputs)

    def diff(self, state: State, inputs: Wire) -> dict[str, str]:
        self._claims[state.id] = claim_of(state.outputs)
        found, reached = super().diff(state, inputs), state.outputs.get("state")
        if reached in RUNNING:
            return found | ({"state": "update"} if waits(inputs) else {})
        return found | ({} if reached in SUCCEEDED else {"state": "update_replace"})

    def warnings(self, state: State, inputs: Wire) -> list[str]:
        found = self.diff(state, inputs)
        if any(what.endswith("_replace") for what in found.values()):
            if state.outputs.get("state") in RUNNING:
                return [f"{state.id} still runs. It is cancelled when the new job has succeeded."]
            return []
        late = [name for name in ("displayName", "labels") if any(path.split(".")[0] == name for path in found)]
        if late:
            return [f"Vertex AI cannot change {' and '.join(late)} of a job. They take effect when it runs anew."]
        return []

    def preview(self, call: EngineCall, api: VertexApi, inputs: Wire, state: State | None) -> Wire:
        outputs: Wire = {p.wire: UNKNOWN for p in self.definition.outputs}
        if state is not None:
            before = {p.wire: state.outputs.get(p.wire, UNKNOWN) for p in self.definition.outputs}
            if state.outputs.get("state") not in RUNNING:
                return before
            return outputs | {name: before[name] for name in ("name", "createTime", "outputDirectory")}
        fixed = {p.wire: inputs.get(p.wire) for p in self.definition.inputs if p.field.replaces}
        if known(fixed):
            directory = self.planned_directory(inputs, mark_of(self.definition, call.urn, inputs))
            outputs |= {"outputDirectory": directory}
        return outputs

    def create(self, call: EngineCall, api: VertexApi, inputs: Wire) -> State:
        name, taken_over = self._find_or_start(call, api, inputs)
        claim = new_claim() if taken_over else ""
        self._claims[name] = claim
        if taken_over:
            call.log(f"{name} was started by an earlier run with the same specification")
        return State(name, inputs, self._attend(call, api, name, inputs, claim))

    def read(self, call: EngineCall, api: VertexApi, state: State) -> State | None:
        self._parse(state.id)
        job = api.find(call, state.id)
        if job is None:
            return None
        inputs = state.inputs or {key: value for key, value in self.imported(job).items() if value}
        return State(state.id, inputs, self._outputs(state.id, job, claim_of(state.outputs)))

    def update(self, call: EngineCall, api: VertexApi, state: State, inputs: Wire) -> Wire:
        return self._attend(call, api, state.id, inputs, claim_of(state.outputs))

    def delete(self, call: EngineCall, api: VertexApi, state: State) -> None:
        """Cancels the job if it runs, waits, and deletes its record; its output stays in the bucket."""
        self._parse(state.id)
        claim = claim_of(state.outputs)
        if self._claims.get(state.id, claim) == claim:
            remove(call, api, state.id)
        else:
            call.log(f"A later create has taken over {state.id}; it is left to that one.")

    # -- create

    def _find_or_start(self, call: EngineCall, api: VertexApi, inputs: Wire) -> tuple[str, bool]:
        """The full name of the job that the inputs describe, and whether an earlier run has started it."""
        mark = mark_of(self.definition, call.urn, inputs)
        inputs = self.complete(call, api, inputs)
        # Quota, a wrong service account and the like are refused here, before anything is made.
        body = {
            "displayName": inputs.get("displayName") or call.urn.rpartition("::")[2][:128],
            "labels": {**inputs.get("labels", {}), LABEL: mark},
            **self.body(inputs, mark),
            **({"encryptionSpec": {"kmsKeyName": inputs["encryptionKey"]}} if inputs.get("encryptionKey") else {}),
        }
        chosen = self.chosen_id(inputs)  # the same for all tries of this create
        name, sent, delays = "", False, pauses()

        def step() -> bool:
            nonlocal name, sent
            mine = self._marked(call, api, mark)
            usable = [job for job in mine if state_of(job) in (*SUCCEEDED, *RUNNING)]
            if usable:
                kept = min(usable, key=lambda job: state_of(job) not in SUCCEEDED)
                name = self._named(api, kept)
                for copy in usable:  # of a request that was repeated because its answer got lost
                    if copy is not kept and state_of(copy) in RUNNING:
                        remove(call, api, self._named(api, copy))
                return True
            if any(state_of(job) == CANCELLING for job in mine):  # it may still write where the new one will
                call.say("waiting until the cancelled job has ended")
                call.pause(next(delays))
                return False
            sent = True
            try:
                made = api.change("POST", f"{api.parent}/{self.collection}", body, **chosen)
            except RefusedError as error:
                if not chosen or error.status != "ALREADY_EXISTS":
                    raise
                made = {"name": next(iter(chosen.values()))}  # of this create, whose first answer got lost
            name = self._named(api, made)
            return True

        try:
            converge(call, step)
        except ProblemError as error:
            if not sent or isinstance(error, RefusedError):
                raise
            tidy = call.tidying(STOPPED_SECONDS, stoppable=False)
            with contextlib.suppress(ProblemError):
                for job in self._marked(tidy, api, mark):
                    if state_of(job) in (*SUCCEEDED, *RUNNING):
                        name = self._named(api, job)
                        raise HalfMadeError(f"{error} {GOES_ON}", name, self._outputs(name, job, "")) from None
            raise
        return name, not sent

    def _marked(self, call: EngineCall, api: VertexApi, mark: str) -> list[Wire]:
        """The jobs that carry a mark, oldest first."""
        path, wanted = f"{api.parent}/{self.collection}", f'labels.{LABEL}="{mark}"'
        found = api.listed(call, path, self.collection, filter=wanted)
        mine = [job for job in found if job.get("labels", {}).get(LABEL) == mark]
        return sorted(mine, key=lambda job: str(job.get("createTime", "")))

    def _named(self, api: VertexApi, job: Wire) -> str:
        """The full name of a job, with the project as it is configured: answers give its number."""
        return f"{api.parent}/{self.collection}/{str(job['name']).rpartition('/')[2]}"

    # -- waiting

    def _attend(self, call: EngineCall, api: VertexApi, name: str, inputs: Wire, claim: str) -> Wire:
        """Waits for a job where that is wanted, and returns its outputs. Raises HalfMadeError."""
        job: Wire = {}
        try:
            job = self._existing(call, api, name)
            if waits(inputs):
                job = self._ended(call, api, name, job)
        except GoneError:
            raise
        except ProblemError as error:
            note = GOES_ON
            if isinstance(error, StoppedError) and inputs.get("cancelOnInterrupt") is True:
                note, job = self._cancelled(call, api, name, job)
            raise HalfMadeError(f"{error} {note}", name, self._outputs(name, job, claim)) from None
        outputs = self._outputs(name, job, claim)
        if state_of(job) not in (*SUCCEEDED, *RUNNING):
            raise HalfMadeError(self._failure(call, api, name, job), name, outputs)
        return outputs

    def _ended(self, call: EngineCall, api: VertexApi, name: str, job: Wire) -> Wire:
        """The job when it has ended. The status line says its state, its progress and the last line of its log."""
        delays, began, said = pauses(), time.monotonic(), ""
        while True:
            state = state_of(job)
            if state != said:
                call.log(f"{state.lower()}: {self.console(name)}" if not said else state.lower())
                said = state
            if state not in (*RUNNING, CANCELLING):
                return job
            doing = ", ".join(filter(None, [state.lower(), duration(time.monotonic() - began), self.progress(job)]))
            # One request of Cloud Logging for each look, however many tasks a pipeline runs at the same time.
            logged = next(iter(self.logs(name, job).values()), "") if job.get("startTime") else ""
            line = last_line(api, logged, str(job.get("createTime", ""))) if logged else ""
            call.say(": ".join(filter(None, [doing, line])))
            call.pause(next(delays))
            job = self._existing(call, api, name)

    def _cancelled(self, call: EngineCall, api: VertexApi, name: str, job: Wire) -> tuple[str, Wire]:
        """Cancels a job after Ctrl-C: what users read, and the job as it then is."""
        tidy = call.tidying(STOPPED_SECONDS, stoppable=False)

        def cancel() -> bool:
            api.change("POST", f"{name}:cancel", {})
            return True

        try:
            converge(tidy, cancel)
        except ProblemError as error:
            return f"The job could not be cancelled: {error} {GOES_ON}", job
        return "The job was cancelled. The next `pulumi up` runs it again.", {**job, "state": STATE + CANCELLING}

    def _failure(self, call: EngineCall, api: VertexApi, name: str, job: Wire) -> str:
        """What users read of a job that has failed. The log comes last, because it may be long."""
        why = self.errors(job)
        ended = f"The job has {_ENDINGS.get(state_of(job), 'failed')}, and the next `pulumi up` runs it again"
        message = "\n".join(filter(None, [f"{ended}: {self.console(name)}", *why]))
        lines = []
        try:
            for words, logged in self.logs(name, job).items():
                found = last_lines(api, logged, LOG_LINES, str(job.get("createTime", "")))
                # An error may have the container's last lines.
                lines += [words + line for line in found if not any(line in one for one in why)]
        except ProblemError as error:
            return f"{message}\nIts log could not be read, which needs roles/logging.viewer: {error}"
        return "\n".join([message, "The last lines of its log:", *lines]) if lines else message

    def _existing(self, call: EngineCall, api: VertexApi, name: str) -> Wire:
        job = api.find(call, name)
        if job is None:
            raise GoneError(f"The job {name} is gone. Run `pulumi refresh`, then `pulumi up`.")
        return job

    # -- read

    def _outputs(self, name: str, job: Wire, claim: str) -> Wire:
        directory = self.directory(job)
        return {
            "name": name,
            "state": state_of(job),
            "createTime": job.get("createTime", ""),
            "startTime": job.get("startTime", ""),
            "endTime": job.get("endTime", ""),
            "outputDirectory": directory,
            **self.results({**job, "name": name}, directory),
            **as_output(claim),
        }

    def _parse(self, name: str) -> None:
        """Raises ProblemError for an id that names no job of this kind."""
        if not re.fullmatch(rf"projects/[^/]+/locations/[^/]+/{self.collection}/{self.id_pattern}", name):
            raise ProblemError(
                f"{name!r} is not the name of a job. Give projects/PROJECT/locations/LOCATION/{self.collection}/ID, "
                "with the ID as the console shows it."
            )


class GoneError(ProblemError):
    """Somebody has deleted the job's record."""


_ENDINGS: Final = {"CANCELLED": "been cancelled", CANCELLING: "been cancelled", "EXPIRED": "expired"}


def waits(inputs: Wire) -> bool:
    return inputs.get("wait") is not False


def state_of(job: Wire) -> str:
    return str(job.get("state", "")).removeprefix(STATE).removeprefix(PIPELINE_STATE) or UNSPECIFIED


def console(name: str) -> str:
    """The page of a job in the console, as google-cloud-aiplatform writes it (jobs.py, _dashboard_uri)."""
    _, project, _, location, _, id_ = name.split("/")
    return f"https://console.cloud.google.com/agent-platform/locations/{location}/training/{id_}?project={project}"


def remove(call: EngineCall, api: VertexApi, name: str) -> None:
    """Cancels a job if it runs, waits until it has ended, and deletes its record."""
    delays = pauses()

    def step() -> bool:
        job = api.find(call, name)
        if job is None:
            return True
        state = state_of(job)
        if state in RUNNING:
            call.say("cancelling the job")
            api.change("POST", f"{name}:cancel", {})
        if state in (*RUNNING, CANCELLING):
            call.pause(next(delays))
            return False
        operation = api.change("DELETE", name)
        operations.wait(call, api, str(operation["name"]), "deleting the job's record")
        return False

    converge(call, step, also=(ENDING,))
