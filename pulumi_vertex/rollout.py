"""`Rollout`: the set of deployed models on one endpoint, and their traffic."""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are
# required.

import contextlib
import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Required, TypedDict, Unpack

import pulumi

from . import plan as planning
from .api import Api, HalfMadeError, RefusedError, StoppedError, Work, converge, pauses
from .definition import (
    PACKAGE,
    UNKNOWN,
    Definition,
    Failures,
    Field,
    ProblemError,
    Resource,
    Wire,
    outputs_of,
    properties_of,
)
from .plan import MoveTraffic, NotOursError, Release, Resize, Size, Spec, Undeploy, deployed_id, matches, plan

if TYPE_CHECKING:
    from google.cloud.aiplatform_v1 import types

_ENDPOINT: Final = r"projects/[^/]+/locations/[^/]+/endpoints/[^/]+"
METRICS: Final = {  # https://cloud.google.com/vertex-ai/docs/reference/rest/v1/AutoscalingMetricSpec
    "cpu": "aiplatform.googleapis.com/prediction/online/cpu/utilization",
    "accelerator": "aiplatform.googleapis.com/prediction/online/accelerator/duty_cycle",
    "requests": "aiplatform.googleapis.com/prediction/online/request_count",
}
DEFAULT_TARGET: Final = 60  # what Vertex AI aims at where nothing is said


class Deployed(TypedDict, total=False):
    """One release: a model version, the machines it runs on and its share of the traffic.

    Traffic, replicas, autoscaling and container logging change in place; anything else deploys anew beside the old.
    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.endpoints#DeployedModel
    """

    model: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Model version by its full name, the `id` of a ModelVersion.",
                pattern=r"projects/[^/]+/locations/[^/]+/models/[^/@]+@\d+",
                hint="a version's full name, projects/PROJECT/locations/LOCATION/models/ID@VERSION, as the "
                "`id` of a ModelVersion is (an alias or no version would mean something else tomorrow)",
            ),
        ]
    ]
    traffic: Required[
        Annotated[pulumi.Input[int], Field("Percent of the requests; all releases add up to 100.", low=0, high=100)]
    ]
    machine_type: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Machine of one replica, such as n1-standard-4. "
                "https://cloud.google.com/vertex-ai/docs/predictions/configure-compute",
                pattern=r"[a-z][a-z0-9]*(-[a-z0-9]+)+",
                hint="a machine type such as n1-standard-4",
            ),
        ]
    ]
    min_replicas: Annotated[pulumi.Input[int], Field("Replicas that always run.", low=1, default=1)]
    max_replicas: Annotated[
        pulumi.Input[int],
        Field("Replicas that may run under load; as many as min_replicas where absent.", low=1),
    ]
    autoscaling_targets: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[int]]],
        Field(
            "Percent of use at which replicas are added, by metric: cpu, accelerator or requests. 60 where absent.",
            pattern="|".join(METRICS),
            hint="cpu, accelerator or requests",
        ),
    ]
    accelerator_type: Annotated[
        pulumi.Input[str],
        Field(
            "Accelerator of each replica, such as NVIDIA_L4.",
            pattern=r"[A-Z][A-Z0-9_]+",
            hint="a name such as NVIDIA_L4",
        ),
    ]
    accelerator_count: Annotated[pulumi.Input[int], Field("Accelerators of each replica.", low=1)]
    service_account: Annotated[
        pulumi.Input[str],
        Field(
            "E-mail of the service account that the container runs as. Whoever deploys needs "
            "iam.serviceAccounts.actAs on it; it replaces the default access to the model's files.",
            pattern=r"[^@\s]+@[^@\s]+",
            hint="the e-mail of a service account",
        ),
    ]
    container_logging: Annotated[
        pulumi.Input[bool], Field("Whether the container's output goes to Cloud Logging.", default=True)
    ]
    access_logging: Annotated[
        pulumi.Input[bool], Field("Whether each request is noted in Cloud Logging.", default=False)
    ]
    spot: Annotated[
        pulumi.Input[bool],
        Field("Whether to run on spot machines, which Google may take away.", default=False),
    ]


