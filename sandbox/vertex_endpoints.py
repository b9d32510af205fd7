"""Endpoints: the models deployed on them, their replicas and their traffic.

https://cloud.google.com/vertex-ai/docs/predictions/deploy-model-api
An `endpoint` document is the Endpoint resource as it is stored; what depends on the moment (available
replicas, the dedicated address) is added when it is read.
"""

import random
import re
import time
from collections.abc import Callable

from sandbox import vertex_models
from sandbox.cloud import Call, Cloud, check_act_as, check_display_name, check_labels, etag, page, update_mask
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.fleet import Serving, serving
from sandbox.operations import Kind
from sandbox.store import JSON, now

# A letter first: up to 63 of [a-z0-9-], the last not a hyphen; a digit first: up to 9 digits, no leading
# zero (discovery document, endpoints.create, endpointId).
ENDPOINT_ID = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?|[1-9][0-9]{0,8}")
DEPLOYED_ID = re.compile(r"[0-9]{1,10}")
# MachineSpec.machine_type: "For DeployedModel this field is optional, and the default value is …".
DEFAULT_MACHINE = "n1-standard-2"

# Where records of Vertex AI's own behaviour are thin, the sandbox can behave either way (`--suppose NAME`), so that
# tests can show that the provider copes with both. docs/unverified.md has what is known of each.
SUPPOSITIONS = {
    "no-first-traffic": "a first deployment without a traffic split gets no traffic",
    "split-required": "a first deployment without a traffic split is refused",
    "no-own-ids": "a deployed-model id of the caller's choice is refused",
    "concurrent": "an endpoint's mutations may run at the same time",
    "versioned-models": "a deployed model names its model with the version",
    "no-status": "deployed models have no status",
    "default-targets": "default autoscaling targets are written into deployed models",
    "dns-scheme": "the DNS name of a dedicated endpoint begins with https://",
}

MUTABLE = ("displayName", "description", "labels", "trafficSplit")
UNSUPPORTED = (
    "network",
    "encryptionSpec",
    "enablePrivateServiceConnect",
    "privateServiceConnectConfig",
    "predictRequestResponseLoggingConfig",
    "gdcConfig",
    "genAiAdvancedFeaturesConfig",
)
DEPLOYED_UNSUPPORTED = (
    "automaticResources",
    "sharedResources",
    "explanationSpec",
    "fasterDeploymentConfig",
    "rolloutOptions",
    "fullFineTunedResources",
    "speculativeDecodingSpec",
    "gdcConnectedModel",
)
RESOURCES_UNSUPPORTED = ("flexStart", "requiredReplicaCount")
# Fields of dedicatedResources that only v1beta1 has.
BETA_RESOURCES = ("scaleToZeroSpec", "initialReplicaCount")
# Default targets, and metrics whose target is a percentage. The target of request_count is a number of requests a
# minute and replica: `gcloud ai endpoints deploy-model --help`, --autoscaling-metric-specs.
METRIC = "aiplatform.googleapis.com/prediction/online/"
CPU, ACCELERATOR = METRIC + "cpu/utilization", METRIC + "accelerator/duty_cycle"
DEFAULT_TARGET = 60
# Periods of scale to zero: ScaleToZeroSpec of the discovery document; the default of an hour and the conditions:
# https://docs.cloud.google.com/gemini-enterprise-agent-platform/machine-learning/predictions/autoscaling
IDLE_PERIODS = ("minScaleupPeriod", "idleScaledownPeriod")
IDLE_DEFAULT = "3600s"


def find(cloud: Cloud, name: str) -> JSON:
    """The stored endpoint. Raises NOT_FOUND."""
    endpoint = cloud.store.get("endpoint", name)
    if endpoint is None:
        raise not_found(f"Endpoint {name} is not found.")
    return endpoint


