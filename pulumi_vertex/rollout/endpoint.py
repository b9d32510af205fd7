"""An endpoint as Vertex AI shows it, and what of it is this rollout's.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.endpoints
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from ..engine_call import EngineCall
from ..errors import ProblemError, RefusedError
from ..ownership import LABEL, as_output, claim_of
from ..resource import State
from ..vertex_api import V1BETA1, VertexApi
from ..wire import Wire
from .plan import Observed, Size, Spec, Wanted, matches
from .wanted import METRICS, short, targets_of
from .wanted import size_of as wanted_size

NAME: Final = r"projects/[^/]+/locations/[^/]+/endpoints/[^/]+"


@dataclass(frozen=True)
class Ours:
    """What is known of this rollout's own deployed models.

    They carry its `mark` in their display names; imported ones do not, and are known by their `ids` in the state. With
    `adopt`, all deployed models are this rollout's. `claim`: see ownership.py.
    """

    mark: str
    claim: str = ""
    ids: frozenset[str] = frozenset()
    adopt: bool = False

    @classmethod
    def of(cls, urn: str, outputs: Wire, *, adopt: bool = False) -> Ours:
        ids = frozenset((outputs.get("deployedModels") or {}).values())
        return cls(mark_of(urn), claim_of(outputs), ids, adopt)

    @property
    def display_mark(self) -> str:
        return f"{self.mark}-{self.claim}" if self.claim else self.mark

    def own(self, deployed: Wire) -> bool:
        return self.adopt or deployed["id"] in self.ids or self.mark in deployed.get("displayName", "")

    def claim_on(self, deployed: Wire, endpoint: Wire) -> str:
        """The claim under which a model of ours is: that of the endpoint, of our state, of the create that deployed it.

        No create takes over what is in another state without writing its claim on the endpoint.
        """
        if label := endpoint.get("labels", {}).get(LABEL):
            return str(label)
        if deployed["id"] in self.ids:
            return self.claim
        found = re.search(rf"{self.mark}(?:-([0-9a-f]{{8}}))?\b", deployed.get("displayName", ""))
        return (found[1] or "") if found else ""


def mark_of(urn: str) -> str:
    """What marks a deployed model, in its display name, as made by the rollout of a URN."""
    return "pulumi-" + hashlib.sha256(urn.encode()).hexdigest()[:8]


def undrained(outputs: Wire) -> frozenset[str]:
    """The ids of the models that had traffic when the state was written, so that requests may still be in them."""
    return frozenset(id_ for id_, share in (outputs.get("trafficSplit") or {}).items() if share)


# --- reading ------------------------------------------------------------------------------------------------


def get_endpoint(call: EngineCall, api: VertexApi, name: str) -> Wire | None:
    if not re.fullmatch(NAME, name):
        raise ProblemError(
            f"{name!r} is not the name of an endpoint. Give projects/PROJECT/locations/LOCATION/endpoints/ID; `gcloud "
            "ai endpoints list --region LOCATION` shows the ids."
        )
    endpoint = api.find(call, name)
    if endpoint and any(not _resources(d).get("minReplicaCount") for d in deployed_models(endpoint)):
        # Only v1beta1 shows how a model scales to zero.
        beta = {d["id"]: d for d in deployed_models(api.find(call, name, version=V1BETA1) or {})}
        for deployed in deployed_models(endpoint):
            if spec := _resources(beta.get(deployed["id"], {})).get("scaleToZeroSpec"):
                _resources(deployed)["scaleToZeroSpec"] = spec
    return endpoint


def deployed_models(endpoint: Wire) -> list[Wire]:
    found: list[Wire] = endpoint.get("deployedModels", [])
    return found


def being_deployed(call: EngineCall, api: VertexApi, name: str) -> list[Wire]:
    """The models whose deployment is not finished. Nothing where Vertex AI does not tell.

    https://docs.cloud.google.com/vertex-ai/docs/predictions/rolling-deployment
    """
    try:
        endpoint = api.read(call, name, allDeploymentStates="true")
    except RefusedError:
        return []
    return [d for d in deployed_models(endpoint) if d.get("state") == "BEING_DEPLOYED"]


def _resources(deployed: Wire) -> Wire:
    resources: Wire = deployed.setdefault("dedicatedResources", {})
    return resources


# --- as the planner takes it --------------------------------------------------------------------------------


def observe(endpoint: Wire, ours: Ours, undrained: Collection[str] = ()) -> list[Observed]:
    split: Wire = endpoint.get("trafficSplit", {})
    return [
        Observed(
            deployed["id"],
            spec_of(deployed),
            size_of(deployed),
            int(split.get(deployed["id"], 0)),
            ours=ours.own(deployed),
            available=is_available(deployed),
            drained=not split.get(deployed["id"]) and deployed["id"] not in undrained,
        )
        for deployed in deployed_models(endpoint)
    ]


def full_model(deployed: Wire) -> str:
    """The full name of the deployed version. Answers name the model with its version or without."""
    model = str(deployed["model"])
    return model if "@" in short(model) else f"{model}@{deployed.get('modelVersionId', '')}"


def spec_of(deployed: Wire) -> Spec:
    machine: Wire = _resources(deployed).get("machineSpec", {})
    accelerators = machine.get("acceleratorCount", 0)
    return Spec(
        model=short(full_model(deployed)),
        machine_type=machine.get("machineType", ""),
        accelerator_type=machine.get("acceleratorType", "") if accelerators else "",
        accelerator_count=accelerators,
        service_account=deployed.get("serviceAccount", ""),
        access_logging=deployed.get("enableAccessLogging", False),
        spot=_resources(deployed).get("spot", False),
    )


def size_of(deployed: Wire) -> Size:
    resources = _resources(deployed)
    names = {long: brief for brief, long in METRICS.items()}
    targets = {
        names.get(spec["metricName"], spec["metricName"]): spec.get("target", 60)
        for spec in resources.get("autoscalingMetricSpecs", [])
    }
    least = resources.get("minReplicaCount", 0)
    spec = resources.get("scaleToZeroSpec", {})
    return Size(
        min_replicas=least,
        max_replicas=resources.get("maxReplicaCount") or max(least, 1),
        targets=targets_of(targets),
        container_logging=not deployed.get("disableContainerLogging", False),
        idle=None if least else (_period(spec, "minScaleupPeriod"), _period(spec, "idleScaledownPeriod")),
    )


def _period(spec: Wire, name: str) -> int:
    return int(float(str(spec.get(name, "3600s")).removesuffix("s")))


def is_available(deployed: Wire) -> bool:
    """Whether requests are answered, or begin to be once there are some.

    A finished deployment has its replicas (DedicatedResources.required_replica_count); the count, where a status is
    given, may say that they were lost since. A count of zero is left out. A model that scales to zero may have none.
    """
    if not _resources(deployed).get("minReplicaCount") or "status" not in deployed:
        return True
    return int(deployed["status"].get("availableReplicaCount", 0)) > 0


# --- as Pulumi's state has it -------------------------------------------------------------------------------


def outputs(endpoint: Wire, ours: Ours, wanted: Mapping[str, Wanted]) -> Wire:
    observed = observe(endpoint, ours)
    serving = matches(wanted, observed, str(endpoint.get("name", "")))
    names = {d.id: name for name, d in serving.items()}
    return {
        "deployedModels": {names.get(d.id, d.id): d.id for d in observed if d.ours},
        "trafficSplit": {d.id: d.traffic for d in observed if d.traffic},
        "otherDeployedModels": {d.id: d.spec.model for d in observed if not d.ours},
        **as_output(ours.claim),
    }


def refreshed(state: State, endpoint: Wire, ours: Ours) -> Wire:
    """The inputs as the endpoint has them now; what is not ours is told in an output instead."""
    observed = {d.id: d for d in observe(endpoint, ours) if d.ours}
    full_names = {d["id"]: full_model(d) for d in deployed_models(endpoint)}
    ids: Wire = state.outputs.get("deployedModels") or {}
    models: Wire = {}
    for name, release in (state.inputs.get("models") or {}).items():
        if there := observed.pop(ids.get(name, ""), None):
            models[name] = _drifted(release, there)
    for there in observed.values():
        name = there.id if state.inputs else _free_name(there, models)
        models[name] = _drifted(_spec_inputs(full_names[there.id], there.spec), there)
    return {**state.inputs, "endpoint": state.id, "models": models}


def _drifted(release: Wire, there: Observed) -> Wire:
    """A release with what differs on the endpoint."""
    new, size = {**release, "traffic": there.traffic}, wanted_size(release)
    if there.size.replicas != size.replicas:
        new |= {"minReplicas": there.size.min_replicas, "maxReplicas": there.size.max_replicas}
    if there.size.idle and there.size.idle != size.idle:
        new |= dict(zip(("minScaleupSeconds", "idleScaledownSeconds"), there.size.idle, strict=True))
    if not there.size.has_targets_of(size):
        new["autoscalingTargets"] = dict(there.size.targets)
    if there.size.container_logging != size.container_logging:
        new["containerLogging"] = there.size.container_logging
    return new


def _spec_inputs(model: str, spec: Spec) -> Wire:
    found = {
        "model": model,
        "machineType": spec.machine_type,
        "acceleratorType": spec.accelerator_type,
        "acceleratorCount": spec.accelerator_count,
        "serviceAccount": spec.service_account,
        "accessLogging": spec.access_logging,
        "spot": spec.spot,
    }
    return {key: value for key, value in found.items() if value}


def _free_name(there: Observed, taken: Wire) -> str:
    """A release name for something imported: ID-VERSION, or the deployed-model id where that is taken or unfit."""
    name = (there.spec.model or "").replace("@", "-").replace("_", "-")
    return name if re.fullmatch(r"[a-z][a-z0-9-]{0,62}", name) and name not in taken else there.id