class RolloutInputs(TypedDict, total=False):
    endpoint: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Endpoint by its full name, the `id` of a gcp.vertex.AiEndpoint. Let that resource ignore changes "
                "of its `traffic_split`.",
                pattern=_ENDPOINT,
                hint="projects/PROJECT/locations/LOCATION/endpoints/ID, the `id` of a gcp.vertex.AiEndpoint",
                replaces=True,
            ),
        ]
    ]
    models: Required[
        Annotated[
            Mapping[str, Deployed],
            Field(
                "What is deployed, by release name. An empty map is an endpoint without machines, which costs "
                "nothing and answers nothing.",
                # digits: the name that a refresh or an import gives to what is deployed under no release
                pattern=r"[a-z][a-z0-9-]{0,62}|\d{1,19}",
                hint="1 to 63 of a-z, 0-9 and -, beginning with a letter",
            ),
        ]
    ]
    drain_seconds: Annotated[
        pulumi.Input[int],
        Field(
            "Seconds between the last traffic and the undeployment of what leaves.",
            low=0,
            high=3600,
            default=30,
        ),
    ]
    adopt: Annotated[
        pulumi.Input[bool],
        Field(
            "Whether to take over deployed models that this rollout did not make. Those that fit a release stay, "
            "the others are undeployed. Without it they are an error.",
            default=False,
        ),
    ]