def find_deployed(endpoint: JSON, deployed_id: str) -> JSON:
    for deployed in endpoint.get("deployedModels", []):
        if deployed["id"] == deployed_id:
            return dict(deployed)
    raise not_found(f'DeployedModel with ID "{deployed_id}" is not found on Endpoint {endpoint["name"]}.')


def render(cloud: Cloud, endpoint: JSON, version: str = "v1") -> JSON:
    """The Endpoint resource as one version of the API shows it."""
    answer = {key: value for key, value in endpoint.items() if key != "exposed"}
    if endpoint.get("deployedModels"):
        answer["deployedModels"] = [
            render_deployed(cloud, endpoint["name"], d, version) for d in endpoint["deployedModels"]
        ]
    # A dedicated endpoint has no DNS name before a deployment on it has succeeded. On Google the name is the
    # endpoint's own; here the sandbox's address serves all of them.
    if endpoint.get("dedicatedEndpointEnabled") and endpoint.get("exposed"):
        scheme = "https://" if "dns-scheme" in cloud.settings.suppose else ""
        answer["dedicatedEndpointDns"] = f"{scheme}127.0.0.1:{cloud.settings.port}"
    answer["etag"] = etag(endpoint, MUTABLE)
    return answer


def _of_v1(deployed: JSON) -> JSON:
    """A deployed model without what only v1beta1 can express."""
    resources = {key: value for key, value in deployed["dedicatedResources"].items() if key not in BETA_RESOURCES}
    return {**deployed, "dedicatedResources": resources}


def render_deployed(cloud: Cloud, endpoint: str, deployed: JSON, version: str) -> JSON:
    """A deployed model; a count of zero is left out, as JSON of a protocol buffer does."""
    suppose, answer = cloud.settings.suppose, {**deployed}
    resources: JSON = dict((_of_v1(deployed) if version == "v1" else deployed)["dedicatedResources"])
    if not resources.get("minReplicaCount"):
        resources.pop("minReplicaCount", None)
    if "default-targets" in suppose and not resources.get("autoscalingMetricSpecs"):
        metrics = [CPU, ACCELERATOR] if resources["machineSpec"].get("acceleratorCount") else [CPU]
        resources["autoscalingMetricSpecs"] = [{"metricName": m, "target": DEFAULT_TARGET} for m in metrics]
    answer["dedicatedResources"] = resources
    if "versioned-models" in suppose:
        answer["model"] = f"{deployed['model']}@{deployed['modelVersionId']}"
    if "no-status" not in suppose:
        available = cloud.fleet.available(endpoint, deployed["id"])
        answer["status"] = {"lastUpdateTime": now()} | ({"availableReplicaCount": available} if available else {})
    return answer


def save(cloud: Cloud, endpoint: JSON, event: str) -> None:
    """Stores an endpoint, and a snapshot of its traffic in the history. Inside a transaction."""
    endpoint["updateTime"] = now()
    for name in ("deployedModels", "trafficSplit", "labels"):
        if not endpoint.get(name):
            endpoint.pop(name, None)  # as JSON of a protocol buffer leaves out what is empty
    cloud.store.put("endpoint", endpoint["name"], endpoint)
    snapshot(cloud, endpoint, event)


def snapshot(cloud: Cloud, endpoint: JSON, event: str) -> None:
    """Records the traffic and who could serve it, for the admin route's history."""
    name = endpoint["name"]
    cloud.store.record(
        {
            "time": now(),
            "endpoint": name,
            "event": event,
            "trafficSplit": endpoint.get("trafficSplit", {}),
            "available": {d["id"]: cloud.fleet.available(name, d["id"]) for d in endpoint.get("deployedModels", [])},
        }
    )


def replicas_changed(cloud: Cloud, name: str) -> None:
    endpoint = cloud.store.get("endpoint", name)
    if endpoint and endpoint.get("deployedModels"):
        with cloud.store.transaction():
            snapshot(cloud, endpoint, "replicas")


