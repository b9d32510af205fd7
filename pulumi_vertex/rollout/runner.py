"""Carries out a rollout: looks at the endpoint, does the first step of the plan, looks again.

What the records of Vertex AI say of deployments, and what follows from it, is in docs/unverified.md. In short: a
running deployment can be neither cancelled nor undeployed, it may take much longer than the version's deployment
timeout because finding a machine comes on top, and the first model on an endpoint gets all traffic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Final

from .. import operations
from ..engine_call import EngineCall
from ..errors import HalfMadeError, PassingError, ProblemError, RefusedError, StoppedError, TimedOutError
from ..ownership import LABEL, new_claim
from ..retries import converge, pauses
from ..vertex_api import V1, V1BETA1, VertexApi
from ..wire import Wire
from .endpoint import Ours, being_deployed, deployed_models, get_endpoint, is_available, observe, outputs, spec_of
from .plan import (
    Deploy,
    Drain,
    MoveTraffic,
    Observed,
    Resize,
    Step,
    StrangersError,
    Undeploy,
    Wanted,
    deployed_id,
    matches,
    plan,
)
from .requests import deployed_model, resize_request
from .wanted import drain_seconds, short, wanted_of

DEPLOYMENT_SECONDS: Final = 1800  # where a version says nothing of its deployment timeout
LONGEST_DEPLOYMENT: Final = 7200  # "Limit for deployment timeout is 2 hours", ModelContainerSpec
MACHINE_SECONDS: Final = 1800  # to find a machine, which no deployment timeout counts
CHANGE_SECONDS: Final = 1800.0  # of an undeployment, or a change of replicas
UNDO_SECONDS: Final = 900.0  # to undeploy again what failed, whatever is left of the timeout
STOPPED_SECONDS: Final = 15.0  # for a last look after Ctrl-C
AVAILABLE_SECONDS: Final = 120.0  # from the end of a deployment to its first available replica
DEPLOYMENT: Final = "DeployModelOperationMetadata"
ID_ATTEMPTS: Final = 5  # deployed-model ids of our choice that are tried before Vertex AI chooses one
GOES_ON: Final = (
    "The deployment goes on, because Vertex AI cannot stop one: the next `pulumi up` continues with it, and `pulumi "
    "destroy` waits for it and removes it."
)


class Runner:
    """One run that brings an endpoint to what is wanted. It remembers what a failure has to be answered with."""

    def __init__(
        self, call: EngineCall, api: VertexApi, inputs: Wire, ours: Ours, undrained: Collection[str] = ()
    ) -> None:
        self.call, self.api = call, api
        self.endpoint = str(inputs["endpoint"])
        self.wanted = wanted_of(inputs)
        self.full_names = {short(release["model"]): str(release["model"]) for release in inputs["models"].values()}
        self.drain_seconds = drain_seconds(inputs)
        self.ours = ours
        self.undrained = set(undrained)
        self.before: Wire | None = None  # the endpoint when the run began
        self.step: Step | None = None  # what is being carried out
        self.deploying = False  # a deployment runs that this run has started or waits for
        self.changed = False  # traffic or replicas are not as before
        self.waited: set[str] = set()  # unavailable models that were waited for

    def run(self) -> Wire:
        """Brings the endpoint to what is wanted and returns the outputs.

        Raises ProblemError when everything is as it was before, HalfMadeError (with what is there now) when it is not.
        """
        with self.api.lock(self.endpoint):
            try:
                converge(self.call, self._next)
            except ProblemError as error:
                self._give_up(error)
            self._take_over(self.call)
            return outputs(self._existing(self.call), self.ours, self.wanted)

    def _next(self) -> bool:
        """Does the next step; True when there is none left."""
        self._attach()
        endpoint = self._existing(self.call)
        if self.before is None:
            self.before = endpoint
        observed = observe(endpoint, self.ours, self.undrained)
        self.undrained |= {d.id for d in observed if d.traffic}
        if self._waits_for_replicas(observed):
            return False
        steps = planned(self.wanted, observed, self.endpoint, self.drain_seconds)
        self.step = steps[0] if steps else None
        if self.step is None:
            return True
        self.call.say(str(self.step))
        self.do(self.step, {d.id for d in observed})
        return False

    def _take_over(self, call: EngineCall) -> None:
        """Makes this state the owner of all that is ours on the endpoint: see ownership.py."""

        def step() -> bool:
            endpoint = self._existing(call)
            labels = endpoint.get("labels", {})
            foreign = [d for d in deployed_models(endpoint) if self.ours.own(d)]
            foreign = [d for d in foreign if self.ours.claim_on(d, endpoint) != self.ours.claim]
            if not foreign and labels.get(LABEL, self.ours.claim) == self.ours.claim:
                return True
            if foreign and not self.ours.claim:  # imported
                self.ours = replace(self.ours, claim=new_claim())
            claimed = {**labels, LABEL: self.ours.claim}
            body = {"labels": {key: value for key, value in claimed.items() if value}, "etag": endpoint.get("etag", "")}
            self.api.change("PATCH", self.endpoint, body, updateMask="labels")
            return False

        converge(call, step)

    def _existing(self, call: EngineCall) -> Wire:
        endpoint = get_endpoint(call, self.api, self.endpoint)
        if endpoint is None:
            raise ProblemError(
                f"There is no endpoint {self.endpoint}. Make it first (gcp.vertex.AiEndpoint) and pass its `id`."
            )
        return endpoint

    def _attach(self) -> None:
        """Waits for what runs on the endpoint: work of an earlier run that was killed, or of somebody else.

        A deployment of what is wanted that fails is this run's failure too: it would only fail again.
        """
        for operation in operations.running(self.call, self.api, self.endpoint):
            unfinished = []
            if operations.kind(operation) == DEPLOYMENT:
                unfinished = being_deployed(self.call, self.api, self.endpoint)
            specs = {w.spec: w for w in self.wanted.values()}
            mine = [specs[spec_of(d)] for d in unfinished if self.ours.own(d) and spec_of(d) in specs]
            what = f"waiting for {short(str(mine[0].spec.model))}" if mine else "waiting for another operation"
            self.step = Deploy(mine[0]) if mine else None
            self.deploying = bool(mine)
            try:
                limit = self.call.limited(LONGEST_DEPLOYMENT + MACHINE_SECONDS)
                operations.wait(limit, self.api, str(operation["name"]), f"{what}, which was already running")
            except RefusedError as error:
                if len(mine) == 1:
                    self.deploying = False
                    raise ProblemError(f"{error} An earlier run had started it.") from None
            self.deploying = False

    def _waits_for_replicas(self, observed: list[Observed]) -> bool:
        """Waits once for each model that is to serve and does not: it may only be restarting."""
        for d in matches(self.wanted, observed, self.endpoint).values():
            if not d.available and d.id not in self.waited:
                self.waited.add(d.id)
                self._wait_until_available(d.id, str(d.spec.model))
                return True
        return False

    # -- steps

    def do(self, step: Step, there: Collection[str] = ()) -> None:
        """Carries out one step and waits until it is done. `there` has the ids of the models that were deployed.

        Raises PassingError where another run of the same program did the step first, so that the caller looks again.
        """
        match step:
            case Deploy(wanted):
                self._deploy(wanted, there)
            case Resize():
                with _gone_meanwhile(step):
                    self._resize(step)
            case MoveTraffic():
                split = {str(share.id): share.traffic or 0 for share in step.new}
                self.api.change("PATCH", self.endpoint, {"trafficSplit": split}, updateMask="trafficSplit")
                self.changed = True
            case Drain():
                self.call.pause(step.seconds)
                self.undrained -= set(step.ids)
            case Undeploy():
                self._undeploy(self.call, step)

    def _deploy(self, wanted: Wanted, there: Collection[str]) -> None:
        model = str(wanted.spec.model)
        seconds = self._deployment_seconds(model)
        operation = self._start_deployment(wanted, there)
        self.deploying = True
        try:
            what = f"deploying {model} on {wanted.spec.machine_type}"
            response = operations.wait(self.call.limited(seconds), self.api, operation, what)
        except RefusedError:
            self.deploying = False
            raise
        self.deploying = False
        id_ = str(response["deployedModel"]["id"])
        self.waited.add(id_)
        if not self._wait_until_available(id_, model):
            said = next((d for d in self._deployed() if d["id"] == id_), None)
            if said is None:
                raise ProblemError("it was undeployed by somebody else as soon as it was deployed.")
            why = said.get("status", {}).get("message", "")
            raise ProblemError(f"it was deployed, but no replica is available. {why}".strip())

    def _deployment_seconds(self, model: str) -> float:
        """How long a deployment may take: the version's own timeout, and the time to find a machine."""
        version = self.api.find(self.call, self.full_names[model])
        if version is None:
            raise ProblemError(f"there is no model version {self.full_names[model]}.")
        own = version.get("containerSpec", {}).get("deploymentTimeout", f"{DEPLOYMENT_SECONDS}s")
        return float(own.removesuffix("s")) + MACHINE_SECONDS

    def _start_deployment(self, wanted: Wanted, there: Collection[str]) -> str:
        """Starts a deployment and returns its operation.

        Tries ids of our choice, by which a request that is repeated finds its own work, and leaves the choice to Vertex
        AI where it refuses them. Asks for no traffic, except on an empty endpoint where that is refused.
        """
        name = self.full_names[str(wanted.spec.model)]
        body: Wire = {"deployedModel": deployed_model(wanted, name, self.ours.display_mark)}
        version = V1 if wanted.size.min_replicas else V1BETA1
        attempt = 0
        while True:
            if attempt < ID_ATTEMPTS:
                body["deployedModel"]["id"] = deployed_id(self.endpoint, wanted.spec, attempt)
            else:
                body["deployedModel"].pop("id", None)
            try:
                operation = self.api.change("POST", f"{self.endpoint}:deployModel", body, version=version)
                return str(operation["name"])
            except RefusedError as error:
                own_id, split = "id" in body["deployedModel"], "trafficSplit" in body
                if error.status == "ALREADY_EXISTS" and own_id:
                    self._refuse_duplicate(wanted, body["deployedModel"]["id"], there)
                    attempt += 1
                elif error.status == "INVALID_ARGUMENT" and not there and not split and "traffic" in str(error).lower():
                    body["trafficSplit"] = {"0": 100}
                elif error.status == "INVALID_ARGUMENT" and own_id:
                    attempt = ID_ATTEMPTS
                else:
                    raise

    def _refuse_duplicate(self, wanted: Wanted, id_: str, there: Collection[str]) -> None:
        """Raises PassingError where another run of the same program has deployed the same, or does so now."""
        if id_ in there:
            return
        running = operations.running(self.call, self.api, self.endpoint)
        if any(operations.kind(o) == DEPLOYMENT for o in running) or any(d["id"] == id_ for d in self._deployed()):
            raise PassingError(f"Another run deploys {wanted.spec.model} on this endpoint.")

    def _deployed(self) -> list[Wire]:
        return deployed_models(self._existing(self.call))

    def _wait_until_available(self, id_: str, model: str) -> bool:
        """Whether a replica of a deployed model becomes available; False too when the model is gone."""
        limit, delays = self.call.tidying(min(AVAILABLE_SECONDS, max(self.call.left, 1))), pauses()
        while True:
            deployed = next((d for d in self._deployed() if d["id"] == id_), None)
            if deployed is None or limit.left < 1:
                return False
            if is_available(deployed):
                return True
            self.call.say(f"waiting for a replica of {model}")
            self.call.pause(min(next(delays), limit.left))

    def _resize(self, step: Resize) -> None:
        body, version = resize_request(step)
        path = f"{self.endpoint}:mutateDeployedModel"
        operation = self.api.change("POST", path, body, version=version)
        self.changed = True
        operations.wait(self.call.limited(CHANGE_SECONDS), self.api, str(operation["name"]), str(step))

    def _undeploy(self, call: EngineCall, step: Undeploy) -> None:
        with _gone_meanwhile(step):
            operation = self.api.change("POST", f"{self.endpoint}:undeployModel", {"deployedModelId": step.id})
            operations.wait(call.limited(CHANGE_SECONDS), self.api, str(operation["name"]), str(step))

    # -- failure

    def _give_up(self, error: ProblemError) -> None:
        """Undoes what this run deployed, unless it was stopped or callers are concerned; raises what users read."""
        stopped = isinstance(error, StoppedError)
        tidy = self.call.tidying(STOPPED_SECONDS if stopped else UNDO_SECONDS, stoppable=not stopped)
        what = f"Could not {self.step}." if self.step and not stopped else ""
        notes = []
        before = self.before or {}
        try:
            if not self.deploying and isinstance(error, StoppedError | TimedOutError | PassingError):
                # The answer to a request may have been lost: does a deployment run?
                there = operations.running(tidy, self.api, self.endpoint)
                self.deploying = any(operations.kind(o) == DEPLOYMENT for o in there)
            if self.deploying:
                notes.append(GOES_ON)
            elif stopped:
                notes.append("The next `pulumi up` continues from there.")
            elif not self.changed and self._undo(tidy, before):
                notes.append("It was undeployed again.")
            now = get_endpoint(tidy, self.api, self.endpoint)
        except ProblemError as second:
            raise HalfMadeError(
                f"{what} What is deployed now could not be brought in order: {second} The next `pulumi up` tries "
                f"again. The reason of it all: {error}".strip(),
                self.endpoint,
                outputs(before, self.ours, self.wanted),
            ) from None
        if now is not None and not stopped:
            notes.append(_traffic_note(before, now))
        # The reason comes last, because it may end in the log lines of a container.
        why = f"The reason: {error}" if what else str(error)
        message = " ".join(filter(None, [why, *notes] if stopped else [what, *notes, why]))
        if now is None:
            raise ProblemError(message) from None
        then, after = outputs(before, self.ours, self.wanted), outputs(now, self.ours, self.wanted)
        if then == after and not self.deploying and not self.changed:
            raise ProblemError(message) from None
        if not self.deploying:
            with contextlib.suppress(ProblemError):  # the next update takes over too
                self._take_over(tidy)
        raise HalfMadeError(message, self.endpoint, after) from None

    def _undo(self, call: EngineCall, before: Wire) -> bool:
        """Undeploys what was not there when the run began, and says whether that was anything.

        What has got traffic stays, except where nobody was served before.
        """
        ids = {d["id"] for d in deployed_models(before)}
        served = any(before.get("trafficSplit", {}).values())
        undone: list[str] = []

        def step() -> bool:
            operations.wait_for_others(call, self.api, self.endpoint)
            there = get_endpoint(call, self.api, self.endpoint)
            new = [d for d in observe(there or {}, self.ours) if d.ours and d.id not in ids]
            left = sorted((d for d in new if not (d.traffic and served)), key=lambda d: d.traffic)
            if not left:
                return True
            call.say("undeploying what could not be deployed")
            undone.append(left[0].id)
            self._undeploy(call, Undeploy(left[0].spec.model or left[0].id, left[0].id))
            return False

        converge(call, step)
        return bool(undone)