class Rollout(Resource):
    """What is deployed on one endpoint and how the traffic is shared.

    An update deploys what is missing without traffic, waits until it is available, moves the traffic in one call, waits
    `drain_seconds` and undeploys what is gone. If a release cannot be deployed, it is undeployed again, the traffic
    stays where it was, and the error says why. A release is recognised by what it is, not by its name: a canary that
    becomes `stable` is not deployed again.

    The preview lists the steps. Deleting the rollout undeploys what it made and leaves the endpoint. One endpoint has
    one Rollout. Its id is the endpoint's full name: give that to `pulumi import`. Timeouts: 60 minutes to create or
    update, 30 to delete, changed with `custom_timeouts`.

        vertex.Rollout(
            "digits",
            endpoint=endpoint.id,
            models={
                "stable": vertex.Deployed(model=old.id, traffic=90, machine_type="n1-standard-2"),
                "next": vertex.Deployed(model=new.id, traffic=10, machine_type="n1-standard-2"),
            },
        )

    https://cloud.google.com/vertex-ai/docs/predictions/deploy-model-api
    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[RolloutInputs],
    ) -> None:
        self._register(resource_name, inputs, opts)

    @property
    def deployed_models(self) -> pulumi.Output[Mapping[str, str]]:
        """Deployed-model id of each release; what is on its way out stands under its own id."""
        output: pulumi.Output[Mapping[str, str]] = self._output("deployedModels")
        return output

    @property
    def traffic_split(self) -> pulumi.Output[Mapping[str, int]]:
        """Percent of the requests by deployed-model id, as the endpoint has it."""
        output: pulumi.Output[Mapping[str, int]] = self._output("trafficSplit")
        return output

    @property
    def other_deployed_models(self) -> pulumi.Output[Mapping[str, str]]:
        """Deployed models that somebody else made: the model version of each deployed-model id."""
        output: pulumi.Output[Mapping[str, str]] = self._output("otherDeployedModels")
        return output


DEFINITION: Final = Definition(
    f"{PACKAGE}:index:Rollout", Rollout.__doc__ or "", properties_of(RolloutInputs), outputs_of(Rollout)
)
Rollout.definition = DEFINITION

SECONDS: Final = {"create": 3600.0, "update": 3600.0, "delete": 1800.0, "read": 120.0}
UNDO_SECONDS: Final = 900.0  # to undeploy again what failed, whatever is left of the timeout
AVAILABLE_SECONDS: Final = 120.0  # from the end of a deployment to its first available replica
ID_ATTEMPTS: Final = 5  # other deployed-model ids tried where Vertex AI does not let one be used again


# --- check --------------------------------------------------------------------------------------------------


def check(inputs: Wire) -> Failures:
    """What several properties together can be wrong about."""
    failures: Failures = []
    models = inputs.get("models")
    if not isinstance(models, dict):
        return failures
    releases = {name: release for name, release in models.items() if isinstance(release, dict)}
    shares = {name: release.get("traffic") for name, release in releases.items()}
    if releases and all(isinstance(share, int) for share in shares.values()):
        total = sum(share for share in shares.values() if isinstance(share, int))
        if total != 100:
            said = ", ".join(f"{name} {share}" for name, share in shares.items())
            failures.append(("models", f"must share 100 % of the traffic, not {total} % ({said}). Change a `traffic`."))
    for name, release in releases.items():
        least, most = release.get("minReplicas", 1), release.get("maxReplicas")
        if isinstance(least, int) and isinstance(most, int) and most < least:
            failures.append((f"models.{name}.maxReplicas", f"must be at least minReplicas, {least}, not {most}."))
        if ("acceleratorType" in release) != ("acceleratorCount" in release):
            given, missing = ("acceleratorType", "acceleratorCount")
            if given not in release:
                given, missing = missing, given
            failures.append((f"models.{name}.{missing}", f"is missing beside {given}. Give both or neither."))
    seen: dict[Spec, str] = {}
    for name, release in releases.items():
        spec = spec_of(release)
        if spec.model is None or "machineType" not in release:
            continue
        if spec in seen:
            failures.append(
                (
                    f"models.{name}",
                    f"is the same model version on the same machines as {seen[spec]}. Leave one of them out and give "
                    "the other the traffic of both.",
                )
            )
        seen[spec] = name
    return failures


def spec_of(release: Wire) -> Spec:
    return Spec(
        model=short(str(release["model"])) if release.get("model", UNKNOWN) != UNKNOWN else None,
        machine_type=str(release.get("machineType", "")),
        accelerator_type=str(release.get("acceleratorType", "")),
        accelerator_count=_known(release.get("acceleratorCount"), 0),
        service_account=str(release.get("serviceAccount", "")),
        access_logging=bool(release.get("accessLogging", False)),
        spot=bool(release.get("spot", False)),
    )


def size_of(release: Wire) -> Size:
    least = _known(release.get("minReplicas"), 1)
    targets = release.get("autoscalingTargets") or {}
    return Size(
        min_replicas=least,
        max_replicas=_known(release.get("maxReplicas"), least),
        targets=_targets(targets if isinstance(targets, dict) else {}),
        container_logging=bool(release.get("containerLogging", True)),
    )


def _targets(targets: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((m, t) for m, t in targets.items() if isinstance(t, int) and t != DEFAULT_TARGET))


def _known(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default


def releases_of(inputs: Wire) -> dict[str, Release]:
    models: Wire = inputs["models"] if isinstance(inputs.get("models"), dict) else {}
    return {
        name: Release(
            name,
            spec_of(release),
            size_of(release),
            release["traffic"] if isinstance(release.get("traffic"), int) else None,
        )
        # sorted: a map from the engine comes in any order
        for name, release in sorted(models.items())
        if isinstance(release, dict)
    }


def short(model: str) -> str:
    """ID@VERSION of a model version's full name; the project may be named by id or by number, so it is left out."""
    return model.rsplit("/", 1)[-1]


# --- what is there ------------------------------------------------------------------------------------------