def serving_of(cloud: Cloud, endpoint: str, deployed: JSON) -> Serving:
    name, version = vertex_models.find_version(cloud, f"{deployed['model']}@{deployed['modelVersionId']}")
    return serving(cloud.store.id, endpoint, deployed, name, version, cloud.settings.idle_seconds)


def check_alone(cloud: Cloud, name: str) -> None:
    """One mutation of an endpoint at a time, unless that is supposed to be no rule of Vertex AI's."""
    if "concurrent" not in cloud.settings.suppose:
        cloud.operations.check_alone("Endpoint", name)


def deploying(cloud: Cloud, name: str) -> list[JSON]:
    """The models that are being deployed on an endpoint."""
    return [o["request"]["deployedModel"] for o in cloud.operations.on(name) if o["kind"] == "deployModel"]


def check_traffic(split: JSON, ids: set[str]) -> None:
    """Raises INVALID_ARGUMENT unless a traffic split is empty or sums to 100 over `ids`."""
    if not split:
        return
    if unknown := sorted(set(split) - ids):
        raise invalid(f"The following DeployedModel ID(s) [{', '.join(unknown)}] do not exist.")
    if any(not 0 <= percent <= 100 for percent in split.values()):
        raise invalid("Every traffic percentage must be between 0 and 100.")
    if sum(split.values()) != 100:
        raise invalid(f"The traffic percentage values must add up to 100; they add up to {sum(split.values())}.")


# ------------------------------------------------------------------------------------------ endpoints


def _check_supported(call: Call, resource: JSON, fields: tuple[str, ...], where: str) -> None:
    for name in fields:
        if resource.get(name):
            raise GoogleError("UNIMPLEMENTED", f"The sandbox does not implement {call.method.id} with {where}.{name}.")


async def create(call: Call) -> JSON:
    cloud, endpoint = call.cloud, call.body
    check_display_name(endpoint)
    check_labels(endpoint.get("labels", {}))
    _check_supported(call, endpoint, UNSUPPORTED, "endpoint")
    if endpoint.get("trafficSplit"):
        raise invalid("traffic_split can not be set at creation: no model is deployed on the Endpoint yet.")
    given = call.query.get("endpointId", call.query.get("endpoint_id", ""))
    if given and not ENDPOINT_ID.fullmatch(given):
        raise invalid(
            f'Invalid endpoint_id "{given}": up to 63 of [a-z0-9-] beginning with a letter and ending with a '
            "letter or digit, or up to 9 digits without a leading zero."
        )
    name = f"{call.location}/endpoints/{given or random.randrange(10**18, 9 * 10**18)}"
    if cloud.store.get("endpoint", name) or cloud.operations.on(name):
        raise GoogleError("ALREADY_EXISTS", f"Endpoint {name} already exists.")
    return cloud.operations.start(call, "createEndpoint", name, name, {**endpoint, "name": name})


def _create_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            endpoint = {k: v for k, v in operation["request"].items() if k != "etag"}
            endpoint["createTime"] = now()
            save(cloud, endpoint, "created")
            return render(cloud, endpoint)

        return finish

    return Kind("CreateEndpointOperationMetadata", "Endpoint", work)


async def get(call: Call) -> JSON:
    cloud = call.cloud
    answer = render(cloud, find(cloud, call.name), call.version)
    # https://docs.cloud.google.com/vertex-ai/docs/predictions/rolling-deployment shows this parameter and the state.
    if call.query.get("allDeploymentStates") == "true":
        unfinished = [{**d, "state": "BEING_DEPLOYED"} for d in deploying(cloud, call.name)]
        if unfinished:
            answer["deployedModels"] = answer.get("deployedModels", []) + unfinished
    return answer


async def list_(call: Call) -> JSON:
    endpoints = [render(call.cloud, e, call.version) for _, e in call.cloud.store.list("endpoint", call.name + "/")]
    return page(call, "endpoints", endpoints, "endpoint")


