"""`Schedule`: a compiled pipeline that Vertex AI runs again and again.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.schedules
"""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

import re
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Unpack

import pulumi

from .. import operations
from ..checks import Failures
from ..definition import PACKAGE, Definition, outputs_of
from ..engine_call import EngineCall
from ..errors import HalfMadeError, ProblemError
from ..ownership import as_output, claim_of, new_claim
from ..resource import Resource, ResourceType, State
from ..retries import converge
from ..vertex_api import VertexApi
from ..wire import UNKNOWN, Wire
from . import cron, specification
from .schedule_message import (
    ACTIVE,
    CLAIM,
    COMPLETED,
    FIELDS,
    LABEL,
    NEVER_UNSET,
    PAUSED,
    PROPERTIES,
    REQUEST,
    ScheduleInputs,
    as_there,
    changeable,
    display_name_of,
    fields_of,
    full_name,
    job_in,
    mark_of,
    schedule_of,
)

UNSPECIFIED: Final = "STATE_UNSPECIFIED"  # of a schedule that could not be read, or not be brought to its inputs


class Schedule(Resource):
    """A compiled pipeline that Vertex AI runs again and again, at the times of a cron expression.

    A change takes effect in place, from the next run on; runs that have begun go on. Only an end_time, start_time or
    max_run_count that is taken away, and any change of a schedule that has come to its end, makes a new one. Missed
    runs are never made up for. A preview refuses a schedule that never fires, and parameters that the pipeline does not
    take.

    Deleting it starts no more runs and leaves those that it has started. Its id is
    `projects/PROJECT/locations/LOCATION/schedules/ID`: give that to `pulumi import`.

        vertex.Schedule(
            "nightly",
            template="digits.yaml",
            parameters={"epochs": 3},
            pipeline_root="gs://my-bucket/pipelines",
            cron="0 3 * * *",
            time_zone="Europe/Amsterdam",
        )

    https://cloud.google.com/vertex-ai/docs/pipelines/schedule-pipeline-run
    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[ScheduleInputs],
    ) -> None:
        self._register(resource_name, inputs, opts)

    @property
    def name(self) -> pulumi.Output[str]:
        """Full name of the schedule, which is its id too."""
        output: pulumi.Output[str] = self._output("name")
        return output

    @property
    def state(self) -> pulumi.Output[str]:
        """ACTIVE, PAUSED, or COMPLETED after its end_time or its last run."""
        output: pulumi.Output[str] = self._output("state")
        return output

    @property
    def create_time(self) -> pulumi.Output[str]:
        """When the schedule was made, as RFC 3339."""
        output: pulumi.Output[str] = self._output("createTime")
        return output

    @property
    def console(self) -> pulumi.Output[str]:
        """The page of the schedule in the console."""
        output: pulumi.Output[str] = self._output("console")
        return output


DEFINITION: Final = Definition(f"{PACKAGE}:index:Schedule", Schedule.__doc__ or "", PROPERTIES, outputs_of(Schedule))
Schedule.definition = DEFINITION


class ScheduleType(ResourceType):
    definition = DEFINITION
    seconds: ClassVar = {"create": 600.0, "update": 600.0, "delete": 600.0, "read": 120.0}

    # -- check and diff

    def resolve(self, inputs: Wire) -> Wire:
        return specification.resolved(inputs)

    def check_together(self, inputs: Wire) -> Failures:
        return specification.check_run(inputs) + cron.check_times(inputs)

    def diff(self, state: State, inputs: Wire) -> dict[str, str]:
        found = super().diff(state, inputs)
        completed = state.outputs.get("state") == COMPLETED
        for path, what in found.items():
            if completed or (what == "delete" and path in NEVER_UNSET):
                found[path] = f"{what}_replace"
        if completed:
            return found
        wanted = PAUSED if inputs.get("paused") is True else ACTIVE
        if not found and state.outputs.get("state", wanted) != wanted:
            found["state"] = "update"
        return found

    def warnings(self, state: State, inputs: Wire) -> list[str]:
        if any(what.endswith("_replace") for what in self.diff(state, inputs).values()):
            return [f"{state.id} is replaced by a new schedule, which counts its runs from 0."]
        return []

    def preview(self, call: EngineCall, api: VertexApi, inputs: Wire, state: State | None) -> Wire:
        specification.previewed(call, api, inputs)
        self._check_fires(inputs, state)
        outputs: Wire = {p.wire: UNKNOWN for p in self.definition.outputs}
        if state is not None:
            outputs |= {name: state.outputs.get(name, UNKNOWN) for name in ("name", "createTime", "console")}
        return outputs | {"state": PAUSED if inputs.get("paused") is True else ACTIVE}

    def _check_fires(self, inputs: Wire, state: State | None = None) -> None:
        """Raises ProblemError for a schedule that would never fire from now on."""
        times = ("cron", "timeZone", "startTime", "endTime", "paused")
        changed = state is None or any(state.inputs.get(name) != inputs.get(name) for name in times)
        if changed and (said := cron.never(inputs, datetime.now(UTC))):
            raise ProblemError(f"endTime: {said}")

    # -- create

    def create(self, call: EngineCall, api: VertexApi, inputs: Wire) -> State:
        """Makes the schedule, or takes over one that an earlier run has made and that can be changed.

        Others with the mark of this resource are of an earlier run or are being replaced: they are deleted.
        """
        self._check_fires(inputs)
        complete = specification.complete(call, api, inputs)
        name, claim, made = "", "", False

        def step() -> bool:
            nonlocal name, claim, made
            mine = self._marked(call, api, mark_of(call.urn))
            kept = next((one for one in mine if changeable(one, inputs)), None)
            if kept:
                name = full_name(api, kept)
                claim = "" if made else claim or new_claim()
            else:
                made = True
                name = full_name(api, api.change("POST", f"{api.parent}/schedules", wanted("")))
            for other in mine:
                if other is not kept:
                    remove(call, api, full_name(api, other))
            return True

        def wanted(claim: str) -> Wire:
            return schedule_of(api, call.urn, complete, claim, FIELDS)

        converge(call, step)
        if claim:
            call.log(f"{name} was made by an earlier run, and is taken over")
        try:
            there = self._brought(call, api, name, wanted(claim) if claim else {}, inputs)
        except ProblemError as error:
            raise HalfMadeError(str(error), name, outputs_from(name, {}, claim)) from None
        self._announce(call, inputs)
        return State(name, inputs, outputs_from(name, there, claim))

    def _marked(self, call: EngineCall, api: VertexApi, mark: str) -> list[Wire]:
        """The schedules that carry a mark, oldest first."""
        found = api.listed(call, f"{api.parent}/schedules", "schedules")
        mine = [one for one in found if job_in(one).get("labels", {}).get(LABEL) == mark]
        return sorted(mine, key=lambda one: str(one.get("createTime", "")))

    # -- read, update, delete

    def read(self, call: EngineCall, api: VertexApi, state: State) -> State | None:
        parse(state.id)
        there = api.find(call, state.id)
        if there is None:
            return None
        inputs = as_there(state.inputs, there, display_name_of(call.urn, {}))
        return State(state.id, inputs, outputs_from(state.id, there, claim_of(state.outputs)))

    def update(self, call: EngineCall, api: VertexApi, state: State, inputs: Wire) -> Wire:
        self._check_fires(inputs, state)
        claim = claim_of(state.outputs)
        changed = {path.split(".")[0].split("[")[0] for path in super().diff(state, inputs)}
        half_made = state.outputs.get("state") == UNSPECIFIED
        fields = FIELDS if half_made else fields_of(changed)
        complete = specification.complete(call, api, inputs) if REQUEST in fields else inputs
        body = schedule_of(api, call.urn, complete, claim, fields)
        there = self._brought(call, api, state.id, body, inputs)
        self._announce(call, inputs)
        return outputs_from(state.id, there, claim)

    def delete(self, call: EngineCall, api: VertexApi, state: State) -> None:
        """Deletes the schedule; runs that it has started go on."""
        parse(state.id)
        there = api.find(call, state.id)
        if there is None:
            return
        claimed = job_in(there).get("labels", {}).get(CLAIM, "")
        if claimed and claimed != claim_of(state.outputs):
            call.log(f"A later create has taken over {state.id}; it is left to that one.")
            return
        remove(call, api, state.id)

    def _brought(self, call: EngineCall, api: VertexApi, name: str, body: Wire, inputs: Wire) -> Wire:
        """Sends the fields of `body`, pauses or resumes, and returns the schedule. Raises ProblemError."""
        patched, there = not body, dict[str, Any]()

        def step() -> bool:
            nonlocal patched, there
            if not patched:
                api.change("PATCH", name, body, updateMask=",".join(sorted(body)))
                patched = True
            there = api.read(call, name)
            if there.get("state") == ACTIVE and inputs.get("paused") is True:
                api.change("POST", f"{name}:pause", {})
            elif there.get("state") == PAUSED and inputs.get("paused") is not True:
                api.change("POST", f"{name}:resume", {"catchUp": False})
            else:
                return True
            return False

        converge(call, step)
        return there

    def _announce(self, call: EngineCall, inputs: Wire) -> None:
        following = None if inputs.get("paused") is True else cron.next_time(inputs)
        if following:
            call.log(f"the next run starts at {following.isoformat()}")


def outputs_from(name: str, there: Wire, claim: str) -> Wire:
    return {
        "name": name,
        "state": there.get("state", UNSPECIFIED),
        "createTime": there.get("createTime", ""),
        "console": console(name),
        **as_output(claim),
    }


def console(name: str) -> str:
    """The page of a schedule, as google-cloud-aiplatform writes it (schedules.py, _dashboard_uri)."""
    _, project, _, location, _, id_ = name.split("/")
    host = "https://console.cloud.google.com/vertex-ai"
    return f"{host}/locations/{location}/pipelines/schedules/{id_}?project={project}"


def parse(name: str) -> None:
    """Raises ProblemError for an id that names no schedule."""
    if not re.fullmatch(r"projects/[^/]+/locations/[^/]+/schedules/\d+", name):
        raise ProblemError(
            f"{name!r} is not the name of a schedule. Give projects/PROJECT/locations/LOCATION/schedules/ID, with the "
            "ID as the console shows it."
        )


def remove(call: EngineCall, api: VertexApi, name: str) -> None:
    """Deletes a schedule that may be gone already."""

    def step() -> bool:
        if api.find(call, name) is None:
            return True
        operation = api.change("DELETE", name)
        operations.wait(call, api, str(operation["name"]), "deleting the schedule")
        return False

    converge(call, step)