@contextlib.contextmanager
def _gone_meanwhile(step: Step) -> Iterator[None]:
    """Raises PassingError where the deployed model of a step is not found, because another run undeployed it first."""
    try:
        yield
    except RefusedError as error:
        if error.status != "NOT_FOUND":
            raise
        raise PassingError(str(error)) from None


def planned(wanted: dict[str, Wanted], observed: list[Observed], endpoint: str, drain_seconds: int = 0) -> list[Step]:
    """The plan. Raises ProblemError for deployed models of somebody else."""
    try:
        return plan(wanted, observed, endpoint, drain_seconds)
    except StrangersError as error:
        said = ", ".join(f"{d.id} ({d.spec.model}, {d.traffic} % of the traffic)" for d in error.strangers)
        raise ProblemError(
            f"The endpoint has deployed models that this rollout did not make: {said}. Set adopt=True to take them "
            "over (those that fit no release are undeployed), or undeploy them by hand."
        ) from None


def _traffic_note(before: Wire, now: Wire) -> str:
    """What has become of the traffic, in a sentence."""
    old, new = ({k: v for k, v in e.get("trafficSplit", {}).items() if v} for e in (before, now))
    if old == new:
        return "The traffic was not touched." if old else "Nothing was served before, and nothing is now."
    shares = ", ".join(f"{id_} {share} %" for id_, share in new.items())
    return f"The traffic is now: {shares or 'none'}."