async def patch(call: Call) -> JSON:
    cloud, body = call.cloud, call.body
    mask = update_mask(call.query)
    for path in mask:
        if path not in MUTABLE and not path.startswith("labels."):
            raise invalid(f'Field "{path}" of an Endpoint can not be updated; these can: {", ".join(MUTABLE)}.')
    with cloud.store.transaction():
        endpoint = find(cloud, call.name)
        check_alone(cloud, call.name)
        if body.get("etag") and body["etag"] != etag(endpoint, MUTABLE):
            raise GoogleError("ABORTED", "The etag does not match the Endpoint's: read it again and repeat the change.")
        if "trafficSplit" in mask:
            check_traffic(body.get("trafficSplit", {}), {d["id"] for d in endpoint.get("deployedModels", [])})
        vertex_models.apply_mask(endpoint, body, mask)
        check_display_name(endpoint)
        check_labels(endpoint.get("labels", {}))
        save(cloud, endpoint, "patched")
    return render(cloud, endpoint, call.version)


async def delete(call: Call) -> JSON:
    cloud = call.cloud
    endpoint = find(cloud, call.name)
    busy = [d["id"] for d in deploying(cloud, call.name)]
    if ids := [d["id"] for d in endpoint.get("deployedModels", [])] + busy:
        raise precondition(
            f'The Endpoint "{call.name}" has deployed or being-deployed DeployedModel(s) with ID(s): '
            f"{', '.join(ids)}. Please undeploy them before retry."
        )
    cloud.operations.check_alone("Endpoint", call.name)
    return cloud.operations.start(call, "deleteEndpoint", call.location, call.name, {})


def _delete_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            cloud.store.delete("endpoint", operation["target"])
            return {}

        return finish

    return Kind("DeleteOperationMetadata", "google.protobuf.Empty", work)


# ------------------------------------------------------------------------------------------ deploying


def _check_resources(call: Call, resources: JSON, endpoint: JSON, others: int) -> None:
    """Raises for replica counts that Vertex AI refuses; sets what it defaults.

    `others` is the number of other models on the endpoint.
    """
    _check_supported(call, resources, RESOURCES_UNSUPPORTED, "dedicated_resources")
    least = resources.setdefault("minReplicaCount", 0)
    if least < 1 and call.version == "v1":
        raise invalid(f"dedicated_resources.min_replica_count must be greater than or equal to 1; it is {least}.")
    most = resources.setdefault("maxReplicaCount", least) or max(least, 1)
    if most < least:
        raise invalid(f"max_replica_count ({most}) must not be less than min_replica_count ({least}).")
    resources["maxReplicaCount"] = most
    for metric in resources.get("autoscalingMetricSpecs", []):
        target = metric.get("target", DEFAULT_TARGET)
        if target < 1 or (target > 100 and metric.get("metricName") in (CPU, ACCELERATOR)):
            raise invalid("The target of a utilization metric must be between 1 and 100, of another at least 1.")
    if least:
        if beta := [name for name in BETA_RESOURCES if resources.get(name)]:
            raise invalid(f"dedicated_resources.{beta[0]} needs a min_replica_count of 0.")
    else:
        _check_scale_to_zero(resources, endpoint, others)


def _check_scale_to_zero(resources: JSON, endpoint: JSON, others: int) -> None:
    """Raises where scale to zero is not offered (IDLE_DEFAULT has the source); sets what it defaults."""
    if not endpoint.get("dedicatedEndpointEnabled"):
        raise invalid("Scale to zero can not be enabled on shared public endpoints.")
    if others:
        raise invalid("Scale to zero is only compatible with one model per endpoint.")
    if not 1 <= resources.setdefault("initialReplicaCount", 1) <= resources["maxReplicaCount"]:
        raise invalid("initial_replica_count must be between 1 and max_replica_count.")
    spec: JSON = resources.setdefault("scaleToZeroSpec", {})
    for period in IDLE_PERIODS:
        if not 300 <= float(spec.setdefault(period, IDLE_DEFAULT).removesuffix("s")) <= 28800:
            raise invalid(f"scale_to_zero_spec.{period} must be between 300 and 28800 seconds.")