@dataclass
class Known:
    """What earlier runs left in the state, and what this run has seen and done."""

    owner: str
    adopt: bool = False
    ids: set[str] = field(default_factory=set)  # deployed models in the state: ours
    had_traffic: set[str] = field(default_factory=set)  # not drained yet
    fresh: dict[str, Release] = field(default_factory=dict)  # deployed by this run
    moved: bool = False  # this run has moved traffic
    operation: str = ""  # the deployment that this run waits for

    @classmethod
    def of(cls, urn: str, outputs: Wire, *, adopt: bool = False) -> "Known":
        split = outputs.get("trafficSplit") or {}
        return cls(
            owner(urn),
            adopt,
            set((outputs.get("deployedModels") or {}).values()),
            {id_ for id_, share in split.items() if share},
        )


def owner(urn: str) -> str:
    """What marks a deployed model, in its display name, as made by this rollout."""
    return "pulumi-" + hashlib.sha256(urn.encode()).hexdigest()[:8]


def get_endpoint(work: Work, api: Api, name: str) -> "types.Endpoint | None":
    from google.cloud.aiplatform_v1 import types

    if not re.fullmatch(_ENDPOINT, name):
        raise ProblemError(
            f"{name!r} is not the name of an endpoint. Give projects/PROJECT/locations/LOCATION/endpoints/ID; `gcloud "
            "ai endpoints list --region LOCATION` shows the ids."
        )
    try:
        endpoint: types.Endpoint = api.read(work, api.endpoints.get_endpoint, types.GetEndpointRequest(name=name))
    except RefusedError as error:
        if error.status == "NOT_FOUND":
            return None
        raise
    return endpoint


def observe(endpoint: "types.Endpoint", known: Known) -> list[planning.Deployed]:
    found = []
    for deployed in endpoint.deployed_models:
        traffic = endpoint.traffic_split.get(deployed.id, 0)
        if traffic:
            known.had_traffic.add(deployed.id)
        found.append(
            planning.Deployed(
                deployed.id,
                _observed_spec(deployed),
                _observed_size(deployed),
                traffic,
                ours=known.adopt or deployed.id in known.ids or known.owner in deployed.display_name,
                available=_available(deployed),
                drained=deployed.id not in known.had_traffic,
            )
        )
    return found


def _observed_spec(deployed: "types.DeployedModel") -> Spec:
    name = short(deployed.model)
    machine = deployed.dedicated_resources.machine_spec
    accelerators = machine.accelerator_count
    return Spec(
        model=name if "@" in name else f"{name}@{deployed.model_version_id}",
        machine_type=machine.machine_type,
        accelerator_type=machine.accelerator_type.name if accelerators else "",
        accelerator_count=accelerators,
        service_account=deployed.service_account,
        access_logging=deployed.enable_access_logging,
        spot=deployed.dedicated_resources.spot,
    )


def _observed_size(deployed: "types.DeployedModel") -> Size:
    machines = deployed.dedicated_resources
    names = {long: brief for brief, long in METRICS.items()}
    specs = {names.get(s.metric_name, s.metric_name): s.target for s in machines.autoscaling_metric_specs}
    return Size(
        min_replicas=machines.min_replica_count,
        max_replicas=machines.max_replica_count or machines.min_replica_count,
        targets=_targets(specs),
        container_logging=not deployed.disable_container_logging,
    )


def _available(deployed: "types.DeployedModel") -> bool:
    # A finished deployment has its replicas (DedicatedResources.required_replica_count); the count, where it
    # is given, may say that they were lost since.
    return "status" not in deployed or deployed.status.available_replica_count > 0


def outputs(endpoint: "types.Endpoint", known: Known, releases: Mapping[str, Release]) -> Wire:
    observed = observe(endpoint, known)
    serving = matches(releases, observed, endpoint.name)
    names = {d.id: name for name, d in serving.items()}
    return {
        "deployedModels": {names.get(d.id, d.id): d.id for d in observed if d.ours},
        "trafficSplit": {d.id: d.traffic for d in observed if d.traffic},
        "otherDeployedModels": {d.id: d.spec.model for d in observed if not d.ours},
    }


def refreshed(old: Wire, old_outputs: Wire, endpoint: "types.Endpoint", known: Known) -> Wire:
    """The inputs as the endpoint has them now; what is not ours is told in an output instead."""
    observed = {d.id: d for d in observe(endpoint, known) if d.ours}
    ids: Wire = old_outputs.get("deployedModels") or {}
    models: Wire = {}
    for name, release in (old.get("models") or {}).items():
        if there := observed.pop(ids.get(name, ""), None):
            models[name] = _drifted(release, there)
    for there in observed.values():
        full = next(d.model for d in endpoint.deployed_models if d.id == there.id)
        full = full if "@" in short(full) else f"{full}@{(there.spec.model or '').rsplit('@', 1)[-1]}"
        models[_free_name(there, models) if not old else there.id] = _drifted(_spec_inputs(full, there.spec), there)
    return {**old, "endpoint": old.get("endpoint", endpoint.name), "models": models}


def _drifted(release: Wire, there: planning.Deployed) -> Wire:
    new, size = {**release, "traffic": there.traffic}, size_of(release)
    if there.size.min_replicas != size.min_replicas or there.size.max_replicas != size.max_replicas:
        new |= {"minReplicas": there.size.min_replicas, "maxReplicas": there.size.max_replicas}
    if there.size.targets != size.targets:
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


def _free_name(there: planning.Deployed, taken: Wire) -> str:
    """A release name for something imported: ID-VERSION, or the deployed-model id where that is taken or unfit."""
    name = (there.spec.model or "").replace("@", "-").replace("_", "-")
    return name if re.fullmatch(r"[a-z][a-z0-9-]{0,62}", name) and name not in taken else there.id


# --- preview ------------------------------------------------------------------------------------------------