async def deploy_model(call: Call) -> JSON:
    cloud, name = call.cloud, call.name
    deployed: JSON = dict(call.body.get("deployedModel") or {})
    endpoint = find(cloud, name)
    if not deployed.get("model"):
        raise invalid("Required field deployed_model.model is not set.")
    _check_supported(call, deployed, DEPLOYED_UNSUPPORTED, "deployed_model")
    if "dedicatedResources" not in deployed:
        raise invalid("Required field deployed_model.dedicated_resources is not set: the Model supports no other.")
    resources: JSON = deployed["dedicatedResources"]
    taken = {d["id"] for d in endpoint.get("deployedModels", [])}
    _check_resources(call, resources, endpoint, len(taken))
    if any(not d["dedicatedResources"]["minReplicaCount"] for d in endpoint.get("deployedModels", [])):
        raise invalid("Scale to zero is only compatible with one model per endpoint.")
    machine: JSON = resources.setdefault("machineSpec", {})
    machine.setdefault("machineType", DEFAULT_MACHINE)
    if machine.get("acceleratorCount", 0) > 0 and not machine.get("acceleratorType"):
        raise invalid("machine_spec.accelerator_count needs machine_spec.accelerator_type.")
    check_act_as(cloud, deployed.get("serviceAccount"))
    key, version = vertex_models.find_version(cloud, deployed["model"])
    if given := deployed.get("id"):
        if "no-own-ids" in cloud.settings.suppose:
            raise invalid("deployed_model.id must not be set.")
        if not DEPLOYED_ID.fullmatch(given) or int(given) == 0:
            raise invalid(f'Invalid deployed_model.id "{given}": 1-10 characters of [0-9], and not 0.')
        if given in taken:
            raise GoogleError("ALREADY_EXISTS", f'DeployedModel with ID "{given}" already exists on Endpoint {name}.')
    split: JSON = call.body.get("trafficSplit", {})
    check_traffic(split, taken | {"0"})
    if not split and not taken and "split-required" in cloud.settings.suppose:
        raise invalid("Required field traffic_split is not set.")
    check_alone(cloud, name)
    deployed.setdefault("id", str(random.randrange(10**8, 10**10)))
    deployed["model"], _, deployed["modelVersionId"] = key.partition("@")
    model = vertex_models.render(cloud, key, version)
    if not deployed.get("displayName"):
        deployed["displayName"] = model["displayName"]
    if "enableContainerLogging" in deployed:  # v1beta1's way to say it
        deployed["disableContainerLogging"] = not deployed.pop("enableContainerLogging")
    request = {"deployedModel": deployed, "trafficSplit": split, "version": key}
    return cloud.operations.start(call, "deployModel", name, name, request)


def _deploy_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        name, request = operation["target"], operation["request"]
        deployed: JSON = request["deployedModel"]
        what = serving_of(cloud, name, deployed)
        cloud.operations.stage(operation, deploymentStage="GETTING_CONTAINER_IMAGE")
        await cloud.fleet.runner.fetch(what.launch.image)
        cloud.operations.stage(operation, deploymentStage="STARTING_MODEL_SERVER")
        await cloud.fleet.bring_up(what, first_replicas(deployed))

        def finish() -> JSON:
            endpoint = find(cloud, name)
            deployed["createTime"] = now()
            split: JSON = request["trafficSplit"]
            if not split and not endpoint.get("deployedModels") and "no-first-traffic" not in cloud.settings.suppose:
                # The first model on an endpoint gets all traffic: in samples of Google's, predictions work right
                # after a deployment without a split.
                split = {"0": 100}
            endpoint.setdefault("deployedModels", []).append(deployed)
            if split:
                endpoint["trafficSplit"] = {deployed["id"] if k == "0" else k: v for k, v in split.items()}
            endpoint["exposed"] = True
            operation["metadata"] = {"deploymentStage": "SUCCESSFULLY_DEPLOYED"}
            save(cloud, endpoint, "deployed")
            return {"deployedModel": _of_v1(deployed)}

        return finish

    async def undo(operation: JSON) -> None:
        operation["metadata"] = {"deploymentStage": "FAILED_TO_DEPLOY"}
        await cloud.fleet.bring_down(operation["target"], operation["request"]["deployedModel"]["id"])

    return Kind("DeployModelOperationMetadata", "DeployModelResponse", work, undo, cancellable=False)