def preview(work: Work, api: Api, inputs: Wire, old_outputs: Wire) -> Wire:
    """Logs the plan, one line a step, and returns the outputs as far as they are known."""
    releases = releases_of(inputs)
    name = inputs["endpoint"]
    known = Known.of(work.urn, old_outputs, adopt=inputs.get("adopt") is True)
    endpoint = get_endpoint(work, api, name) if name != UNKNOWN else None
    observed = observe(endpoint, known) if endpoint else []
    steps = _plan(releases, observed, name, _drain_seconds(inputs))
    if steps:
        work.log("\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)))
    if steps or endpoint is None:
        return dict.fromkeys(("deployedModels", "trafficSplit", "otherDeployedModels"), UNKNOWN)
    return outputs(endpoint, known, releases)


def _drain_seconds(inputs: Wire) -> int:
    return _known(inputs.get("drainSeconds"), 30)


def _plan(
    releases: Mapping[str, Release], observed: list[planning.Deployed], endpoint: str, drain_seconds: int
) -> list[planning.Step]:
    try:
        return plan(releases, observed, endpoint, drain_seconds)
    except NotOursError as error:
        said = ", ".join(f"{d.id} ({d.spec.model}, {d.traffic} % of the traffic)" for d in error.strangers)
        raise ProblemError(
            f"The endpoint has deployed models that this rollout did not make: {said}. Set adopt=True to take them "
            "over (those that fit no release are undeployed), or undeploy them by hand."
        ) from None


# --- create, update -----------------------------------------------------------------------------------------


def roll_out(work: Work, api: Api, inputs: Wire, old_outputs: Wire) -> Wire:
    """Brings the endpoint to what is wanted and returns the outputs.

    Raises ProblemError when everything is as it was before, HalfMadeError (with what is there now) when it is not.
    """
    name = inputs["endpoint"]
    releases = releases_of(inputs)
    full_names = {short(release["model"]): release["model"] for release in inputs["models"].values()}
    known = Known.of(work.urn, old_outputs, adopt=inputs.get("adopt") is True)
    current: list[planning.Step] = []

    def step() -> bool:
        api.wait_for_others(work, name)
        endpoint = _existing(work, api, name)
        steps = _plan(releases, observe(endpoint, known), name, _drain_seconds(inputs))
        current[:] = steps[:1]
        if not steps:
            return True
        work.say(str(steps[0]))
        perform(work, api, name, steps[0], known, full_names)
        return False

    with api.lock(name):
        try:
            converge(work, step)
        except ProblemError as error:
            _give_up(work, api, name, error, current, known, releases, old_outputs)
        return outputs(_existing(work, api, name), known, releases)


def _existing(work: Work, api: Api, name: str) -> "types.Endpoint":
    endpoint = get_endpoint(work, api, name)
    if endpoint is None:
        raise ProblemError(f"There is no endpoint {name}. Make it first (gcp.vertex.AiEndpoint) and pass its `id`.")
    return endpoint


def perform(
    work: Work, api: Api, endpoint: str, step: planning.Step, known: Known, full_names: Mapping[str, str]
) -> None:
    """Carries out one step and waits until it is done."""
    if isinstance(step, planning.Deploy):
        _deploy(work, api, endpoint, step.release, known, full_names)
    elif isinstance(step, Resize):
        _resize(work, api, endpoint, step)
    elif isinstance(step, MoveTraffic):
        _move_traffic(api, endpoint, step)
        known.moved = True
    elif isinstance(step, planning.Drain):
        work.pause(step.seconds)
        known.had_traffic -= set(step.ids)
    else:
        _undeploy(work, api, endpoint, step)


def _deploy(work: Work, api: Api, endpoint: str, release: Release, known: Known, full_names: Mapping[str, str]) -> None:
    from google.cloud.aiplatform_v1 import types

    spec = release.spec
    machine = types.MachineSpec(machine_type=spec.machine_type)
    if spec.accelerator_type:
        accelerator = getattr(types.AcceleratorType, spec.accelerator_type, None)
        if accelerator is None:
            known_ones = ", ".join(a.name for a in list(types.AcceleratorType)[1:])
            raise ProblemError(f"there is no accelerator {spec.accelerator_type}; there are {known_ones}.")
        machine.accelerator_type = accelerator
        machine.accelerator_count = spec.accelerator_count
    model = str(spec.model)
    deployed = types.DeployedModel(
        model=full_names[model],
        display_name=f"{model} {known.owner}",
        dedicated_resources=_machines(release.size, machine, spot=spec.spot),
        service_account=spec.service_account,
        enable_access_logging=spec.access_logging,
        disable_container_logging=not release.size.container_logging,
    )
    for attempt in range(ID_ATTEMPTS):
        deployed.id = deployed_id(endpoint, spec, attempt)
        known.fresh[deployed.id] = release
        try:
            operation = _start_deploy(api, endpoint, deployed)
        except RefusedError as error:
            if error.status != "ALREADY_EXISTS" or attempt == ID_ATTEMPTS - 1:
                raise
            continue
        break
    known.operation = operation
    api.wait(work, operation, f"deploying {model} on {spec.machine_type}")
    known.operation = ""
    _wait_until_available(work, api, endpoint, deployed.id, model)


def _start_deploy(api: Api, endpoint: str, deployed: "types.DeployedModel") -> str:
    from google.cloud.aiplatform_v1 import types

    request = types.DeployModelRequest(endpoint=endpoint, deployed_model=deployed)
    try:
        operation: str = api.call(api.endpoints.deploy_model, request).operation.name
    except RefusedError as error:
        # The reference allows a deployment without traffic; should Vertex AI refuse one on an endpoint that
        # has no traffic to keep, the only one there gets it all. Nobody was served before.
        if error.status != "INVALID_ARGUMENT" or "traffic" not in str(error).lower():
            raise
        request.traffic_split = {"0": 100}
        operation = api.call(api.endpoints.deploy_model, request).operation.name
    return operation


def _wait_until_available(work: Work, api: Api, endpoint: str, id_: str, model: str) -> None:
    wait, delays = work.settle(min(AVAILABLE_SECONDS, max(work.left, 1))), pauses()
    while True:
        deployed = next((d for d in _existing(work, api, endpoint).deployed_models if d.id == id_), None)
        if deployed is None:
            raise ProblemError("it was undeployed by somebody else as soon as it was deployed.")
        if _available(deployed):
            return
        if wait.left < 1:
            raise ProblemError(f"it was deployed, but no replica is available. {deployed.status.message}".strip())
        work.say(f"waiting for a replica of {model}")
        work.pause(min(next(delays), wait.left))


def _resize(work: Work, api: Api, endpoint: str, step: Resize) -> None:
    from google.cloud.aiplatform_v1 import types
    from google.protobuf import field_mask_pb2

    machines = "dedicated_resources"
    changed = {
        f"{machines}.min_replica_count": step.old.min_replicas != step.new.min_replicas,
        f"{machines}.max_replica_count": step.old.max_replicas != step.new.max_replicas,
        f"{machines}.autoscaling_metric_specs": step.old.targets != step.new.targets,
        "disable_container_logging": step.old.container_logging != step.new.container_logging,
    }
    request = types.MutateDeployedModelRequest(
        endpoint=endpoint,
        deployed_model=types.DeployedModel(
            id=step.id,
            dedicated_resources=_machines(step.new),
            disable_container_logging=not step.new.container_logging,
        ),
        update_mask=field_mask_pb2.FieldMask(paths=[path for path, changes in changed.items() if changes]),
    )
    operation = api.call(api.endpoints.mutate_deployed_model, request).operation.name
    api.wait(work, operation, str(step))


def _machines(
    size: Size, machine: "types.MachineSpec | None" = None, *, spot: bool = False
) -> "types.DedicatedResources":
    from google.cloud.aiplatform_v1 import types

    return types.DedicatedResources(
        machine_spec=machine,
        min_replica_count=size.min_replicas,
        max_replica_count=size.max_replicas,
        autoscaling_metric_specs=[
            types.AutoscalingMetricSpec(metric_name=METRICS.get(metric, metric), target=target)
            for metric, target in size.targets
        ],
        spot=spot,
    )


def _move_traffic(api: Api, endpoint: str, step: MoveTraffic) -> None:
    from google.cloud.aiplatform_v1 import types
    from google.protobuf import field_mask_pb2

    split = {str(share.id): share.traffic or 0 for share in step.new}
    request = types.UpdateEndpointRequest(
        endpoint=types.Endpoint(name=endpoint, traffic_split=split),
        update_mask=field_mask_pb2.FieldMask(paths=["traffic_split"]),
    )
    api.call(api.endpoints.update_endpoint, request)


def _undeploy(work: Work, api: Api, endpoint: str, step: Undeploy) -> None:
    from google.cloud.aiplatform_v1 import types

    request = types.UndeployModelRequest(endpoint=endpoint, deployed_model_id=step.id)
    operation = api.call(api.endpoints.undeploy_model, request).operation.name
    api.wait(work, operation, str(step))


def _give_up(
    work: Work,
    api: Api,
    endpoint: str,
    error: ProblemError,
    current: list[planning.Step],
    known: Known,
    releases: Mapping[str, Release],
    old_outputs: Wire,
) -> None:
    """Undoes what this run deployed, unless it was stopped or traffic has moved; then raises what the user reads."""
    tidy = work.settle(UNDO_SECONDS)
    what, why = _explained(error, current)
    message = f"{what} {why}".strip()
    try:
        if isinstance(error, StoppedError):
            tidy = Work(work.urn, 15, threading.Event(), work.say, work.log)
        elif known.fresh and not known.moved:
            undone = "It was undeployed again, and the" if _undo(tidy, api, endpoint, known) else "The"
            message = f"{what} {undone} traffic was not touched. {why}"
        there = get_endpoint(tidy, api, endpoint)
    except ProblemError as second:
        raise HalfMadeError(
            f"{message} What is deployed now could not be brought in order: {second} The next `pulumi up` tries again.",
            endpoint,
            old_outputs,
        ) from None
    if there is None:
        raise ProblemError(message) from None
    now = outputs(there, known, releases)
    before = {"deployedModels": {}, "trafficSplit": {}, **old_outputs}
    same = set(now["deployedModels"].values()) == set(before["deployedModels"].values())
    resized = any(isinstance(step, Resize) for step in current)
    if same and now["trafficSplit"] == before["trafficSplit"] and not known.moved and not resized:
        raise type(error)(message) if type(error) in (ProblemError, StoppedError) else ProblemError(message)
    raise HalfMadeError(message, endpoint, now) from None


def _explained(error: ProblemError, current: list[planning.Step]) -> tuple[str, str]:
    """What could not be done, and why. The reason comes last: it may end in the log lines of a container."""
    if isinstance(error, StoppedError) or not current:
        return "", str(error)
    return f"Could not {current[0]}.", f"The reason: {error}"


def _undo(work: Work, api: Api, endpoint: str, known: Known) -> bool:
    """Undeploys what this run deployed, and says whether there was a deployment to undo.

    One that is still running is cancelled first.
    """
    undone = [known.operation] if known.operation else []
    work.say("undeploying what could not be deployed")
    if known.operation:
        with contextlib.suppress(RefusedError):  # done already, or not to be cancelled: then it is waited for
            api.cancel(work, known.operation)

    def step() -> bool:
        api.wait_for_others(work, endpoint)
        there = get_endpoint(work, api, endpoint)
        left = [d for d in (observe(there, known) if there else []) if d.id in known.fresh and d.ours and not d.traffic]
        if not left:
            return True
        undone.append(left[0].id)
        _undeploy(work, api, endpoint, Undeploy(left[0].spec.model or left[0].id, left[0].id))
        return False

    converge(work, step)
    return bool(undone)


# --- delete -------------------------------------------------------------------------------------------------


def delete(work: Work, api: Api, endpoint: str, old_outputs: Wire) -> None:
    """Undeploys everything of this rollout's own. That it, or the endpoint, is gone already is no error."""
    known = Known.of(work.urn, old_outputs)

    def step() -> bool:
        api.wait_for_others(work, endpoint)
        there = get_endpoint(work, api, endpoint)
        observed = observe(there, known) if there else []
        ours = [d for d in observed if d.ours]
        steps: list[planning.Step] = [*plan({}, ours, endpoint)]
        if not steps:
            return True
        if any(d.traffic for d in ours) and len(ours) < len(observed):
            steps.insert(0, _leave_traffic_to([d for d in observed if not d.ours]))
        work.say(str(steps[0]))
        perform(work, api, endpoint, steps[0], known, {})
        return False

    with api.lock(endpoint):
        converge(work, step)


def _leave_traffic_to(others: list[planning.Deployed]) -> MoveTraffic:
    """All traffic to those who stay, in the proportion that they have."""
    total = sum(d.traffic for d in others)
    if not total:
        raise ProblemError(
            f"The endpoint also has deployed models of somebody else, {', '.join(d.id for d in others)}, and none of "
            "them has traffic to take over. Give them some by hand, or undeploy them."
        )
    shares = {d.id: d.traffic * 100 // total for d in others}
    shares[max(shares, key=lambda id_: shares[id_])] += 100 - sum(shares.values())
    return MoveTraffic((), tuple(planning.Share(str(d.spec.model), d.id, shares[d.id]) for d in others))