def first_replicas(deployed: JSON) -> int:
    """With how many replicas a deployed model starts, also when it comes back from zero."""
    resources: JSON = deployed["dedicatedResources"]
    return int(resources["minReplicaCount"] or resources["initialReplicaCount"])


async def undeploy_model(call: Call) -> JSON:
    """Takes the traffic away at once and answers; the replicas stop and the entry goes in the operation."""
    cloud, name = call.cloud, call.name
    deployed_id = call.body.get("deployedModelId", "")
    if not deployed_id:
        raise invalid("Required field deployed_model_id is not set.")
    with cloud.store.transaction():
        endpoint = find(cloud, name)
        if any(d["id"] == deployed_id for d in deploying(cloud, name)):
            raise precondition(
                f'DeployedModel with ID "{deployed_id}" remains involved in the rolling update on Endpoint {name}.'
            )
        find_deployed(endpoint, deployed_id)
        check_alone(cloud, name)
        others = {d["id"] for d in endpoint["deployedModels"]} - {deployed_id}
        split = call.body.get("trafficSplit") or endpoint.get("trafficSplit", {})
        if not others:
            split = {}  # "If last DeployedModel is being undeployed, traffic_split will always end up empty"
        elif split.get(deployed_id):
            raise precondition(
                f'DeployedModel "{deployed_id}" has {split[deployed_id]} % of the traffic of Endpoint '
                f"{name}: set a traffic_split that gives it to the others."
            )
        split = {k: v for k, v in split.items() if k != deployed_id}
        check_traffic(split, others)
        if split != endpoint.get("trafficSplit", {}):
            endpoint["trafficSplit"] = split
            save(cloud, endpoint, "undeploying")
        return cloud.operations.start(call, "undeployModel", name, name, {"deployedModelId": deployed_id})


def _undeploy_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        name, deployed_id = operation["target"], operation["request"]["deployedModelId"]
        await cloud.fleet.bring_down(name, deployed_id)

        def finish() -> JSON:
            endpoint = find(cloud, name)
            deployed = find_deployed(endpoint, deployed_id)
            endpoint["deployedModels"] = [d for d in endpoint["deployedModels"] if d["id"] != deployed_id]
            save(cloud, endpoint, "undeployed")
            if seconds := cloud.settings.hold_after_undeploy:
                until = {"until": time.time() + seconds, "endpoint": name}
                cloud.store.put("hold", f"{deployed['model']}@{deployed['modelVersionId']}", until)
            return {}

        return finish

    async def undo(operation: JSON) -> None:  # still deployed: then it has its replicas, though no traffic
        _restore(cloud, operation["target"], operation["request"]["deployedModelId"])

    return Kind("UndeployModelOperationMetadata", "UndeployModelResponse", work, undo)


def _restore(cloud: Cloud, name: str, deployed_id: str) -> None:
    """Brings the replicas of a deployed model to the number that is stored."""
    deployed = find_deployed(find(cloud, name), deployed_id)
    cloud.fleet.restore(serving_of(cloud, name, deployed), first_replicas(deployed))


# In place only: replica counts, autoscaling targets and container logging (discovery document,
# MutateDeployedModelRequest.deployedModel).
MUTABLE_DEPLOYED = (
    "dedicatedResources.minReplicaCount",
    "dedicatedResources.maxReplicaCount",
    "dedicatedResources.autoscalingMetricSpecs",
    "disableContainerLogging",
)
MUTABLE_DEPLOYED_BETA = ("dedicatedResources.scaleToZeroSpec", "dedicatedResources.initialReplicaCount")


async def mutate_deployed_model(call: Call) -> JSON:
    cloud, name = call.cloud, call.name
    wanted: JSON = call.body.get("deployedModel") or {}
    paths = update_mask({"updateMask": call.body.get("updateMask", "")})
    endpoint = find(cloud, name)
    deployed = find_deployed(endpoint, wanted.get("id", ""))
    mutable = (*MUTABLE_DEPLOYED, *(MUTABLE_DEPLOYED_BETA if call.version == "v1beta1" else ()))
    for path in paths:
        if path not in mutable:
            raise invalid(f'Field "{path}" of a DeployedModel can not be mutated; these can: {", ".join(mutable)}.')
        outer, _, inner = path.partition(".")
        source: JSON = wanted.get(outer) or {} if inner else wanted
        into: JSON = deployed.setdefault(outer, {}) if inner else deployed
        if (inner or outer) in source:
            into[inner or outer] = source[inner or outer]
        else:
            into.pop(inner or outer, None)
    resources: JSON = deployed["dedicatedResources"]
    if resources.get("minReplicaCount"):
        resources.pop("initialReplicaCount", None)  # of a model that scaled to zero before
    _check_resources(call, resources, endpoint, len(endpoint["deployedModels"]) - 1)
    check_alone(cloud, name)
    return cloud.operations.start(call, "mutateDeployedModel", name, name, {"deployedModel": deployed})


def _mutate_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        name, deployed = operation["target"], operation["request"]["deployedModel"]
        what = serving_of(cloud, name, deployed)
        count = first_replicas(deployed)
        await cloud.fleet.bring_up(what, count)
        await cloud.fleet.bring_down(name, deployed["id"], keep=count)

        def finish() -> JSON:
            endpoint = find(cloud, name)
            own = [deployed if d["id"] == deployed["id"] else d for d in endpoint["deployedModels"]]
            endpoint["deployedModels"] = own
            save(cloud, endpoint, "mutated")
            return {"deployedModel": _of_v1(deployed)}

        return finish

    async def undo(operation: JSON) -> None:
        name, deployed_id = operation["target"], operation["request"]["deployedModel"]["id"]
        before = find_deployed(find(cloud, name), deployed_id)
        await cloud.fleet.bring_down(name, deployed_id, keep=first_replicas(before))
        _restore(cloud, name, deployed_id)

    return Kind("MutateDeployedModelOperationMetadata", "MutateDeployedModelResponse", work, undo)


async def adopt(cloud: Cloud) -> None:
    """At start: brings back the replicas of everything deployed, and removes containers of nothing.

    What scales to zero stays there until it is asked.
    """
    wanted = [
        (serving_of(cloud, name, deployed), deployed["dedicatedResources"]["minReplicaCount"])
        for name, endpoint in cloud.store.list("endpoint")
        for deployed in endpoint.get("deployedModels", [])
    ]
    pending = {
        (o["target"], o["request"]["deployedModel"]["id"], o["request"]["version"])
        for _, o in cloud.store.list("operation")
        if o["kind"] == "deployModel" and not o.get("done")
    }
    await cloud.fleet.adopt(wanted, pending)


def kinds(cloud: Cloud) -> dict[str, Kind]:
    return {
        "createEndpoint": _create_kind(cloud),
        "deleteEndpoint": _delete_kind(cloud),
        "deployModel": _deploy_kind(cloud),
        "undeployModel": _undeploy_kind(cloud),
        "mutateDeployedModel": _mutate_kind(cloud),
    }


METHODS = {
    f"aiplatform.projects.locations.endpoints.{name}": handler
    for name, handler in {
        "create": create,
        "get": get,
        "list": list_,
        "patch": patch,
        "delete": delete,
        "deployModel": deploy_model,
        "undeployModel": undeploy_model,
        "mutateDeployedModel": mutate_deployed_model,
    }.items()
}
